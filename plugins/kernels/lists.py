"""Decode: what is kept as one list of items, where a head has few enough for one program.

Where :mod:`sparsec.plugins.kernels.choose` divides a head's items among programs that meet between launches, here one
program reads them all, a few times out of its cache: it finds the edge, an eighth a pass, and writes the kept
items down in order. What attends to them can then divide the list evenly. An item is a token or a block of tokens.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from sparsec.plan import Selector
from sparsec.plugins.kernels.support import MOST_ITEMS
from sparsec.plugins.selector import TIE

PASSES = 7  # each leaves an eighth
SLACK = -math.log1p(-TIE)  # what counts as a tie, between values
TILE, WARP, LINE = 512, 64, 4096  # items that a search reads at once, a warp of it reads, and a list is made of at once


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
def _seven(a1, a2, a3, a4, a5, a6, a7, b1, b2, b3, b4, b5, b6, b7):
    return a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _parts_above(s1, s2, s3, s4, s5, s6, s7, least):
    """How many of the seven inner candidate edges have ``least`` above them, from sums that each thread made.

    Seven tensors in one reduction: threads meet once a pass, not once a candidate.
    """
    s1, s2, s3, s4, s5, s6, s7 = tl.reduce((s1, s2, s3, s4, s5, s6, s7), 0, _seven)
    found = (s1 >= least).to(tl.float32) + (s2 >= least).to(tl.float32) + (s3 >= least).to(tl.float32)
    found += (s4 >= least).to(tl.float32) + (s5 >= least).to(tl.float32)
    return found + (s6 >= least).to(tl.float32) + (s7 >= least).to(tl.float32)


@triton.jit
def _narrowed_to(
    at, here, n, lse, low, step, least,
    SINKS: tl.constexpr, RECENT: tl.constexpr, FAR: tl.constexpr, ITEM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The low end of the eighth of an interval that holds an edge: the highest above which ``least`` still lies.

    Of weight; FAR: of items that are not forced.
    """
    i = tl.arange(0, TILE)
    s1 = tl.zeros([TILE], tl.float32)
    s2, s3, s4, s5, s6, s7 = s1, s1, s1, s1, s1, s1
    for start in tl.range(0, here, TILE):
        value = tl.load(at + start + i, mask=start + i < here, other=float("-inf"))
        weight = tl.exp(value - lse)
        if FAR:
            begin = (start + i) * ITEM
            forced = (begin < SINKS) | (tl.minimum(begin + ITEM, n) > n - RECENT)
            weight = tl.where((forced == 0) & (weight > 0.0), 1.0, 0.0)
        s1 += tl.where(value > low + step, weight, 0.0)
        s2 += tl.where(value > low + 2 * step, weight, 0.0)
        s3 += tl.where(value > low + 3 * step, weight, 0.0)
        s4 += tl.where(value > low + 4 * step, weight, 0.0)
        s5 += tl.where(value > low + 5 * step, weight, 0.0)
        s6 += tl.where(value > low + 6 * step, weight, 0.0)
        s7 += tl.where(value > low + 7 * step, weight, 0.0)
    return low + _parts_above(s1, s2, s3, s4, s5, s6, s7, least) * step


@triton.jit
def edges_of(
    at, here, n,
    P: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, ITEM: tl.constexpr,
    TILE: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """The log of all weights of the ``here`` items at ``at``, the edge of the top-p set, and that of the floor."""
    i = tl.arange(0, TILE)
    tops = tl.full([TILE], float("-inf"), tl.float32)
    lows = tl.full([TILE], float("inf"), tl.float32)
    for start in tl.range(0, here, TILE):
        value = tl.load(at + start + i, mask=start + i < here, other=float("-inf"))
        tops = tl.maximum(tops, value)
        lows = tl.minimum(lows, tl.where(start + i < here, value, float("inf")))
    top = tl.max(tops, 0)
    sums = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, here, TILE):
        sums += tl.exp(tl.load(at + start + i, mask=start + i < here, other=float("-inf")) - top)
    lse = top + tl.log(tl.sum(sums, 0))
    # A weight below exp(-100) is nothing to float32. The margin keeps the smallest item above the interval's low end.
    low = tl.maximum(tl.min(lows, 0), lse - 100.0) - 1e-3
    low_far = low
    step = (top - low) / 8
    for _ in tl.range(0, PASSES):
        low = _narrowed_to(at, here, n, lse, low, step, P, SINKS, RECENT, False, ITEM, TILE)
        if MIN_KEEP > 0:
            low_far = _narrowed_to(at, here, n, lse, low_far, step, MIN_KEEP, SINKS, RECENT, True, ITEM, TILE)
        step = step / 8
    return lse, low, low_far


@triton.jit
def _search_held(
    values, lengths, scored, items,
    totals, edges, lists, counts,
    P: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    ITEM: tl.constexpr, TILE: tl.constexpr, LINE: tl.constexpr, PASSES: tl.constexpr,
    SLACK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Program (scored head, sequence). LIST: the head's own set is written down too, LINE items at a time."""
    h, b = tl.program_id(0), tl.program_id(1)
    n = tl.load(lengths + b) + 1
    here = tl.cdiv(n, ITEM)
    line = (b * scored + h).to(tl.int64)
    at = values + line * items
    lse, low, low_far = edges_of(at, here, n, P, SINKS, RECENT, MIN_KEEP, ITEM, TILE, PASSES)
    tl.store(totals + line, lse)
    tl.store(edges + line * 2, low)
    tl.store(edges + line * 2 + 1, low_far)
    if LIST:
        count = 0
        j = tl.arange(0, LINE)
        for start in tl.range(0, here, LINE):
            begin = (start + j) * ITEM
            value = tl.load(at + start + j, mask=start + j < here, other=float("-inf"))
            keep = _forced(begin, n, SINKS, RECENT, MIN_CONTEXT, ITEM) | _kept(
                value, low, low_far, lse, MIN_KEEP, SLACK
            )
            keep = keep & (start + j < here)
            place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(lists + line * items + place, start + j, mask=keep)
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
    return items <= MOST_ITEMS


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
    power = max(128, triton.next_power_of_2(items))
    tile, line = min(TILE, power), min(LINE, power)
    own = selector.scope == "head" and selector.top_p < 1
    options = {
        "SINKS": selector.sinks, "RECENT": selector.recent, "MIN_KEEP": -(-selector.min_keep // item),
        "MIN_CONTEXT": min_context, "ITEM": item, "SLACK": SLACK,
    }  # fmt: skip
    if selector.top_p < 1:
        _search_held[scored, batch](
            values, lengths, scored, items, totals, edges, lists, counts,
            P=selector.top_p, TILE=tile, LINE=line, PASSES=PASSES, LIST=own,
            num_warps=max(4, tile // WARP), **options,
        )  # fmt: skip
    if not own:
        _union[lists.shape[1], batch](
            values, lengths, totals, edges, scored, items, lists, counts,
            ALL=selector.top_p >= 1, TILE=line, num_warps=max(4, line // 512), **options,
        )  # fmt: skip


assert 100.1 / 8**PASSES < TIE, "the search is coarser than what counts as a tie"
