"""The gate's verdict: what it compares, what it allows, and what it says when that is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsec.compiler.gate import far_loss, shown, verdict
from sparsec.compiler.recipe import Gate
from sparsec.layout import read_json


def taken(bits: float, rows: list[list[float]] | None = None, **more: Any) -> dict[str, Any]:
    return {"bits_per_byte": bits, "rows": rows or [[1.0, 2.0]], "selector": {}, **more}


def test_what_is_within_bounds_passes() -> None:
    found = verdict(Gate(max_loss=0.05), taken(1.0), taken(1.04))
    assert found["passed"]
    assert found["loss"] == pytest.approx(0.04)
    assert found["far"] is None
    assert "rows" not in found["artifact"]


@pytest.mark.parametrize(
    ("dense", "found", "words"),
    [
        (taken(1.0), taken(1.06), "bits per byte rose by 6.00%, 5.00% is allowed"),
        (taken(1.0), taken(float("nan")), "bits per byte rose by nan%"),
        (taken(1.0), taken(1.0) | {"selector": {"recall_mean": 0.8}}, "selectors find 80.0% of the attention mass"),
        (
            taken(1.0, answered=0.9),
            taken(1.0, answered=0.8),
            "80.0% of the questions are answered, dense answers 90.0%",
        ),
    ],
)
def test_each_broken_bound_is_named(dense: dict[str, Any], found: dict[str, Any], words: str) -> None:
    judged = verdict(Gate(), dense, found)
    assert not judged["passed"]
    assert len(judged["failures"]) == 1
    assert words in judged["failures"][0]


def test_a_budget_is_of_the_pass_and_not_of_those_before_it() -> None:
    passes = [{"name": "first", "after": taken(1.03)}, {"name": "second", "budget": 0.005}]
    assert verdict(Gate(), taken(1.0), taken(1.034), passes=passes)["passed"]
    found = verdict(Gate(), taken(1.0), taken(1.04), passes=passes)["failures"]
    assert found == ["second raised bits per byte by 0.97% on held-out text, its budget is 0.50%"]
    passes = [{"name": "first", "after": taken(1.03), "budget": 0.01}, {"name": "second"}]
    assert (
        "first raised bits per byte by 3.00%" in verdict(Gate(), taken(1.0), taken(1.0), passes=passes)["failures"][0]
    )


def test_far_tokens_weigh_what_a_window_costs_them() -> None:
    dense, near = taken(1.0, [[1.0, 2.0], [3.0, 1.0]]), taken(1.2, [[1.0, 5.0], [2.0, 2.0]])
    found = far_loss(dense, near, taken(1.1, [[9.0, 3.0], [9.0, 2.0]]))
    assert found == {"dense": (3 * 2 + 1) / 4, "near": (3 * 5 + 2) / 4, "artifact": (3 * 3 + 2) / 4, "tokens": 2}
    assert far_loss(dense, dense, near) is None


def test_a_compile_measures_all_of_it(tiny_artifact: Path) -> None:
    gate = read_json(tiny_artifact / "measurements.json")["gate"]
    assert gate["far"]["dense"] < gate["far"]["near"]
    assert gate["questions"] == 0
    assert shown(gate["dense"]) == gate["dense"]


def test_questions_are_asked_of_dense_and_artifact(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = compile_line(out, "--set", "gate.prompts=2", "--set", "gate.context=900", "--set", "gate.max_points=1")
    assert cli(*line).status == 0
    gate = read_json(out / "measurements.json")["gate"]
    assert gate["questions"] == 4
    assert {"answered"} <= gate["dense"].keys() & gate["artifact"].keys()
    assert "Of 4 long-range questions dense answers" in (out / "report.html").read_text()
