"""Prefill rows of retrieval heads that choose key blocks: the choice, its limits, sharing, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.decode import decode_rows
from sparsec.calibrate.patterns import share, with_pattern
from sparsec.calibrate.prefill_quality import prefill_quality
from sparsec.calibrate.replay import Replay
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.registry import known_passes
from sparsec.export.repeated import chosen_prefill
from sparsec.export.words import percent, runs
from sparsec.passes.base import Program
from sparsec.plan import Plan, Selector
from sparsec.plugins.blocks import choose_blocks, group_numbers, groups_of, kept_keys
from sparsec.plugins.families import shape_of
from sparsec.plugins.runtime import applied, install, new_cache, rows_as, stepping, tensor_names, uninstall
from sparsec.plugins.selector import causal
from sparsec.plugins.step import Selection, Step

HEADS = (1, 0, 0, 1)


@pytest.fixture(scope="module")
def model(small_llama: Callable[..., Any]) -> Any:
    return small_llama(positions=2048)


def tokens(length: int) -> Tensor:
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(1))


def plan_of(model: Any, index: tuple[str, ...] = ("full",) * 4, min_context: int = 0, **selector: Any) -> Plan:
    options = {
        "rank": 8, "rope": "pre", "top_p": 0.5, "granularity": "token", "block": 4, "sinks": 1, "recent": 2,
        "prefill": "selector", "query_block": 8, "scope": "layer",
    }  # fmt: skip
    return Plan.dense(shape_of(model.config), "test").edit(
        layers=[{"heads": HEADS, "index": each} for each in index],
        window={"size": 16, "sinks": 1},
        selector={**options, **selector},
        min_context=min_context,
    )


def tensors_of(plan: Plan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: 0.2 * torch.randn(size, generator=generator) for name, size in tensor_names(plan).items()}


# The choice ------------------------------------------------------------------------------------------------------

SELECTOR = Selector(
    rank=1, rope="pre", top_p=0.6, granularity="token", block=2, sinks=0, recent=0, prefill="selector", query_block=2
)


def chosen(mass: list[list[float]], selector: Selector, min_context: int = 0) -> list[list[int]]:
    """Which key each row sees, for one head with these softmax weights (rows are tokens 0, 1, ...)."""
    weights = torch.tensor(mass)[None, None]
    pos = torch.arange(len(mass))[None]
    numbers = group_numbers(pos, selector, min_context)
    visible = causal(pos, pos)
    groups = groups_of(numbers, 0, len(mass))
    keep = visible
    if groups is not None:
        sets = choose_blocks(weights.log(), numbers, groups, pos, pos, selector)
        keep = kept_keys(sets, groups, pos, visible, selector.block)
    return [row.nonzero()[:, 0].tolist() for row in keep[0, 0]]


# Rows 4 and 5 are one group. Their mean mass of blocks 0, 1, 2 is (0.45, 0.25, 0.3).
MASS = [
    [1.0, 0, 0, 0, 0, 0],
    [0.5, 0.5, 0, 0, 0, 0],
    [0.5, 0.25, 0.25, 0, 0, 0],
    [0.25, 0.25, 0.25, 0.25, 0, 0],
    [0.1, 0.1, 0.2, 0.2, 0.4, 0],
    [0.3, 0.4, 0.05, 0.05, 0.1, 0.1],
]


def test_a_group_keeps_blocks_by_the_mean_of_its_rows_masses() -> None:
    assert chosen(MASS, SELECTOR)[4:] == [[0, 1, 4], [0, 1, 4, 5]]
    assert chosen(MASS, SELECTOR.model_copy(update={"top_p": 0.45}))[4:] == [
        [0, 1, 4],
        [0, 1, 4, 5],
    ]  # own block forced
    assert chosen(MASS, SELECTOR.model_copy(update={"top_p": 0.76}))[4:] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


def test_alone_each_row_chooses_for_itself() -> None:
    assert chosen(MASS, SELECTOR.model_copy(update={"query_block": 1, "top_p": 0.39}))[4:] == [[2, 3, 4], [0, 1, 4, 5]]


def test_sinks_recent_tokens_and_a_floor_keep_whole_blocks() -> None:
    narrow = SELECTOR.model_copy(update={"top_p": 0.01, "block": 1, "query_block": 1})
    assert chosen(MASS, narrow)[5] == [1, 5]
    assert chosen(MASS, narrow.model_copy(update={"sinks": 1}))[5] == [0, 1, 5]
    assert chosen(MASS, narrow.model_copy(update={"recent": 3}))[5] == [1, 3, 4, 5]
    assert chosen(MASS, narrow.model_copy(update={"min_keep": 2}))[5] == [0, 1, 5]
    pairs = SELECTOR.model_copy(update={"top_p": 0.01, "recent": 2})
    assert chosen(MASS, pairs)[4:] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]  # token 3 is recent to row 4 and so its block


def test_rows_of_a_short_context_see_all_and_do_not_vote() -> None:
    assert chosen(MASS, SELECTOR, min_context=6) == [list(range(t + 1)) for t in range(6)]
    # Row 4 is dense; row 5 alone has 0.7 in block 0.
    assert chosen(MASS, SELECTOR.model_copy(update={"top_p": 0.7}), min_context=5)[4:] == [
        [0, 1, 2, 3, 4],
        [0, 1, 4, 5],
    ]


# Whole prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query_block", [1, 8, 64])
def test_all_mass_kept_is_dense(query_block: int, model: Any) -> None:
    ids = tokens(100)[None]
    whole = plan_of(model, top_p=1.0, query_block=query_block).edit(window={"size": 100, "sinks": 0})
    dense = model(ids, use_cache=False).logits
    with applied(model, whole, tensors_of(whole)), rows_as("prefill"):
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("query_block", "sizes"), [(1, (1, 37, 600)), (64, (64, 640))])
def test_tiles_and_chunks_of_a_long_prompt_change_nothing(query_block: int, sizes: tuple[int, ...], model: Any) -> None:
    """1100 rows are three tiles of different chunks; blocks of 24 cut across them."""
    ids = tokens(1100)[None]
    plan = plan_of(model, ("full", "shared", "none", "shared"), 30, query_block=query_block, block=24)
    with applied(model, plan, tensors_of(plan)), rows_as("prefill"):
        whole = model(ids, use_cache=False).logits
        for size in sizes:
            cache, parts, start = new_cache(model), [], 0
            while start < 1100:  # single tokens for a while only
                stop = start + size if size > 1 or 500 < start < 540 else start + 90
                parts.append(model(ids[:, start:stop], past_key_values=cache).logits)
                start = stop
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=2e-4)


def test_groups_that_straddle_tiles_vote_as_one(model: Any) -> None:
    """512 is no multiple of 100: rows 500 .. 599 stand in two tiles."""
    ids = tokens(700)
    plan = plan_of(model, query_block=100, scope="head")
    found: list[Tensor] = []
    with applied(model, plan, tensors_of(plan)), stepping(Step(decode=False, observe_prefill=collect(found))):
        model(ids[None], use_cache=False)
    rows = torch.cat([torch.nn.functional.pad(part, (0, 700 - part.shape[-1])) for part in found[:2]], 2)[0]
    blocks = rows[:, 500:600, ::4]
    settled = blocks[:, :, : 500 // 4]  # blocks that all rows of the group can see
    assert torch.equal(settled, settled[:, :1].expand_as(settled))
    assert not bool(settled.all())


def collect(found: list[Tensor]) -> Any:
    def note(seen: Selection) -> None:
        found.append(seen.keep.expand(-1, len(seen.heads), -1, -1))

    return note


def test_ragged_batches_choose_as_each_row_alone(model: Any) -> None:
    plan = plan_of(model, min_context=5, scope="head")
    ids = torch.zeros(2, 70, dtype=torch.long)
    mask = torch.ones_like(ids)
    ids[0], ids[1, 13:], mask[1, :13] = tokens(70), tokens(57), 0
    with applied(model, plan, tensors_of(plan)), rows_as("prefill"):
        together = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False)
        for row, pad in ((0, 0), (1, 13)):
            alone = model(ids[row : row + 1, pad:], use_cache=False).logits
            torch.testing.assert_close(together.logits[row : row + 1, pad:], alone, atol=1e-4, rtol=1e-4)


def test_prompt_and_decode_rows_run_in_one_call(model: Any) -> None:
    plan = plan_of(model, ("full", "shared", "full", "none"))
    ids = tokens(90)[None]
    with applied(model, plan, tensors_of(plan)):
        cache = new_cache(model)
        parts = [model(ids[:, :60], past_key_values=cache).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(60, 90)]
        with stepping(Step(decode=True, prompt=60)):
            once = model(ids, use_cache=False).logits
    torch.testing.assert_close(once, torch.cat(parts, 1), atol=1e-4, rtol=1e-4)


def test_decode_observers_see_decode_rows_only(model: Any) -> None:
    plan = plan_of(model)
    decode: list[Tensor] = []
    prefill: list[Tensor] = []
    with applied(model, plan, tensors_of(plan)):
        step = Step(decode=True, prompt=60, observe=collect(decode), observe_prefill=collect(prefill))
        with stepping(step):
            model(tokens(90)[None], use_cache=False)
    assert {part.shape[2] for part in decode} == {30}
    assert {part.shape[2] for part in prefill} == {60}


def test_gradients_flow_through_chosen_prefill(model: Any) -> None:
    plan = plan_of(model)
    inputs = model.get_input_embeddings()(tokens(60)[None]).requires_grad_()
    with applied(model, plan, tensors_of(plan)), rows_as("prefill"):
        model(inputs_embeds=inputs, use_cache=False).logits[:, -1].sum().backward()
    assert bool(torch.isfinite(inputs.grad).all())
    assert float(inputs.grad.abs().sum()) > 0


# Searching a sharing pattern -------------------------------------------------------------------------------------


def test_a_replay_whose_prompt_depends_on_the_pattern_equals_a_whole_run(model: Any) -> None:
    ids, prompt = tokens(96), 70
    plan = with_pattern(plan_of(model, scope="head"), {})
    install(model, plan, tensors_of(plan))
    replay = Replay(model, ids, prompt)
    torch.testing.assert_close(replay.losses, decode_rows(model, ids, prompt)[0], atol=1e-4, rtol=1e-4)
    flipped = share(plan, 2)
    install(model, flipped, {name: tensors_of(plan)[name] for name in tensor_names(flipped)})
    replay.state = replay.run(2)
    losses = replay.losses
    torch.testing.assert_close(losses, decode_rows(model, ids, prompt)[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(replay.run(3).losses, losses, atol=1e-5, rtol=1e-5)
    uninstall(model)


# What it costs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tiny_deep: Path) -> tuple[Any, Any, Calibration]:
    model = AutoModelForCausalLM.from_pretrained(tiny_deep).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_deep)
    return model, tokenizer, Calibration(read_corpus(), tokenizer)


def test_quality_is_that_of_the_last_half_of_prefill_rows(text: tuple[Any, Any, Calibration]) -> None:
    model, tokenizer, calibration = text
    plan = plan_of(model, block=8)
    windows = list(calibration.windows("search", 200, 2, seed=0))
    found = prefill_quality(model, plan, tensors_of(plan), tokenizer, windows)
    assert not hasattr(model, "sparsec_plan")
    for kind in ("dense", "selector"):
        bits = size = 0.0
        run = plan.edit(selector={**plan.selector.model_dump(), "prefill": kind})  # type: ignore[union-attr]
        with applied(model, run, tensors_of(plan)), rows_as("prefill"):
            for window in windows:
                logits = model(window[None], use_cache=False).logits[0].log_softmax(-1)
                bits -= float(sum(logits[t, window[t + 1]] for t in range(100, 199))) / math.log(2)
                size += len(tokenizer.decode(window[101:]).encode())
        assert found[kind] == pytest.approx(bits / size, rel=1e-5)
    assert found["loss"] == pytest.approx(found["selector"] / found["dense"] - 1)
    assert found["rows"] == 2 * 99
    assert 0 < found["block_share"] < 1
    assert 0 < found["recall_p5"] <= found["recall_mean"] < 1


def test_keeping_everything_costs_nothing(text: tuple[Any, Any, Calibration]) -> None:
    model, tokenizer, calibration = text
    plan = plan_of(model, top_p=1.0)
    windows = list(calibration.windows("search", 200, 1, seed=0))
    found = prefill_quality(model, plan, tensors_of(plan), tokenizer, windows)
    assert found["loss"] == pytest.approx(0, abs=1e-6)
    assert found["block_share"] == 1.0
    assert found["recall_mean"] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="the plan has none: use a plan with indexers"):
        prefill_quality(model, plan.edit(selector=None, layers=[{"heads": HEADS}] * 4), {}, tokenizer, windows)


def test_rtpurbo_measures_what_it_was_told_to_run_and_the_report_shows_it(
    text: tuple[Any, Any, Calibration], tiny_options: dict[str, dict[str, Any]]
) -> None:
    model, _, calibration = text
    program = Program(model, Plan.dense(shape_of(model.config), "test"), {}, seed=3)
    options = {**tiny_options["rtpurbo"], "block": 8, "query_block": 16, "top_p": 0.3, "min_keep": 0}
    results = {
        kind: known_passes()["rtpurbo"].model_validate({**options, "prefill": kind}).run(program, calibration)
        for kind in ("dense", "selector")
    }
    assert "prefill" not in results["dense"].measured
    found = results["selector"].measured["prefill"]
    assert (found["query_block"], found["block"], found["context"]) == (16, 8, 512)
    assert 0 < found["block_share"] < 1
    plan = results["selector"].plan
    assert (plan.selector.prefill, plan.selector.query_block) == ("selector", 16)  # type: ignore[union-attr]
    alike = plan.edit(selector={**plan.selector.model_dump(), "prefill": "dense"})  # type: ignore[union-attr]
    assert alike.digest == results["dense"].plan.digest
    shown = chosen_prefill(found)
    for words in ("blocks of 8 keys, 16 rows at a time", percent(found["block_share"]), percent(found["recall_mean"])):
        assert words in shown
    assert ("prefill", "16 rows at a time choose blocks of 8 tokens by the same indexers") in runs(plan)
    assert ("prefill", "dense") in runs(alike)
