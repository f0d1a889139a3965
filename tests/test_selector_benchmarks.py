"""Benchmarks of selectors and recipes: the bounds are what they are called, what is judged is the artifact."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsec
from sparsec.compiler.source import Source, load_model, open_source

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Callable[[str], Any]:
    """``script("recipes")``: the module."""

    def load(name: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(BENCHMARKS))
            return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def source(tiny_deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(tiny_deep), cache_dir=tmp_path_factory.mktemp("cache"))


def test_a_selector_that_keeps_all_costs_what_the_split_costs(
    script: Callable[[str], Any], tiny_artifact: Path
) -> None:
    model, _ = sparsec.load(tiny_artifact)
    plan = model.sparsec_plan
    tokens = torch.randint(1, 97, (2, 200), generator=torch.Generator().manual_seed(4))
    settings = [{"recent": 200, "top_p": 0.9}, {"recent": 1, "top_p": 0.1}]
    split, everything, few = script("recent_tokens").measure(settings, model, tokens, 24)
    assert split["kl"] > 0
    assert everything["kl"] == pytest.approx(split["kl"], rel=1e-3)
    assert everything["other"] == split["other"]
    assert everything["kept_mean"] == pytest.approx(sum(range(177, 201)) / 24)
    assert few["kept_mean"] < everything["kept_mean"]
    assert few["kl"] != everything["kl"]
    assert everything["rows"] == few["rows"] == 2 * 24
    assert model.sparsec_plan == plan


def test_an_artifact_is_judged_with_its_own_weights_and_only_against_its_own_base(
    script: Callable[[str], Any], source: Source, tiny_artifact: Path, tmp_path: Path
) -> None:
    recipes, model = script("recipes"), load_model(source, device="cpu", dtype="float32")
    own = recipes._own_weights(tiny_artifact, source, model)
    assert set(own) == set(dict(model.named_parameters()))
    assert all(torch.equal(own[name], weight) for name, weight in model.named_parameters())
    (tmp_path / "plan").mkdir()
    assert recipes._own_weights(tmp_path / "plan", source, model) == {}
    other = shutil.copytree(tiny_artifact, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["source"]["digest"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="compiled from another model"):
        recipes._own_weights(other, source, model)


def test_rows_are_replaced_by_those_of_the_same_plan_tensors_and_recipe(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    recipes, file = script("recipes"), tmp_path / "rows.json"
    first, second = (recipes._digest({"a": torch.full((2,), value)}) for value in (1.0, 2.0))
    assert first != second
    for tensors, score in ((first, 1), (second, 2), (first, 3)):
        recipes._add(file, {"artifact": "a", "plan": "p", "tensors": tensors, "recipe": "lr=1", "score": score})
    assert [row["score"] for row in json.loads(file.read_text())["rows"]] == [2, 3]
