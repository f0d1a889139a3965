"""Benchmarks of selectors and recipes: the bounds are what they are called, what is judged is the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsec


def test_a_selector_that_keeps_all_costs_what_the_split_costs(
    benchmark: Callable[[str], Any], tiny_artifact: Path
) -> None:
    model, _ = sparsec.load(tiny_artifact)
    plan = model.sparsec_plan
    tokens = torch.randint(1, 97, (2, 200), generator=torch.Generator().manual_seed(4))
    settings = [{"recent": 200, "top_p": 0.9}, {"recent": 1, "top_p": 0.1}]
    split, everything, few = benchmark("recent_tokens").measure(settings, model, tokens, 24)
    assert split["kl"] > 0
    assert everything["kl"] == pytest.approx(split["kl"], rel=1e-3)
    assert everything["other"] == split["other"]
    assert everything["kept_mean"] == pytest.approx(sum(range(177, 201)) / 24)
    assert few["kept_mean"] < everything["kept_mean"]
    assert few["kl"] != everything["kl"]
    assert everything["rows"] == few["rows"] == 2 * 24
    assert model.sparsec_plan == plan


def test_rows_are_replaced_by_those_of_the_same_files_and_recipe(
    benchmark: Callable[[str], Any], tmp_path: Path
) -> None:
    file, place = tmp_path / "rows.json", {"artifact": "a", "plan": "p", "recipe": "lr=1"}
    for files, score in (("1", 1), ("2", 2), ("1", 3)):
        benchmark("recipes")._add(file, {**place, "files": files, "score": score})
    assert [row["score"] for row in json.loads(file.read_text())["rows"]] == [2, 3]


def test_artifacts_are_judged_as_they_are_and_against_their_own_base_alone(
    benchmark: Callable[[str], Any],
    tiny_deep: Path,
    tiny_artifact: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipes, file = benchmark("recipes"), tmp_path / "rows.json"
    asked = ["--train", "builtin", "--dev", "builtin", "--recipe", recipes.AS_IT_IS, "--dtype", "float32"]
    asked += ["-o", str(file), "--lengths", "700", "--windows", "1", "--prompts", "1", "--texts", "1"]
    monkeypatch.setenv("SPARSEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["recipes.py", str(tiny_artifact), "--source", str(tiny_deep), *asked])
    recipes.main()
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["artifact"], row["recipe"]) == (tiny_artifact.name, "as it is")
    assert set(row["exams"]) == {f"{kind} 700" for kind in ("text", "kv", "multikey", "passkey", "greedy")}
    assert row["score"] > 0
    monkeypatch.setattr("sys.argv", ["recipes.py", str(tiny_artifact), "--source", str(tiny_llama), *asked])
    with pytest.raises(SystemExit, match=r"compiled from another model than .*: name it with --source"):
        recipes.main()
