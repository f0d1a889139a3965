"""What all passes that split heads do alike: layers that may be split, the window's size, the best heads, the check."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sparsec.calibrate.needles import NeedleDocument
from sparsec.calibrate.retrieval_heads import copying_accuracy, stability, top_heads
from sparsec.errors import PlanError
from sparsec.events import Event
from sparsec.passes.base import Program
from sparsec.plan import ModelShape, Plan, Window
from sparsec.plugins.families import native_local_layers
from sparsec.plugins.runtime import applied

Granularity = Literal["query_head", "kv_head"]
Heads = dict[int, tuple[int, ...]]  # by layer


def scaled_window(window: int | None, readable: int) -> int:
    """Tokens of a local head's window: as given, else 1/16 of what the model reads, from 16 to 8192.

    RTPurbo's 8192 (arXiv 2605.16928) belongs to models that read 128K tokens and more.
    """
    return window or max(16, min(8192, readable // 16))


def splittable(program: Program, name: str, given: bool = False) -> Tensor:
    """bool [layers]: those that the pass ``name`` may split, which are all but the model's own sliding ones.

    given: a split that is there already is what the pass goes on from.

    Raises:
        PlanError: the plan is not dense, or the model has no such layer.
    """
    if program.plan.dsa is not None:
        raise PlanError(f"{name} is for dense models, this one chooses keys with indexers of its own: use indexcache")
    if any(layer.local for layer in program.plan.layers) and not given:
        raise PlanError(f"{name} starts from a dense plan, this one already has local heads: run it first")
    allowed = torch.ones(program.plan.model.layers, dtype=torch.bool)
    allowed[list(native_local_layers(program.model.config))] = False
    if not allowed.any():
        raise PlanError("the model runs every layer with its own sliding window: there is nothing left to split")
    return allowed


def best_heads(
    scores: Tensor, ratio: float, shape: ModelShape, allowed: Tensor, granularity: Granularity
) -> tuple[list[tuple[int, int]], dict[str, float]]:
    """The best share of all heads, and whether halves of the draws agree on them.

    Args:
        scores: [draws, layers, heads].
        ratio: share of the heads of all allowed layers, one head at least.
        allowed: bool [layers].
        granularity: ``kv_head`` takes whole GQA groups, a group as good as its best head.

    Returns:
        (layer, head) ascending, ties to the lower ones, and :func:`~sparsec.calibrate.retrieval_heads.stability`.
    """
    count = units_kept(ratio, shape, allowed, granularity)
    if granularity == "kv_head":
        scores = scores.reshape(*scores.shape[:-1], shape.kv_heads, shape.group).amax(-1)
    return best_units(scores.mean(0), count, shape, allowed), stability(scores, count, allowed)


def unit_of(shape: ModelShape, granularity: Granularity) -> int:
    """Query heads that are kept or made local together."""
    return 1 if granularity == "query_head" else shape.group


def units_kept(ratio: float, shape: ModelShape, allowed: Tensor, granularity: Granularity) -> int:
    """How many of them are ``ratio`` of all, one at least."""
    return max(1, round(ratio * (int(allowed.sum()) * shape.heads) / unit_of(shape, granularity)))


def best_units(scores: Tensor, count: int, shape: ModelShape, allowed: Tensor) -> list[tuple[int, int]]:
    """The heads (layer, head) of the best units, ascending. scores: [layers, heads] or [layers, KV heads]."""
    unit = shape.heads // scores.shape[1]
    return [
        (layer, number * unit + place) for layer, number in top_heads(scores, count, allowed) for place in range(unit)
    ]


def with_every_layer(
    chosen: Sequence[tuple[int, int]],
    scores: Tensor,
    least: int,
    shape: ModelShape,
    allowed: Tensor,
    granularity: Granularity,
) -> list[tuple[int, int]]:
    """``chosen``, and beside it the best heads of allowed layers that have fewer than ``least``.

    Args and result: see :func:`best_heads`. Whole GQA groups are added where whole groups are kept.
    """
    unit = unit_of(shape, granularity)
    share = min(1.0, -(-least // unit) * unit / shape.heads)
    kept = set(chosen)
    for layer in allowed.nonzero()[:, 0].tolist() if least else ():
        alone = torch.zeros_like(allowed)
        alone[layer] = True
        kept.update(best_heads(scores, share, shape, alone, granularity)[0])
    return sorted(kept)


def by_layer(chosen: Sequence[tuple[int, int]]) -> Heads:
    """(layer, head) pairs, ascending, as heads by layer."""
    heads: Heads = {}
    for layer, head in chosen:
        heads[layer] = (*heads.get(layer, ()), head)
    return heads


def split_plan(
    plan: Plan, heads: Heads, window: Window, min_context: int | None, index: str = "none", **changes: Any
) -> Plan:
    """``heads`` retrieval, with an index of that kind, all others local; the model's own sliding layers as they are.

    min_context: None is window + sinks. changes: other fields of the plan.
    """
    layers = [
        layer.model_dump()
        if layer.heads is None
        else {
            "heads": tuple(int(h in heads.get(i, ())) for h in range(plan.model.heads)),
            "index": index if heads.get(i) else "none",
        }
        for i, layer in enumerate(plan.layers)
    ]
    least = min_context if min_context is not None else window.size + window.sinks
    return plan.edit(layers=layers, window=window.model_dump(), min_context=least, **changes)


def causal_check(
    program: Program,
    documents: Sequence[NeedleDocument],
    heads: Heads,
    allowed: Tensor,
    window: Window,
    min_context: int | None,
) -> dict[str, Any]:
    """Share of tokens copied: dense, with the kept heads made local, with as many random others made local.

    The first must break copying, the second must not, else the split is not shown to be one.
    """
    shape = program.plan.model
    kept = {(layer, head) for layer, found in heads.items() for head in found}
    others = [
        (layer, head)
        for layer in range(shape.layers)
        if bool(allowed[layer])
        for head in range(shape.heads)
        if (layer, head) not in kept
    ]
    drawn = set(random.Random(program.seed).sample(others, min(len(kept), len(others))))
    found: dict[str, Any] = {"heads": len(kept)}
    found["dense"], found["tokens"] = copying_accuracy(program.model, documents)
    for name, local in (("kept_heads_local", kept), ("random_heads_local", drawn)):
        rest: Heads = {
            layer: tuple(h for h in range(shape.heads) if (layer, h) not in local) for layer in range(shape.layers)
        }
        with applied(program.model, split_plan(program.plan, rest, window, min_context)):
            found[name] = copying_accuracy(program.model, documents)[0]
        program.listen(Event("causal check", note=f"{name}: copies {found[name]:.0%} of the tokens"))
    return found
