"""Decode: what is kept as one list of items, where a head has few enough for one program.

Where :mod:`sparsec.plugins.kernels.choose` divides a head's items among programs that meet between launches, here one
program reads them all, a few times out of its cache: it finds the edge, eight candidates a pass, and writes the kept
items down in order. What attends to them can then divide the list evenly. An item is a token or a block of tokens.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from sparsec.plan import Selector
from sparsec.plugins.kernels.choose import _narrowed
from sparsec.plugins.selector import TIE

LARGEST = 32768  # items a head: 2M tokens in blocks of 64
WAYS, PASSES, WARPS = 8, 7, 8


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
def _above_of(
    value, begin, n, lse, edges, edges_far,
    SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """Of a tile of items, [TILE], above each candidate edge: their weight, and how many are not forced."""
    weight = tl.exp(value - lse)
    mass = tl.sum(tl.where(value[:, None] > edges[None, :], weight[:, None], 0.0), 0)
    number = mass
    if MIN_KEEP > 0:
        forced = (begin < SINKS) | (tl.minimum(begin + ITEM, n) > n - RECENT)
        far = tl.where((forced == 0) & (weight > 0.0), 1.0, 0.0)
        number = tl.sum(tl.where(value[:, None] > edges_far[None, :], far[:, None], 0.0), 0)
    return mass, number


@triton.jit
def _search_held(
    values, lengths, scored, items,
    totals, edges, lists, counts,
    P: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    ITEM: tl.constexpr, TILE: tl.constexpr, ONE: tl.constexpr, WAYS: tl.constexpr, PASSES: tl.constexpr,
    SLACK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Program (scored head, sequence). ONE: a tile holds all items. LIST: the head's own set is written down, too."""
    h, b = tl.program_id(0), tl.program_id(1)
    n = tl.load(lengths + b) + 1
    here = tl.cdiv(n, ITEM)
    line = (b * scored + h).to(tl.int64)
    at = values + line * items
    i = tl.arange(0, TILE)
    value = tl.load(at + i, mask=i < here, other=float("-inf"))  # of the first tile, or of all
    tops, lows = value, tl.where(i < here, value, float("inf"))
    if not ONE:
        for start in tl.range(TILE, here, TILE):
            more = tl.load(at + start + i, mask=start + i < here, other=float("-inf"))
            tops = tl.maximum(tops, more)
            lows = tl.minimum(lows, tl.where(start + i < here, more, float("inf")))
    top = tl.max(tops, 0)
    sums = tl.exp(value - top)
    if not ONE:
        for start in tl.range(TILE, here, TILE):
            sums += tl.exp(tl.load(at + start + i, mask=start + i < here, other=float("-inf")) - top)
    lse = top + tl.log(tl.sum(sums, 0))
    # A weight below exp(-100) is nothing to float32. The margin keeps the smallest item above the interval's low end.
    low = tl.maximum(tl.min(lows, 0), lse - 100.0) - 1e-3
    low_far = low
    step = (top - low) / WAYS
    j = tl.arange(0, WAYS)
    for _ in tl.range(0, PASSES):
        if ONE:
            mass, number = _above_of(
                value, i * ITEM, n, lse, low + step * j, low_far + step * j, SINKS, RECENT, MIN_KEEP, ITEM
            )
        else:
            mass = tl.zeros([WAYS], tl.float32)
            number = mass
            for start in tl.range(0, here, TILE):
                value = tl.load(at + start + i, mask=start + i < here, other=float("-inf"))
                more, more_far = _above_of(
                    value, (start + i) * ITEM, n, lse, low + step * j, low_far + step * j, SINKS, RECENT, MIN_KEEP, ITEM
                )
                mass += more
                number += more_far
        low, low_far, step = _narrowed(mass, number, low, low_far, step, P, MIN_KEEP, WAYS)
    tl.store(totals + line, lse)
    tl.store(edges + line * 2, low)
    tl.store(edges + line * 2 + 1, low_far)
    if LIST:
        count = 0
        for start in tl.range(0, here, TILE):
            begin = (start + i) * ITEM
            value = tl.load(at + start + i, mask=start + i < here, other=float("-inf"))
            keep = _forced(begin, n, SINKS, RECENT, MIN_CONTEXT, ITEM) | _kept(
                value, low, low_far, lse, MIN_KEEP, SLACK
            )
            keep = keep & (start + i < here)
            place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(lists + line * items + place, start + i, mask=keep)
            count += tl.sum(keep.to(tl.int32), 0)
        tl.store(counts + line, count)


@triton.jit
def _union(
    values, lengths, totals, edges, scored, items,
    lists, counts,
    SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    ALL: tl.constexpr, ITEM: tl.constexpr, TILE: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """Program (set, sequence): what any of the sequence's heads keeps, or everything."""
    which, b = tl.program_id(0), tl.program_id(1)
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
            for h in tl.range(0, scored):
                line = (b * scored + h).to(tl.int64)
                value = tl.load(values + line * items + start + i, mask=start + i < here, other=float("-inf"))
                edge, edge_far = tl.load(edges + line * 2), tl.load(edges + line * 2 + 1)
                keep = keep | _kept(value, edge, edge_far, tl.load(totals + line), MIN_KEEP, SLACK)
        keep = keep & (start + i < here)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(lists + mine * items + place, start + i, mask=keep)
        count += tl.sum(keep.to(tl.int32), 0)
    tl.store(counts + mine, count)


def fits(items: int) -> bool:
    """So many items a head are few enough."""
    return items <= LARGEST


def kept(
    values: Tensor, lengths: Tensor, selector: Selector, min_context: int, totals: Tensor, edges: Tensor,
    lists: Tensor, counts: Tensor,
) -> None:  # fmt: skip
    """Write down what is kept.

    Args:
        values: float32 [batch, scored heads, items], of :func:`sparsec.plugins.kernels.choose.score`; not read where
            the selector keeps everything.
        lengths: int32 [batch], tokens before the row's own.
        totals, edges: float32 [batch, scored heads] and [batch, scored heads, 2], written.
        lists: int32 [batch, sets, items], items in ascending order; counts: int32 [batch, sets]. A set is a scored
            head's, or with scope 'layer' the one of all.
    """
    batch, scored, items = values.shape
    item = selector.block if selector.granularity == "block" else 1
    tile = min(4096, max(128, triton.next_power_of_2(items)))
    own = selector.scope == "head" and selector.top_p < 1
    options = {
        "SINKS": selector.sinks, "RECENT": selector.recent, "MIN_KEEP": -(-selector.min_keep // item),
        "MIN_CONTEXT": min_context, "ITEM": item, "TILE": tile, "SLACK": -math.log1p(-TIE),
        "num_warps": min(WARPS, max(4, tile // 256)),
    }  # fmt: skip
    if selector.top_p < 1:
        _search_held[scored, batch](
            values, lengths, scored, items, totals, edges, lists, counts,
            P=selector.top_p, ONE=items <= tile, WAYS=WAYS, PASSES=PASSES, LIST=own, **options,
        )  # fmt: skip
    if not own:
        _union[lists.shape[1], batch](
            values, lengths, totals, edges, scored, items, lists, counts, ALL=selector.top_p >= 1, **options
        )


assert 100.1 / WAYS**PASSES < TIE, "the search is coarser than what counts as a tie"
