"""Bytes of decoding under a plan, by arithmetic: what the cache holds, what a step reads, from which length it pays.

Bytes, not time: a gather of kept tokens does not run at the speed of a dense read, and the selector's softmax, top-p
and launches are not in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.plan import Plan
from sparsec.plugins.index_keys import index_bytes, index_read


@dataclass(frozen=True)
class Read:
    """Bytes that one decode step reads in the layers with an index, means over rows."""

    context: float  # tokens, the new one included
    index: float  # index keys of all tokens, or means and those of candidates; layers that share a set read none
    kept: float  # keys and values of the union of what the query heads on a KV head read
    dense: float  # keys and values of all tokens of the same KV heads, once for their query heads

    @property
    def sparse(self) -> float:
        """With the selector."""
        return self.index + self.kept

    def to_json(self) -> dict[str, float]:
        """Plain data."""
        return {"context": self.context, "index": self.index, "kept": self.kept, "dense": self.dense}


def selecting_kv_heads(plan: Plan, layer: int) -> tuple[int, ...]:
    """KV heads that a layer's retrieval heads read; none where the layer has no index."""
    if plan.layers[layer].index == "none":
        return ()
    return tuple(sorted({head // plan.model.group for head in plan.layers[layer].retrieval}))


def read_bytes(plan: Plan, context: float, kept: Mapping[int, float], itemsize: int) -> Read:
    """What a decode step reads in the layers with an index.

    Args:
        plan: with a selector.
        context: tokens.
        kept: by layer, tokens read on each KV head of :func:`selecting_kv_heads`, summed over these: the union over
            the query heads, local ones beside them included.
        itemsize: bytes of a number in the cache.

    Raises:
        ValueError: the plan has no selector.
    """
    if plan.selector is None:
        raise ValueError("no selector, so nothing is selected: use a plan with indexers")
    pair = 2 * plan.model.head_dim * itemsize
    full = sum(len(plan.layers[i].retrieval) for i in plan.indexed() if plan.layers[i].index == "full")
    read = sum(len(selecting_kv_heads(plan, i)) for i in plan.indexed())
    return Read(
        context=context,
        index=full * index_read(plan.selector, context, itemsize),
        kept=sum(kept.values()) * pair,
        dense=read * pair * context,
    )


def break_even(reads: Sequence[Read]) -> dict[str, Any]:
    """From which context on a step with the selector reads less than one without.

    Between the last measured context that does not pay and the next one, by linear interpolation; nothing is
    extrapolated.

    Returns:
        ``tokens`` and ``bound``: ``about`` tokens, ``at most`` (the shortest measured context pays already), or
        ``above`` (the longest does not pay yet).

    Raises:
        ValueError: nothing was measured.
    """
    if not reads:
        raise ValueError("a break-even length needs measured contexts: measure decode rows beyond min_context")
    ranked = sorted(reads, key=lambda read: read.context)
    gains = [read.dense - read.sparse for read in ranked]
    losing = [place for place, gain in enumerate(gains) if gain <= 0]
    if not losing:
        return {"tokens": ranked[0].context, "bound": "at most"}
    last = losing[-1]
    if last + 1 == len(ranked):
        return {"tokens": ranked[-1].context, "bound": "above"}
    below, above = ranked[last].context, ranked[last + 1].context
    share = -gains[last] / (gains[last + 1] - gains[last])
    return {"tokens": below + share * (above - below), "bound": "about"}


def resident_bytes(plan: Plan, tokens: int, itemsize: int) -> dict[str, int]:
    """What the cache of one sequence holds, by kind, in layers that the plan runs.

    Args:
        plan: what runs.
        tokens: all in the cache, the prompt as well as the generated ones.
        itemsize: bytes of a number in the cache.

    Returns:
        ``full``: keys and values of KV heads that keep every token; ``local``: those of evicted ones, with their
        token numbers; ``index``: index keys; ``sums``: what stands for dropped tokens where the window compensates;
        ``dense``: what the same layers of the dense model hold.
    """
    shape, held = plan.model, {"full": 0, "local": 0, "index": 0, "sums": 0, "dense": 0}
    pair = 2 * shape.head_dim * itemsize
    for layer in plan.layers:
        if layer.heads is None:
            continue
        gone = len(layer.local_kv_heads(shape.group))
        beside = {head // shape.group for head in layer.local} - set(layer.local_kv_heads(shape.group))
        held["dense"] += shape.kv_heads * tokens * pair
        held["full"] += (shape.kv_heads - gone) * tokens * pair
        if layer.index == "full" and plan.selector is not None:
            held["index"] += int(len(layer.retrieval) * index_bytes(plan.selector, tokens, itemsize))
        if plan.window is None:
            continue
        most = plan.window.size + plan.window.sinks
        forgets = tokens > max(most, plan.min_context)
        if gone:
            held["local"] += (most if forgets else tokens) * (gone * pair + 8)  # token numbers are int64
        if plan.window.compensate:
            for heads in (gone, len(beside)):
                held["sums"] += (heads * 2 * shape.head_dim * 4 + 8) if heads else 0  # float32, and where they end
    return held
