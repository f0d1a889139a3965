"""What benchmarks/sharing.py makes of its jobs: differences from no sharing and from the searched pattern; a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

FIGURES = {"recall_mean": 0.9, "recall_p5": 0.7, "far_mean": 0.8, "kept_mean": 100.0, "context_mean": 400.0}
WORK = {
    "candidates": 3,
    "layer_evaluations": 9,
    "layer_evaluations_plain": 18,
    "layer_tokens": 5,
    "layer_tokens_plain": 9,
}


@pytest.fixture(scope="module")
def parts(benchmark: Callable[[str], Any]) -> Any:
    """The benchmark's modules: ``figures``, ``jobs``, ``tables``."""
    return type("Parts", (), {name: benchmark(f"sharing_{name}") for name in ("figures", "jobs", "tables")})


@pytest.fixture(scope="module")
def done(parts: Any) -> dict[Any, dict[str, Any]]:
    """An exact and a lazy search of four layers, and what was judged of their patterns."""

    def judged(*windows: float, found: tuple[float, ...] = ()) -> dict[str, Any]:
        return {"windows": list(windows), **FIGURES, **({"tasks": {"kv": list(found)}} if found else {})}

    def searched(**ways: str) -> dict[str, Any]:
        flips = [{"layer": 1, "loss": 2.1}]
        return {
            "patterns": {"0.5": ways},
            "layers": [0, 2, 4, 6],
            "loss_before": 2.0,
            "flips": flips,
            "seconds": 1.0,
        } | WORK

    judge, search = parts.jobs.Judge, parts.jobs.Search
    return {
        search("every", 9, 0, "exact"): searched(searched="FSSF", uniform="FSFS"),
        search("every", 9, 0, "lazy"): searched(searched="FFSS", uniform="FSFS"),
        judge("every", None, False, True): judged(1.0, 2.0, found=(1.0, 1.0)),
        judge("every", "FFFF", False, True): judged(1.0, 2.0, found=(1.0, 1.0)),
        judge("every", "FSSF", False, True): judged(1.01, 2.02, found=(1.0, 0.0)),
        judge("every", "FSFS", False, True): judged(1.02, 2.0, found=(0.0, 0.0)),
        judge("every", "FFSS", False, True): judged(1.03, 2.06, found=(1.0, 1.0)),
    }


def test_patterns_are_compared_with_no_sharing_and_with_the_searched_one(parts: Any, done: Any) -> None:
    rows = {row["way"]: row for row in parts.figures.rows_of(done)}
    assert list(rows) == ["no sharing", "a set a head", "searched", "uniform", "lazy"]
    assert rows["no sharing"]["bits"] == [0, 0]
    assert rows["searched"]["bits"] == pytest.approx([0.01, 0])
    assert rows["searched"]["points"] == pytest.approx([-0.5, 0.5])
    assert rows["uniform"]["bits"] == pytest.approx([0.01, 0.01])  # 2 % and 0 %
    assert rows["uniform"]["bits_above_searched"] == pytest.approx([0, 0.01])
    assert rows["lazy"]["bits_above_searched"] == pytest.approx([0.02, 0])
    assert rows["uniform"]["needles"] == 0
    assert "points_above_searched" not in rows["searched"]


def test_a_lazy_search_says_what_it_shares_with_the_exact_one(parts: Any, done: Any) -> None:
    exact, lazy = parts.figures.searches_of(done)
    assert "agreement" not in exact
    assert lazy["agreement"] == {"0.5": 0.0}  # layers 3 and 1, beside the first, which all keep
    assert exact["rise"] == pytest.approx(0.05)
    assert parts.figures.kept_alike("FFSFS", "FFSSF") == pytest.approx(1 / 3)


def test_the_table_has_a_row_a_pattern_and_names_what_holds_the_bars(parts: Any, done: Any) -> None:
    rows = parts.figures.rows_of(done)
    result = {
        "rows": rows, "searches": parts.figures.searches_of(done), "segments": 2, "device": "cpu", "command": "it",
        "texts": [{"documents": ["a", "b"]}], "versions": {"torch": "2"},
        "options": {"prompts": 2, "length": 4096, "rows": 512, "tasks": "kv", "steps": 240},
    }  # fmt: skip
    table = parts.tables.patterns(json.loads(json.dumps(result)))
    assert table.count("`FSSF`") == table.count("`FSFS`") == 1
    assert "| 9 | +1.00% ± 0.00% | +0.00% ± 1.00% |" in table
    assert "no sharing: none." in table
    rows[2] |= {"keep": 0.25, "bits": [0.004, 0.001], "points": [-0.01, 0.01]}
    assert "no sharing: `every` searched as they were." in parts.tables.patterns(result | {"rows": rows[:3]})
