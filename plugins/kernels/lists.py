"""Decode: what is kept as one list of items, where a head has few enough for one program.

Where :mod:`sparsec.plugins.kernels.choose` divides a head's items among programs that meet between launches, here one
program holds them all (:mod:`sparsec.plugins.kernels.edge`): it finds the edge and writes the kept items down in order.
What attends to them can then divide the list evenly. An item is a token or a block of tokens.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from sparsec.plan import Selector
from sparsec.plugins.kernels.edge import (
    edge_of_count,
    edge_of_weight,
    extremes,
    loaded,
    passes,
    tiling,
    written,
)
from sparsec.plugins.selector import TIE

LINE = 4096  # items of a union that are listed at once
NOTHING = 100.0  # a weight below exp(-100) is nothing to float32
SLACK = -math.log1p(-TIE)  # what counts as a tie, between values


@triton.jit
def _kept(value, edge, edge_far, lse, MIN_KEEP: tl.constexpr, SLACK: tl.constexpr):
    """Items down to the edges."""
    keep = value >= edge - SLACK
    if MIN_KEEP > 0:
        keep = keep | ((value >= edge_far - SLACK) & (tl.exp(value - lse) > 0.0))
    return keep


@triton.jit
def _forced(begin, n, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_CONTEXT: tl.constexpr, ITEM: tl.constexpr):
    """Items that are kept whatever they score."""
    return (begin < tl.where(n <= MIN_CONTEXT, n, SINKS)) | (tl.minimum(begin + ITEM, n) > n - RECENT)


@triton.jit
def _search_held(
    values, lengths, scored, items,
    totals, edges, lists, counts,
    P: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    ITEM: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, BELOW: tl.constexpr, PASSES: tl.constexpr,
    PASSES_FAR: tl.constexpr, NOTHING: tl.constexpr, SLACK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Program (scored head, sequence). LIST: the head's own set is written down too."""
    h, b = tl.program_id(0), tl.program_id(1)
    n = tl.load(lengths + b) + 1
    here = tl.cdiv(n, ITEM)
    line = (b * scored + h).to(tl.int64)
    at = values + line * items
    value = loaded(at, here, float("-inf"), K, TILE)
    top, least = extremes(value, K)
    weights = ()
    sums = tl.zeros([TILE], tl.float32)
    for k in tl.static_range(K):
        sums += tl.exp(value[k] - top)
    lse = top + tl.log(tl.sum(sums, 0))
    for k in tl.static_range(K):
        weights = weights + (tl.exp(value[k] - lse),)  # noqa: RUF005
    # All items of less than exp(-BELOW) together weigh less than 1 - P. The margins keep what is at the interval's low
    # end above it.
    low = tl.maximum(least - lse - 1e-3, -BELOW)
    low = lse + edge_of_weight(weights, low, top - lse, P, PASSES, K)
    low_far = least
    if MIN_KEEP > 0:
        far = ()
        for k in tl.static_range(K):
            begin = (k * TILE + tl.arange(0, TILE)) * ITEM
            forced = (begin < SINKS) | (tl.minimum(begin + ITEM, n) > n - RECENT)
            far = far + (tl.where(forced | (weights[k] == 0.0), float("-inf"), value[k]),)  # noqa: RUF005
        low_far = tl.maximum(least, lse - NOTHING) - 1e-3
        low_far = edge_of_count(far, low_far, top, MIN_KEEP, PASSES_FAR, K)
    tl.store(totals + line, lse)
    tl.store(edges + line * 2, low)
    tl.store(edges + line * 2 + 1, low_far)
    if LIST:
        keeps = ()
        for k in tl.static_range(K):
            begin = (k * TILE + tl.arange(0, TILE)) * ITEM
            keep = _forced(begin, n, SINKS, RECENT, MIN_CONTEXT, ITEM)
            keep = keep | _kept(value[k], low, low_far, lse, MIN_KEEP, SLACK)
            keeps = keeps + (keep & (begin < n),)  # noqa: RUF005
        tl.store(counts + line, written(lists + line * items, keeps, K, TILE))


@triton.jit
def _union(
    values, lengths, totals, edges, first, members, scored, items,
    lists, counts,
    SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    ALL: tl.constexpr, ITEM: tl.constexpr, TILE: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """Program (set, sequence): what any of the set's heads keeps, or everything."""
    which, b = tl.program_id(0), tl.program_id(1)
    begin_of, heads = tl.load(first + which), tl.load(members + which)
    n = tl.load(lengths + b) + 1
    here = tl.cdiv(n, ITEM)
    i = tl.arange(0, TILE)
    mine = (b * tl.num_programs(0) + which).to(tl.int64)
    count = 0
    for start in tl.range(0, here, TILE):
        begin = (start + i) * ITEM
        keep = _forced(begin, n, SINKS, RECENT, MIN_CONTEXT, ITEM)
        if ALL:
            keep = begin >= 0
        else:
            for h in tl.range(begin_of, begin_of + heads):
                line = (b * scored + h).to(tl.int64)
                value = tl.load(values + line * items + start + i, mask=start + i < here, other=float("-inf"))
                edge, edge_far = tl.load(edges + line * 2), tl.load(edges + line * 2 + 1)
                keep = keep | _kept(value, edge, edge_far, tl.load(totals + line), MIN_KEEP, SLACK)
        keep = keep & (start + i < here)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(lists + mine * items + place, start + i, mask=keep)
        count += tl.sum(keep.to(tl.int32), 0)
    tl.store(counts + mine, count)


def kept(
    values: Tensor, lengths: Tensor, selector: Selector, min_context: int, totals: Tensor, edges: Tensor,
    lists: Tensor, counts: Tensor, first: Tensor, members: Tensor,
) -> None:  # fmt: skip
    """Write down what is kept.

    Args:
        values: float32 [batch, scored heads, items], of :func:`sparsec.plugins.kernels.choose.score`; not read where
            the selector keeps everything.
        lengths: int32 [batch], tokens before the row's own.
        totals, edges: float32 [batch, scored heads] and [batch, scored heads, 2], written.
        lists: int32 [batch, sets, items], items in ascending order; counts: int32 [batch, sets].
        first, members: int32 [sets], which scored heads a set is the union of.
    """
    batch, scored, items = values.shape
    item = selector.block if selector.granularity == "block" else 1
    count, tile, warps = tiling(items)
    own = selector.scope == "head" and selector.top_p < 1
    options = {
        "SINKS": selector.sinks, "RECENT": selector.recent, "MIN_KEEP": -(-selector.min_keep // item),
        "MIN_CONTEXT": min_context, "ITEM": item, "SLACK": SLACK,
    }  # fmt: skip
    if selector.top_p < 1:
        below = min(NOTHING, math.log(count * tile / (1 - selector.top_p)) + 1e-3)
        _search_held[scored, batch](
            values, lengths, scored, items, totals, edges, lists, counts,
            P=selector.top_p, K=count, TILE=tile, BELOW=below, PASSES=passes(below), PASSES_FAR=passes(NOTHING + 1),
            NOTHING=NOTHING, LIST=own, num_warps=warps, **options,
        )  # fmt: skip
    if not own:
        _union[lists.shape[1], batch](
            values, lengths, totals, edges, first, members, scored, items, lists, counts,
            ALL=selector.top_p >= 1, TILE=min(LINE, max(128, triton.next_power_of_2(items))), num_warps=8, **options,
        )  # fmt: skip
