"""The execution contract, row by row, against an independent reference: loops, float64, masks written out."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

import sparsec
from sparsec.calibrate.decode_bytes import resident_bytes
from sparsec.errors import UsageError
from sparsec.plan import ModelShape, Plan
from sparsec.plugins.kernels import support
from sparsec.plugins.kernels.support import chosen, reason_against
from sparsec.plugins.runtime import (
    added_tensors,
    applied,
    install,
    kv_bytes,
    new_cache,
    rows_as,
    tensor_names,
    uninstall,
    use_kernels,
)

SHAPE = ModelShape(model_type="llama", layers=4, heads=6, kv_heads=3, head_dim=16)
HEADS = ((1, 1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0), (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 1, 0))
WINDOW, SINKS, PROMPT, TOTAL = 8, 2, 40, 60


def make_plan(
    index: tuple[str, ...] = ("full", "shared", "none", "full"),
    heads: tuple[tuple[int, ...], ...] = HEADS,
    window: int = WINDOW,
    min_context: int = 0,
    compensate: bool = False,
    **selector: Any,
) -> Plan:
    options = {"rank": 4, "rope": "pre", "top_p": 0.6, "granularity": "token", "block": 4, "sinks": 1, "recent": 2}
    return Plan.parse(
        {
            "producer": "test",
            "model": SHAPE.model_dump(),
            "window": {"size": window, "sinks": SINKS, "compensate": compensate},
            "selector": {**options, "scope": "layer", **selector},
            "min_context": min_context,
            "layers": [{"heads": h, "index": i} for h, i in zip(heads, index, strict=True)],
        }
    )


def make_tensors(plan: Plan, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(size, generator=generator) for name, size in tensor_names(plan).items()}


PLANS = {
    "shared index": make_plan(),
    "a set a head": make_plan(index=("full", "full", "none", "full"), scope="head"),
    "blocks": make_plan(granularity="block"),
    "after RoPE": make_plan(rope="post"),
    "a floor": make_plan(top_p=0.2, min_keep=6),
    "a floor of blocks": make_plan(top_p=0.2, min_keep=6, granularity="block"),
    "short contexts dense": make_plan(min_context=25),
    "crossing while decoding": make_plan(min_context=50),
    "no selector": make_plan(index=("none",) * 4),
    "compensated": make_plan(index=("none",) * 4, compensate=True),
    "compensated from here on": make_plan(min_context=25, compensate=True),
    "compensated while decoding": make_plan(min_context=50, compensate=True),
    "query blocks": make_plan(prefill="selector", query_block=8),
    "single queries": make_plan(prefill="selector", query_block=1, recent=0, sinks=0),
    "query blocks, a set a head": make_plan(
        index=("full", "full", "none", "full"), scope="head", prefill="selector", query_block=5, block=3, min_keep=4
    ),
    "query blocks after RoPE from here on": make_plan(
        prefill="selector", query_block=8, rope="post", min_context=18, compensate=True
    ),
    "query blocks of which some rows vote": make_plan(prefill="selector", query_block=8, vote_every=3, min_context=18),
    "index keys in fp8": make_plan(index_dtype="fp8"),
    "index keys in fp8, blocks in prefill too": make_plan(
        index=("full", "full", "none", "full"),
        scope="head",
        granularity="block",
        rope="post",
        prefill="selector",
        query_block=8,
        index_dtype="fp8",
    ),
    "a coarse level": make_plan(granularity="block", coarse={"min_context": 45, "one_in": 4}),
    "a coarse level, a set a head": make_plan(
        index=("full", "full", "none", "full"),
        scope="head",
        granularity="block",
        min_keep=9,
        top_p=0.8,
        recent=0,
        sinks=0,
        index_dtype="fp8",
        coarse={"min_context": 0, "one_in": 3},
    ),
}
ANY_CHUNK = ("short contexts dense", "compensated", "compensated from here on", "single queries")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=None,
    )
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.mul_(6)  # sharp attention, so that a wrong mask shows
    return made


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 97, (2, TOTAL), generator=torch.Generator().manual_seed(1))


# The reference ---------------------------------------------------------------------------------------------------


def naive_keep(scores: Tensor, t: int, plan: Plan) -> set[int]:
    """Tokens that one retrieval head keeps at row t: scores float64 [t + 1]."""
    selector = plan.selector
    assert selector is not None
    if t + 1 <= plan.min_context:
        return set(range(t + 1))
    weights = torch.softmax(scores, 0)
    units = [[j] for j in range(t + 1)]
    if selector.granularity == "block":
        units = [list(range(b, min(b + selector.block, t + 1))) for b in range(0, t + 1, selector.block)]
    mass = [float(weights[unit].sum()) for unit in units]
    forced = {*range(min(selector.sinks, t + 1)), *range(max(0, t + 1 - selector.recent), t + 1)}
    forced = {j for unit in units if forced & set(unit) for j in unit}
    kept, total, last = set(forced), 0.0, 0.0
    for place in sorted(range(len(units)), key=lambda i: -mass[i]):
        if total >= selector.top_p and mass[place] < last * (1 - 1e-4):
            break
        kept |= set(units[place])
        total, last = total + mass[place], mass[place] if total < selector.top_p else last
    far = [float(sum(weights[j] for j in unit if j not in forced)) for unit in units]
    least = -(-selector.min_keep // (selector.block if selector.granularity == "block" else 1))
    edge = sorted(far, reverse=True)[min(least, len(far)) - 1] if least else float("inf")
    for unit, mass_far in zip(units, far, strict=True):
        if mass_far > 0 and mass_far >= edge * (1 - 1e-4):
            kept |= set(unit)
    return kept


def naive_blocks(mass: dict[int, Tensor], plan: Plan) -> set[int]:
    """Tokens that one retrieval head keeps for a group of prefill rows: float64 softmax weights [t + 1] by row t."""
    selector = plan.selector
    assert selector is not None
    size, rows = selector.block, sorted(mass)
    blocks, votes = range(rows[-1] // size + 1), rows[:: selector.vote_every]
    share = [sum(float(mass[t][b * size : (b + 1) * size].sum()) for t in votes) / len(votes) for b in blocks]
    forced = {j // size for j in range(min(selector.sinks, rows[-1] + 1))}
    for t in rows:
        forced |= {j // size for j in range(max(0, t - max(selector.recent, 1) + 1), t + 1)}
    kept, total, last = set(forced), 0.0, 0.0
    for b in sorted(blocks, key=lambda b: -share[b]):
        if total >= selector.top_p and share[b] < last * (1 - 1e-4):
            break
        kept.add(b)
        total, last = total + share[b], share[b] if total < selector.top_p else last
    far = sorted((b for b in blocks if b not in forced and share[b] > 0), key=lambda b: -share[b])
    kept |= set(far[: -(-selector.min_keep // size)])
    return {j for b in kept for j in range(b * size, (b + 1) * size)}


def naive_fp8(key: Tensor) -> Tensor:
    """An index key in e4m3, under the power of two that brings its largest number into [128, 256)."""
    scale = 2.0 ** (math.floor(math.log2(float(key.abs().max()))) - 7)
    out = []
    for number in (key / scale).tolist():
        step = 2.0 ** (max(math.floor(math.log2(abs(number))), -6) - 3) if number else 1.0
        out.append(round(number / step) * step)  # Python rounds halves to the even one
    return torch.tensor(out, dtype=torch.float64) * scale


def naive_beside(keys: Tensor, query: Tensor, plan: Plan) -> list[int]:
    """Tokens that a coarse level leaves out of the row that sees these keys: float64 [t + 1, rank]."""
    how, n = plan.selector, len(keys)
    assert how is not None
    assert how.coarse is not None
    if n <= how.coarse.min_context:
        return []
    blocks = [list(range(b, min(b + how.block, n))) for b in range(0, n, how.block)]
    kept = {j // how.block for j in range(n) if j < how.sinks or n - 1 - j < how.recent} | {len(blocks) - 1}
    mean = {b: float(keys[block].mean(0) @ query) for b, block in enumerate(blocks) if b not in kept}
    edge = sorted(mean.values(), reverse=True)[min(-(-len(blocks) // how.coarse.one_in), len(mean)) - 1]
    kept |= {b for b in mean if mean[b] >= edge - 1e-4}
    return [j for b, block in enumerate(blocks) if b not in kept for j in block]


@contextmanager
def reference(model: Any, plan: Plan, tensors: dict[str, Tensor], prompt: int) -> Iterator[None]:
    """The model with attention written out from the plan; rows from ``prompt`` on are decode rows."""
    group = plan.model.group
    before: dict[tuple[int, str], Tensor] = {}
    sets: dict[tuple[int, int, int], set[int]] = {}  # (layer, batch, row)

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        i = module.layer_idx
        layer, out = plan.layers[i], torch.zeros_like(q, dtype=torch.float64)
        rows = q.shape[2]
        seen_q = before[i, "q"] if plan.selector and plan.selector.rope == "pre" else q
        seen_k = before[i, "k"] if plan.selector and plan.selector.rope == "pre" else k
        chooses = plan.selector is not None and plan.selector.prefill == "selector" and layer.index != "none"

        def scores(b: int, t: int, place: int, h: int) -> Tensor:
            wq, wk = (
                tensors[f"model.layers.{i}.self_attn.indexer.{p}.weight"][place].double() for p in ("q_proj", "k_proj")
            )
            keys = seen_k[b, h // group, : t + 1].double() @ wk.T
            if plan.selector.index_dtype == "fp8":  # type: ignore[union-attr]
                keys = torch.stack([naive_fp8(key) for key in keys])
            query = wq @ seen_q[b, h, t].double()
            found = keys @ query
            if t >= prompt and plan.selector.coarse is not None:  # type: ignore[union-attr]
                found[naive_beside(keys, query, plan)] = float("-inf")
            return found

        for b in range(q.shape[0]):
            for t in range(rows):
                per_head: dict[int, set[int]] = {}
                if t >= prompt and layer.index == "full":
                    for place, h in enumerate(layer.retrieval):
                        per_head[h] = naive_keep(scores(b, t, place, h), t, plan)
                    sets[i, b, t] = set().union(*per_head.values())
                elif chooses and layer.index == "full":
                    block = t // plan.selector.query_block  # type: ignore[union-attr]
                    together = [
                        u
                        for u in range(min(rows, prompt))
                        if u // plan.selector.query_block == block and u >= plan.min_context  # type: ignore[union-attr]
                    ]
                    for place, h in enumerate(layer.retrieval):
                        if t < plan.min_context:
                            per_head[h] = set(range(t + 1))
                        else:
                            mass = {u: torch.softmax(scores(b, u, place, h), 0) for u in together}
                            per_head[h] = naive_blocks(mass, plan) & set(range(t + 1))
                    sets[i, b, t] = set().union(*per_head.values())
                for h in range(q.shape[1]):
                    if h in layer.local:
                        near = (
                            range(t + 1) if t + 1 <= plan.min_context else range(max(0, t - window_of(plan) + 1), t + 1)
                        )
                        allowed = set(near) | set(range(min(plan.window.sinks, t + 1)))  # type: ignore[union-attr]
                    elif (t >= prompt or chooses) and layer.index != "none":
                        shared = sets[plan.index_source(i), b, t]
                        allowed = per_head[h] if plan.selector.scope == "head" else shared  # type: ignore[union-attr]
                    else:
                        allowed = set(range(t + 1))
                    at = torch.tensor(sorted(allowed))
                    keys, values = k[b, h // group, at].double(), v[b, h // group, at].double()
                    gone = [j for j in range(t + 1) if j not in allowed]
                    extra = torch.zeros(len(at), dtype=torch.float64)
                    if h in layer.local and gone and plan.window.compensate:  # type: ignore[union-attr]
                        assert gone == list(range(SINKS, t - window_of(plan) + 1))
                        keys = torch.cat((keys, k[b, h // group, gone].double().mean(0, keepdim=True)))
                        values = torch.cat((values, v[b, h // group, gone].double().mean(0, keepdim=True)))
                        extra = torch.cat((extra, torch.tensor([len(gone)]).double().log()))
                    out[b, h, t] = torch.softmax(keys @ q[b, h, t].double() * scaling + extra, 0) @ values
        return out.to(q.dtype).transpose(1, 2), None

    AttentionInterface.register("contract_reference", attention)
    AttentionMaskInterface.register("contract_reference", sdpa_mask)
    hooks = []
    for i, block in enumerate(model.model.layers):
        for part in "qk":

            def note(module: Any, args: Any, out: Tensor, i: int = i, part: str = part) -> None:
                before[i, part] = out.view(*out.shape[:2], -1, plan.model.head_dim).transpose(1, 2)

            hooks.append(getattr(block.self_attn, f"{part}_proj").register_forward_hook(note))
    kind = model.config._attn_implementation
    model.set_attn_implementation("contract_reference")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(kind)


def window_of(plan: Plan) -> int:
    assert plan.window is not None
    return plan.window.size


def decode_steps(model: Any, ids: Tensor, prompt: int, cache: Any, **mask: Tensor) -> Tensor:
    """Logits of prefill and single decode steps, one after another."""

    def part(start: int, stop: int) -> dict[str, Tensor]:
        cut = {"attention_mask": mask["attention_mask"][:, :stop]} if mask else {}
        if mask:
            cut["position_ids"] = mask["position_ids"][:, start:stop]
        return cut

    found = [model(ids[:, :prompt], past_key_values=cache, **part(0, prompt)).logits]
    for i in range(prompt, ids.shape[1]):
        found.append(model(ids[:, i : i + 1], past_key_values=cache, **part(i, i + 1)).logits)
    return torch.cat(found, 1)


# Prefill and decode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_prefill_and_decode_equal_the_reference(name: str, model: Any, ids: Tensor) -> None:
    plan = PLANS[name]
    tensors = make_tensors(plan)
    with reference(model, plan, tensors, PROMPT):
        expected = model(ids, use_cache=False).logits
    dense = model(ids, use_cache=False).logits
    with applied(model, plan, tensors):
        found = decode_steps(model, ids, PROMPT, new_cache(model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - dense).abs().max() > 1e-2  # the plan did something


@pytest.mark.parametrize("name", PLANS)
def test_a_chunk_of_decode_rows_equals_single_steps(name: str, model: Any, ids: Tensor) -> None:
    plan = PLANS[name]
    with applied(model, plan, make_tensors(plan)):
        steps = decode_steps(model, ids, PROMPT, new_cache(model))[:, PROMPT:]
        cache = new_cache(model)
        model(ids[:, :PROMPT], past_key_values=cache)
        with rows_as("decode"):
            chunk = model(ids[:, PROMPT:], past_key_values=cache).logits
    torch.testing.assert_close(chunk, steps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ANY_CHUNK)
@pytest.mark.parametrize("size", [1, 3, 7, 8, 13, 39])
def test_prefill_does_not_depend_on_the_chunk_size(size: int, name: str, model: Any, ids: Tensor) -> None:
    prefill_in_chunks(PLANS[name], size, model, ids)


@pytest.mark.parametrize("size", [8, 16, 24])
def test_query_blocks_do_not_depend_on_chunks_that_begin_with_one(size: int, model: Any, ids: Tensor) -> None:
    prefill_in_chunks(PLANS["query blocks"], size, model, ids)


def prefill_in_chunks(plan: Plan, size: int, model: Any, ids: Tensor) -> None:
    """In one call, and in calls of so many tokens: the same."""
    with applied(model, plan, make_tensors(plan)), rows_as("prefill"):
        whole = model(ids, use_cache=False).logits
        cache, parts = new_cache(model), []
        for start in range(0, TOTAL, size):
            parts.append(model(ids[:, start : start + size], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_identity_plan_equals_dense_in_prefill_and_decode(model: Any, ids: Tensor) -> None:
    dense = model(ids, use_cache=False).logits
    plan = make_plan(index=("full", "full", "none", "full"), window=TOTAL, top_p=1.0)
    with applied(model, plan, make_tensors(plan)):
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decode_steps(model, ids, PROMPT, new_cache(model)), dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids, use_cache=False).logits, dense)  # and uninstalled without trace


def test_min_context_as_long_as_the_text_is_dense(model: Any, ids: Tensor) -> None:
    dense = model(ids, use_cache=False).logits
    plan = make_plan(min_context=TOTAL)
    with applied(model, plan, make_tensors(plan)):
        torch.testing.assert_close(decode_steps(model, ids, PROMPT, new_cache(model)), dense, atol=1e-5, rtol=1e-5)


PADDED = {
    "selected": make_plan(min_context=12),
    "compensated": make_plan(min_context=12, compensate=True),
    "query blocks": make_plan(min_context=12, prefill="selector", query_block=4),
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("pads", [(5, 0), (0, 3), (11, 4)])
def test_padding_on_the_left_changes_nothing(pads: tuple[int, int], name: str, model: Any, ids: Tensor) -> None:
    plan = PADDED[name]
    most = max(pads)
    padded = torch.zeros(2, most + TOTAL, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, count in enumerate(pads):  # rows of different lengths: what is cut off is at the end
        padded[row, most - most + count : count + TOTAL] = ids[row]
        padded[row, count + TOTAL :] = 5
        mask[row, count:] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with applied(model, plan, make_tensors(plan)):
        alone = [decode_steps(model, ids[row : row + 1], PROMPT - 11, new_cache(model)) for row in range(2)]
        together = []
        for row in range(2):
            prompt = PROMPT - 11 + pads[row]
            inputs = {"attention_mask": mask[row : row + 1], "position_ids": positions[row : row + 1]}
            together.append(decode_steps(model, padded[row : row + 1], prompt, new_cache(model), **inputs))
    for row in range(2):
        found = together[row][:, pads[row] : pads[row] + TOTAL]
        torch.testing.assert_close(found, alone[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PADDED)
def test_a_batch_of_unequal_prompts_generates_what_each_does_alone(name: str, model: Any, ids: Tensor) -> None:
    plan = PADDED[name]
    first, second = ids[:1, :37], ids[1:, :25]
    batch = torch.zeros(2, 37, dtype=torch.long)
    mask = torch.zeros_like(batch)
    batch[0], mask[0] = first[0], 1
    batch[1, 12:], mask[1, 12:] = second[0], 1
    with applied(model, plan, make_tensors(plan)):
        both = model.generate(batch, attention_mask=mask, max_new_tokens=16, do_sample=False)
        for row, prompt in enumerate((first, second)):
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
            assert torch.equal(both[row, -16:], alone[0, -16:])


@pytest.mark.parametrize(
    "plan",
    [make_plan(), make_plan(compensate=True), make_plan(prefill="selector", query_block=1)],
    ids=["windowed", "compensated", "single queries"],
)
def test_padding_in_the_middle_of_a_conversation_changes_nothing(plan: Plan, model: Any, ids: Tensor) -> None:
    row = ids[:1]
    gap = torch.cat((row[:, :30], torch.zeros(1, 7, dtype=torch.long), row[:, 30:]), 1)
    mask = torch.ones_like(gap)
    mask[:, 30:37] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with applied(model, plan, make_tensors(plan)), rows_as("prefill"):
        plain = model(row, use_cache=False).logits
        cache = new_cache(model)
        for start, stop in ((0, 37), (37, 50), (50, 67)):
            out = model(
                gap[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
            )
    torch.testing.assert_close(out.logits[:, -17:], plain[:, -17:], atol=1e-4, rtol=1e-4)


# Memory ----------------------------------------------------------------------------------------------------------


def test_local_kv_heads_hold_sinks_and_window_only(model: Any, ids: Tensor) -> None:
    plan = make_plan(index=("none",) * 4, heads=((0,) * 6,) * 4)
    with applied(model, plan):
        cache = new_cache(model)
        decode_steps(model, ids, PROMPT, cache)
        for layer in cache.layers:
            assert layer.full_keys is None
            assert layer.local.keys.shape == (2, 3, SINKS + WINDOW, 16)
            held = layer.local.pos[0].sort().values.tolist()
            assert held == [0, 1, *range(TOTAL - WINDOW, TOTAL)]
        assert cache.get_seq_length() == TOTAL
        per_token = 2 * 3 * 16 * 4 * 2 * SHAPE.layers  # keys and values, heads, dim, bytes, rows
        positions = 2 * (SINKS + WINDOW) * 8 * SHAPE.layers
        assert kv_bytes(cache) == (SINKS + WINDOW) * per_token + positions


def test_bytes_follow_the_plan_head_by_head(model: Any, ids: Tensor) -> None:
    plan = make_plan()
    with applied(model, plan, make_tensors(plan)):
        cache = new_cache(model)
        decode_steps(model, ids, PROMPT, cache)
        for layer, planned in zip(cache.layers, plan.layers, strict=True):
            local = planned.local_kv_heads(SHAPE.group)
            full = SHAPE.kv_heads - len(local)
            assert (layer.full_keys is None) == (full == 0)
            if full:
                assert layer.full_keys.shape == (2, full, TOTAL, 16)
            assert (layer.index_keys is not None) == (planned.index == "full")
            if planned.index == "full":
                assert layer.index_keys.shape == (2, len(planned.retrieval), TOTAL, 4)


def test_index_keys_in_fp8_take_a_byte_a_number_and_one_for_the_scale(model: Any, ids: Tensor) -> None:
    pytest.importorskip("triton")
    held = {}
    for dtype in ("model", "fp8"):
        plan, on = make_plan(index_dtype=dtype), copy.deepcopy(model).to(DEVICE)
        heads = sum(len(layer.retrieval) for layer in plan.layers if layer.index == "full")
        with applied(on, plan, make_tensors(plan)):
            for kernels in ("reference", "triton"):
                cache = new_cache(on, kernels)  # type: ignore[arg-type]
                decode_steps(on, ids[:, :42].to(DEVICE), 41, cache)
                held[dtype, kernels] = kv_bytes(cache)
    assert held["model", "reference"] - held["fp8", "reference"] == 2 * heads * 42 * (4 * 4 - 5)
    slots = 2048 + 1
    assert held["model", "triton"] - held["fp8", "triton"] == 2 * heads * slots * (4 * 4 - 5)
    assert resident_bytes(make_plan(index_dtype="fp8"), 42, 4)["index"] == heads * 42 * 5


# GQA -------------------------------------------------------------------------------------------------------------


def permuted(model: Any, order: list[int]) -> Any:
    """The same function with KV heads (and their query heads) in another order."""
    other = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    query = [2 * kv + place for kv in order for place in range(2)]
    for block in other.model.layers:
        attention = block.self_attn
        for name, heads in (("q_proj", query), ("k_proj", order), ("v_proj", order)):
            weight = getattr(attention, name).weight
            weight.copy_(weight.view(-1, 16, weight.shape[1])[heads].flatten(0, 1))
        output = attention.o_proj.weight
        output.copy_(output.view(output.shape[0], -1, 16)[:, query].flatten(1))
    return other


def test_permuted_groups_with_the_plan_permuted_alike_give_the_same(model: Any, ids: Tensor) -> None:
    order = [2, 0, 1]
    query = [2 * kv + place for kv in order for place in range(2)]
    plan = make_plan()
    tensors = make_tensors(plan)
    moved = plan.edit(
        layers=[{"heads": [layer.heads[h] for h in query], "index": layer.index} for layer in plan.layers]  # type: ignore[index]
    )
    renamed = {}
    for i, layer in enumerate(plan.layers):
        if layer.index == "full":
            rows = [layer.retrieval.index(h) for h in query if h in layer.retrieval]
            for part in ("q_proj", "k_proj"):
                name = f"model.layers.{i}.self_attn.indexer.{part}.weight"
                renamed[name] = tensors[name][rows]
    other = permuted(model, order)
    with applied(model, plan, tensors), applied(other, moved, renamed):
        expected = decode_steps(model, ids, PROMPT, new_cache(model))
        found = decode_steps(other, ids, PROMPT, new_cache(other))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with applied(other, plan, tensors):
        wrong = decode_steps(other, ids, PROMPT, new_cache(other))
    assert (wrong - expected).abs().max() > 1e-2


# Transformers' way of doing things -------------------------------------------------------------------------------


def test_generate_equals_a_loop_of_steps(model: Any, ids: Tensor) -> None:
    plan = make_plan()
    prompt = ids[:, :30]
    with applied(model, plan, make_tensors(plan)):
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
        cache, tokens = new_cache(model), prompt
        logits = model(tokens, past_key_values=cache).logits
        for _ in range(20):
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
            logits = model(tokens[:, -1:], past_key_values=cache).logits
    assert torch.equal(found, tokens)


def test_several_turns_on_one_cache_equal_one_long_conversation(model: Any, ids: Tensor) -> None:
    plan = make_plan()
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    with applied(model, plan, make_tensors(plan)):
        cache = DynamicCache(config=model.config)  # the caller's own object
        first = model.generate(ids[:1, :20], past_key_values=cache, **options).sequences
        assert cache.get_seq_length() == 25
        second_in = torch.cat((first, ids[:1, 20:30]), 1)
        second = model.generate(second_in, past_key_values=cache, **options).sequences
        again, tokens = new_cache(model), second[:, :-1]
        with rows_as("prefill"):
            model(tokens[:, :20], past_key_values=again)
        for i in range(20, 25):
            model(tokens[:, i : i + 1], past_key_values=again)
        logits = [model(tokens[:, 25:36], past_key_values=again).logits[:, -1:]]
        for i in range(36, tokens.shape[1]):
            logits.append(model(tokens[:, i : i + 1], past_key_values=again).logits)
    assert torch.equal(torch.cat(logits, 1).argmax(-1), second[:, -6:])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5, "temperature": 0.9},
        {"num_return_sequences": 3, "do_sample": True},
        {"prefill_chunk_size": 7, "do_sample": False},
    ],
    ids=["beams", "sampling", "several samples", "chunked prefill"],
)
def test_generation_options_work_as_with_an_identity_plan(options: dict[str, Any], model: Any, ids: Tensor) -> None:
    prompt = ids[:, :29]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, **options}
    plan = make_plan(index=("full", "full", "none", "full"), window=TOTAL, top_p=1.0)
    torch.manual_seed(5)
    expected = model.generate(prompt, **arguments)
    with applied(model, plan, make_tensors(plan)):
        torch.manual_seed(5)
        assert torch.equal(model.generate(prompt, **arguments), expected)
    with applied(model, make_plan(), make_tensors(make_plan())):
        assert model.generate(prompt, **arguments).shape == expected.shape


def test_what_a_plan_cannot_run_is_refused_with_a_reason(model: Any, ids: Tensor) -> None:
    plan = make_plan()
    with applied(model, plan, make_tensors(plan)):
        with pytest.raises(ValueError, match="2-D padding masks"):
            model(ids, attention_mask=torch.zeros(2, 1, TOTAL, TOTAL), use_cache=False)
        with pytest.raises(ValueError, match="not packed"):
            model(ids, position_ids=torch.arange(30).repeat(2)[None], use_cache=False)
        with pytest.raises(ValueError, match="default cache"):
            model.generate(ids, max_new_tokens=2, cache_implementation="static")
        cache = new_cache(model)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(5)
    dense_cache = DynamicCache(config=model.config)
    model(ids, past_key_values=dense_cache)
    with applied(model, plan, make_tensors(plan)), pytest.raises(ValueError, match="filled by a dense model"):
        model(ids[:, :1], past_key_values=dense_cache)


# Save and load ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, Tensor, Tensor]:
    """An artifact's model files, inputs, and logits under the plan and dense."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3,
        head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    folder = make_checkpoint(config)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(3, 250, (1, TOTAL))
    dense = model(tokens, use_cache=False).logits
    plan = make_plan()
    install(model, plan, make_tensors(plan))
    sparse = decode_steps(model, tokens, PROMPT, new_cache(model))
    model.save_pretrained(tmp_path / "saved")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    torch.save({"tokens": tokens, "sparse": sparse, "dense": dense}, tmp_path / "expected.pt")
    uninstall(model)
    return tmp_path / "saved", tmp_path / "expected.pt", sparse, dense


def run_python(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "how", ["sparsec.load(sys.argv[1]).model", "AutoModelForCausalLM.from_pretrained(sys.argv[1])"]
)
def test_a_fresh_process_computes_the_same(saved: Any, how: str) -> None:
    folder, expected, *_ = saved
    code = f"""
import sys, torch, sparsec
from transformers import AutoModelForCausalLM
model, expected = {how}, torch.load(sys.argv[2])
tokens, cache = expected["tokens"], sparsec.new_cache(model)
with torch.no_grad():
    found = [model(tokens[:, :{PROMPT}], past_key_values=cache).logits]
    for i in range({PROMPT}, {TOTAL}):
        found.append(model(tokens[:, i : i + 1], past_key_values=cache).logits)
print(float((torch.cat(found, 1) - expected["sparse"]).abs().max()))
"""
    assert float(run_python(code, folder, expected)) < 1e-5


def test_stock_transformers_opens_an_artifact_as_the_dense_model(saved: Any) -> None:
    folder, expected, sparse, dense = saved
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model, expected = AutoModelForCausalLM.from_pretrained(sys.argv[1]), torch.load(sys.argv[2])
assert "sparsec" not in sys.modules
with torch.no_grad():
    print(float((model(expected["tokens"]).logits - expected["dense"]).abs().max()))
"""
    assert float(run_python(code, folder, expected)) < 1e-5
    assert (sparse - dense).abs().max() > 1e-3


def test_the_facade_loads_lazily() -> None:
    code = "import sys, sparsec; print('torch' in sys.modules, 'click' in sys.modules); sparsec.load"
    assert run_python(code).split() == ["False", "False"]
    assert set(sparsec.__all__) == {name for name in sparsec.__all__ if getattr(sparsec, name, None) is not None}


def test_added_tensors_round_trip(model: Any) -> None:
    plan = make_plan()
    tensors = make_tensors(plan)
    with applied(model, plan, tensors):
        found = added_tensors(model)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


# The same on the kernels -------------------------------------------------------------------------------------------


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # a CPU runs them in Triton's interpreter


@torch.no_grad()
def generated(model: Any, ids: Tensor, mask: Tensor | None, kernels: Any, chunks: list[int]) -> tuple[Tensor, Any]:
    """Logits of a prompt in chunks and three decode steps, and the cache."""
    cache, at, logits = new_cache(model, kernels), 0, []
    for rows in [*chunks, 1, 1, 1]:
        until = slice(at, at + rows)
        more: dict[str, Any] = {}
        if mask is not None:
            seen = mask[:, : at + rows]
            more = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp_min(0)[:, at:]}
        kind: Any = "prefill" if at < sum(chunks) else "decode"
        with rows_as(kind):
            logits.append(model(ids[:, until], past_key_values=cache, use_cache=True, **more).logits)
        at += rows
    return torch.cat(logits, 1), cache


ON_KERNELS = {
    **{name: PLANS[name] for name in ("shared index", "a set a head", "blocks", "after RoPE", "no selector")},
    **{name: PLANS[name] for name in ("crossing while decoding", "query blocks")},
    "query blocks of which some rows vote": PLANS["query blocks of which some rows vote"],
    "index keys in fp8": PLANS["index keys in fp8"],
    "a coarse level": make_plan(granularity="block", coarse={"min_context": 28, "one_in": 3}),
    "a coarse level, a set a head": PLANS["a coarse level, a set a head"],
    "index keys in fp8, blocks": make_plan(
        granularity="block", prefill="selector", query_block=8, index_dtype="fp8", min_keep=6
    ),
    "query blocks behind a dense beginning": make_plan(min_context=12, prefill="selector", query_block=4),
}


@pytest.mark.parametrize("name", ON_KERNELS)
def test_kernels_equal_the_reference_under_a_plan(name: str, model: Any) -> None:
    """Prompt in chunks, so that the ring is read back; one of two sequences is padded on the left."""
    pytest.importorskip("triton")
    plan, model = ON_KERNELS[name], copy.deepcopy(model).to(DEVICE)
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with applied(model, plan, make_tensors(plan)):
        true, _ = generated(model, ids, mask, "reference", [16, 8, 3])
        found, cache = generated(model, ids, mask, "triton", [16, 8, 3])
    real = mask[:, : true.shape[1]].bool()
    assert torch.allclose(found[real], true[real], atol=2e-5), float((found - true)[real].abs().max())
    assert kv_bytes(cache) > 0
    assert cache.get_seq_length() == 30


def test_steps_as_a_graph_write_what_single_calls_write(model: Any) -> None:
    from sparsec.plugins.kernels.graph import DecodeGraph

    plan, model = ON_KERNELS["shared index"], copy.deepcopy(model).to(DEVICE)
    ids = torch.randint(1, 97, (1, 20), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    with applied(model, plan, make_tensors(plan)), torch.no_grad():
        cache, reference = new_cache(model, "triton"), new_cache(model, "reference")
        token = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        model(ids, past_key_values=reference, use_cache=True)
        steps, found, true = DecodeGraph(model, cache, token, room=3), [], []
        for _ in range(3):
            found.append(int(steps()))
            token = model(token, past_key_values=reference, use_cache=True).logits[:, -1:].argmax(-1)
            true.append(int(token))
        assert found == true
        assert cache.get_seq_length() == 23
        others = DecodeGraph(model, cache, token, room=1)
        model(token, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="something else"):
            others()
        with pytest.raises(ValueError, match="full"):
            steps()
        with pytest.raises(ValueError, match="new_cache"):
            DecodeGraph(model, reference, token, room=1)


def test_who_runs_what(model: Any) -> None:
    pytest.importorskip("triton")
    plan = PLANS["blocks"]
    cpu = torch.device("cpu")
    assert chosen("reference", plan, DEVICE, torch.float32) is False
    assert chosen("triton", plan, DEVICE, torch.float32) is True
    assert chosen("auto", plan, cpu, torch.float32) is False
    assert "float64" in str(reason_against(plan, DEVICE, torch.float64))
    for name, words in (("compensated", "compensates"), ("query blocks, a set a head", "blocks of 2, 4, 8")):
        with applied(model, PLANS[name], make_tensors(PLANS[name])), pytest.raises(UsageError, match=words):
            use_kernels(model, "triton")


def test_auto_says_once_why_the_reference_runs(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    plan = make_plan(compensate=True, window=5)  # of this test alone: a reason is said once a process
    support._warn.cache_clear()
    for _ in range(2):
        assert chosen("auto", plan, torch.device("cuda"), torch.float32) is False
    assert [record.message for record in caplog.records] == [
        "sparsec runs the reference, which is slow: "
        "the plan's window compensates for what it drops: only the reference does that"
    ]


def test_a_filled_cache_of_another_kind_is_refused(model: Any) -> None:
    """A layer called by itself, past the hook that fills caches: attention over the new rows alone would be wrong."""
    with applied(model, PLANS["no selector"], make_tensors(PLANS["no selector"])):
        hidden = torch.randn(1, 4, model.config.hidden_size)
        rope = model.model.rotary_emb(hidden, torch.arange(4)[None])
        cache = DynamicCache(config=model.config)
        with pytest.raises(ValueError, match="no plan filled"):
            model.model.layers[0](hidden, past_key_values=cache, position_embeddings=rope)


def test_several_decode_rows_at_once_are_the_references_business(model: Any) -> None:
    pytest.importorskip("triton")
    plan, model = PLANS["no selector"], copy.deepcopy(model).to(DEVICE)
    ids = torch.randint(1, 97, (1, 12)).to(DEVICE)
    with applied(model, plan, make_tensors(plan)):
        cache = new_cache(model, "triton")
        with rows_as("prefill"):
            model(ids[:, :8], past_key_values=cache, use_cache=True)
        with rows_as("decode"), pytest.raises(ValueError, match="reference"):
            model(ids[:, 8:], past_key_values=cache, use_cache=True)
