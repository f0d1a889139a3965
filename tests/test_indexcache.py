"""indexcache: the greedy search, its shortcuts and limits, and what is trained after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.patterns import stage_starts
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.registry import make_passes
from sparsec.errors import PlanError, UsageError
from sparsec.events import Event
from sparsec.layout import read_json
from sparsec.passes import indexcache
from sparsec.passes.base import PassResult, Program
from sparsec.passes.indexcache import IndexCache
from sparsec.plan import Plan
from sparsec.plugins.families import shape_of
from sparsec.plugins.runtime import tensor_names, uninstall


@pytest.fixture(scope="module")
def calibration(tiny_deep: Path) -> Calibration:
    return Calibration(read_corpus(), AutoTokenizer.from_pretrained(tiny_deep))


INDEXED = (0, 2, 3, 5, 6, 7)


@pytest.fixture(scope="module")
def indexed(make_checkpoint: Callable[..., Path]) -> Program:
    """8 layers, 6 of them with indexers of random numbers."""
    folder = make_checkpoint(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    plan = Plan.dense(shape_of(model.config), "test").edit(
        window={"size": 32, "sinks": 4},
        selector={"rank": 4, "rope": "pre", "top_p": 0.5, "granularity": "token", "block": 64, "sinks": 2, "recent": 4},
        layers=[
            {"heads": [1, 0, 0, i % 2], "index": "full"} if i in INDEXED else {"heads": [0, 0, 0, 0]} for i in range(8)
        ],
    )
    torch.manual_seed(0)  # drawn so that sharing first helps and then hurts, as a budget needs it
    tensors = {name: torch.randn(size) for name, size in tensor_names(plan).items()}
    return Program(model, plan, tensors, seed=0)


@pytest.fixture(scope="module")
def search(
    indexed: Program, calibration: Calibration, tiny_options: dict[str, dict[str, Any]]
) -> Callable[..., PassResult]:
    """``search(keep=0.5)``: a short search with these options, without training."""
    short = tiny_options["indexcache"] | {"windows": 1, "documents": 1, "rows": 64, "steps": 0}

    def run(program: Program = indexed, **options: Any) -> PassResult:
        return IndexCache.model_validate(short | options).run(program, calibration)

    return run


def test_reuse_changes_nothing_but_the_work(search: Callable[..., PassResult]) -> None:
    quick = search(keep=0.3)
    plain = search(keep=0.3, reuse=False)
    assert quick.plan == plain.plan
    bare = search(keep=0.3, hold=0)  # candidates start at their own flip, every time
    work = ("layer_evaluations", "layer_tokens")
    # Losses to the last bit: a candidate that is rounded otherwise could be another one's equal.
    for other in (plain, bare):
        assert {k: v for k, v in quick.measured.items() if k not in work} == {
            k: v for k, v in other.measured.items() if k not in work
        }
    assert quick.measured["layer_evaluations"] < bare.measured["layer_evaluations"]
    assert len({loss for flip in quick.measured["flips"] for loss in flip["trials"].values()}) > 6
    assert quick.measured["layer_evaluations"] <= 0.6 * plain.measured["layer_evaluations"]
    assert quick.measured["layer_evaluations_plain"] <= plain.measured["layer_evaluations"]
    assert quick.measured["layer_tokens"] <= 0.25 * quick.measured["layer_tokens_plain"]


def test_a_search_that_was_stopped_continues_behind_its_last_flip(
    search: Callable[..., PassResult], indexed: Program, tmp_path: Path
) -> None:
    whole = search(keep=0.3)

    def stop(event: Event) -> None:
        if event.note.startswith("FSF") or event.note.count("S") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(replace(indexed, scratch=tmp_path, listen=stop), keep=0.3)
    assert len(read_json(tmp_path / "search.json")["flips"]) in (1, 2)
    uninstall(indexed.model)
    heard: list[Event] = []
    again = search(replace(indexed, scratch=tmp_path, listen=heard.append), keep=0.3)
    assert again.plan == whole.plan
    work = ("layer_evaluations", "layer_tokens")  # more: what candidates had computed is not kept
    assert {k: v for k, v in again.measured.items() if k not in work} == {
        k: v for k, v in whole.measured.items() if k not in work
    }
    assert len({event.done for event in heard if event.total}) < whole.measured["candidates"]


def test_a_lazy_search_tries_fewer_candidates_and_each_flip_is_its_best(search: Callable[..., PassResult]) -> None:
    exact, lazy = (search(keep=0.01, order=order) for order in ("exact", "lazy"))
    assert lazy.measured["candidates"] < exact.measured["candidates"]
    assert lazy.measured["flips"][0] == exact.measured["flips"][0]
    for flip in lazy.measured["flips"]:
        assert flip["loss"] == min(flip["trials"].values())


def test_first_layers_and_first_layers_of_stages_keep_their_indexers(search: Callable[..., PassResult]) -> None:
    found = search(keep=0.01, near_full=2)
    assert found.plan.pattern == "FFSSSS"
    assert found.measured["stopped"] == "fixed"
    staged = search(keep=0.01, stages=2)
    kept = [i for i, letter in zip(INDEXED, staged.plan.pattern, strict=True) if letter == "F"]
    assert kept == [min(INDEXED), min(i for i in INDEXED if i >= 4)]
    with pytest.raises(PlanError, match="stages is 99"):
        search(stages=99)


def test_stages_are_divided_as_vllm_does() -> None:
    assert stage_starts(8, 1) == [0]
    assert stage_starts(8, 2) == [0, 4]
    assert stage_starts(30, 4) == [0, 7, 15, 23]  # 7, 8, 8, 7


def test_other_patterns_stand_beside_the_searched_one(search: Callable[..., PassResult]) -> None:
    found = search(keep=0.5).measured
    assert found["others"].keys() == {"one-shot", "uniform", "overlap"}
    assert found["others"]["uniform"]["pattern"] == "FSFSFS"
    for other in found["others"].values():
        assert other["pattern"].count("F") == found["pattern"].count("F")
        assert other["above"] == pytest.approx(other["loss"] - found["loss_after"], abs=1e-6)
        assert other["error"] >= 0
    assert [row[i] for i, row in enumerate(found["overlap"])] == pytest.approx([1.0] * 6)


def test_kept_indexers_are_trained_for_all_they_serve(search: Callable[..., PassResult]) -> None:
    plain = search(keep=0.3)
    found = search(keep=0.3, steps=6, fit_windows=1, fit_rows=64)
    assert found.plan == plain.plan
    assert found.tensors.keys() == plain.tensors.keys()
    assert not any(torch.equal(found.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert found.measured["trained"]["kl_trained"] < found.measured["trained"]["kl_before"]
    served = found.measured["trained"]["serves"]
    assert sorted([*map(int, served), *(layer for layers in served.values() for layer in layers)]) == list(INDEXED)


@pytest.mark.parametrize(("keep", "full"), [(0.01, 1), (0.3, 2), (0.5, 3), (1.0, 6)])
def test_a_target_is_met_and_the_first_indexed_layer_stays_full(
    search: Callable[..., PassResult], indexed: Program, keep: float, full: int
) -> None:
    result = search(keep=keep)
    assert result.plan.pattern.count("F") == full
    assert result.plan.pattern[0] == "F"
    assert result.plan.indexed() == INDEXED
    assert result.measured["stopped"] == "target"
    assert set(result.tensors) == set(tensor_names(result.plan))
    assert all(torch.equal(tensor, indexed.tensors[name]) for name, tensor in result.tensors.items())


def test_every_flip_is_the_one_of_the_lowest_loss(search: Callable[..., PassResult]) -> None:
    flips = search(keep=0.3).measured["flips"]
    left = set(INDEXED[1:])
    for flip in flips:
        assert {int(layer) for layer in flip["trials"]} == left
        assert flip["loss"] == min(flip["trials"].values()) == flip["trials"][str(flip["layer"])]
        left.remove(flip["layer"])


def test_a_budget_is_kept(search: Callable[..., PassResult]) -> None:
    free = search(keep=None, max_loss=10).measured
    assert free["pattern"] == "FSSSSS"
    rises = [flip["loss"] / free["loss_before"] - 1 for flip in free["flips"]]
    assert max(rises) > 0  # else this tests nothing
    for allowed in (0.0, max(rises) / 2):
        found = search(keep=None, max_loss=allowed).measured
        assert found["loss_after"] <= found["loss_before"] * (1 + allowed)
        kept = [flip["loss"] <= free["loss_before"] * (1 + allowed) for flip in free["flips"]]
        assert len(found["flips"]) == kept.index(False)
        assert found["flips"] == free["flips"][: len(found["flips"])]
        assert found["stopped"] == "budget"


def test_one_indexed_layer_has_nothing_to_share(search: Callable[..., PassResult], indexed: Program) -> None:
    layers = [layer.model_dump() for layer in indexed.plan.layers]
    plan = indexed.plan.edit(layers=[{"heads": layer["heads"]} if i else layer for i, layer in enumerate(layers)])
    only = {name: indexed.tensors[name] for name in tensor_names(plan)}
    result = search(Program(indexed.model, plan, only))
    assert result.plan.pattern == "F"
    assert result.measured["flips"] == []


def test_neither_target_nor_budget_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="give keep"):
        make_passes({"rtpurbo": {}, "indexcache": {"keep": None}})


@pytest.mark.parametrize(("given", "share"), [("25%", 0.25), ("0.5%", 0.005), (0.25, 0.25)])
def test_shares_may_be_percents(given: Any, share: float) -> None:
    made: Any = make_passes({"rtpurbo": {}, "indexcache": {"keep": given, "max_loss": given}})[1]
    assert (made.keep, made.max_loss) == (share, share)


def test_a_pattern_written_by_hand_is_taken_and_measured(search: Callable[..., PassResult], indexed: Program) -> None:
    searched = search(keep=0.5)
    signs = iter(searched.plan.pattern)
    whole = "".join(next(signs) if i in INDEXED else "-" for i in range(indexed.plan.model.layers))
    for pattern in (searched.plan.pattern, whole):
        found = search(pattern=pattern)
        assert found.plan.digest == searched.plan.digest
        assert found.measured["stopped"] == "given"
        assert found.measured["loss_after"] == pytest.approx(searched.measured["loss_after"], rel=1e-6)
        assert found.measured["candidates"] == 0


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("FS", "2 letters, the plan has 6 layers with an index"),
        ("SFFFFF", "shares layer 0, below which no layer has an index: begin with F"),
        ("FFFFFFFF", "F for layer 1, which is local or sliding, without one: give it -"),
        ("F-F-FFFF", "- for layer 3, which has an index: give it F or S"),
    ],
)
def test_patterns_that_cannot_hold_are_refused(search: Callable[..., PassResult], pattern: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        search(pattern=pattern)


def test_the_search_stops_where_the_best_two_cannot_be_told_apart(search: Callable[..., PassResult]) -> None:
    flips = search(keep=0.3).measured["flips"]
    leads = [flip["margin"] / flip["error"] for flip in flips if "margin" in flip]
    found = search(keep=0.3, margin=max(leads) + 1).measured
    assert (found["stopped"], found["flips"]) == ("unclear", [])
    assert search(keep=0.3, margin=min(leads) / 2).measured["flips"] == flips


def test_own_indexers_are_trained_at_their_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(indexcache, "train_dsa", lambda *args, lr, **rest: asked.append(lr) or ({}, {}))
    calibration: Any = type("Text", (), {"windows": lambda *args, **options: []})()
    program: Any = type("Given", (), {"seed": 0, "model": None, "listen": None})()
    for given in (None, 2e-3):
        IndexCache(lr=given)._train_own(program, calibration, program, 64)
    assert asked == [1e-3, 2e-3]
