"""Plans of the contract tests, and the independent reference: loops, float64, masks written out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

from sparsec.plan import ModelShape, Plan
from sparsec.plugins.runtime import (
    tensor_names,
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
    "a set a KV head": make_plan(index=("full", "full", "none", "full"), scope="kv_head"),
    "a set a KV head, query blocks": make_plan(
        index=("full", "full", "none", "full"), scope="kv_head", prefill="selector", query_block=5
    ),
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


def sharp_model() -> LlamaForCausalLM:
    """A small model of random weights with sharp attention, so that a wrong mask shows."""
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
            weight.mul_(6)
    return made


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
                        beside = [s for other, s in per_head.items() if other // group == h // group]
                        scope = {"head": per_head.get(h), "kv_head": set().union(*beside), "layer": shared}
                        allowed = scope[plan.selector.scope] or set()  # type: ignore[union-attr]
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
