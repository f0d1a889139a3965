"""The selector in decode: scores of one row from the low-rank keys, and the edge down to which items are kept.

An item is a token, or a block of tokens whose value is the log of its summed weights; weights are exp(value - total).
Where :func:`sparsec.plugins.selector.select` sorts, the edge is searched for here: the summed weight above 32 candidate
edges at once narrows an interval of scores 32-fold a pass, four passes are finer than the ties that the reference
does not tell apart. Nothing depends on the order in which programs run.
"""
# ruff: noqa: SIM102  (a condition on a constant and one on a run-time value cannot be one condition in Triton)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsec.plan import Selector
from sparsec.plugins.selector import TIE

CHUNK, WARPS = 1024, 4  # tokens and warps a scoring program
WAYS = 32
PASSES = 4
HELD, SHARES = 2048, 64  # items a search program, until so many programs divide a head's items


@triton.jit
def scale_of(exponent):
    """2^(exponent - 127); 0 gives 0."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scored(k_at, scale_at, row, token, valid, query, r, RANK: tl.constexpr, FP8: tl.constexpr):
    """Scores of tokens against one projected query, float32; -inf where they are not valid."""
    at = token.to(tl.int64)
    k = tl.load(k_at + at[:, None] * row + r[None, :], mask=valid[:, None] & (r < RANK)[None, :], other=0)
    if FP8:
        k = k.to(tl.float8e4nv, bitcast=True)
    value = tl.sum(k.to(tl.float32) * query[None, :], 1)
    if FP8:  # a power of two: as exact here as on the keys themselves
        value = value * scale_of(tl.load(scale_at + at, mask=valid, other=0))
    return tl.where(valid, value, float("-inf"))


@triton.jit
def _log_sum(value, CHUNK: tl.constexpr, ITEM: tl.constexpr):
    """The log of the summed weights of every ITEM of CHUNK scores."""
    tokens = tl.reshape(value, [CHUNK // ITEM, ITEM])
    top = tl.max(tokens, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(tokens - safe[:, None]), 1)
    return tl.where(top == float("-inf"), top, safe + tl.log(tl.maximum(total, 1e-30)))


@triton.jit
def _score(
    index, scales, queries, lengths, index_batch, index_head, index_row, scale_batch, scale_head, scored, items,
    values, stats,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, ITEM: tl.constexpr, CHUNK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Program (chunk of tokens, scored head, sequence); ``stats``: log-sum, largest and smallest item of the chunk."""
    chunk, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(lengths + b) + 1
    row = (b * scored + h).to(tl.int64)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    r = tl.arange(0, BLOCK_R)
    query = tl.load(queries + row * RANK + r, mask=r < RANK, other=0.0)
    k_at = index + b.to(tl.int64) * index_batch + h.to(tl.int64) * index_head
    scale_at = scales + b.to(tl.int64) * scale_batch + h.to(tl.int64) * scale_head
    value = _scored(k_at, scale_at, index_row, at, at < n, query, r, RANK, FP8)
    if ITEM > 1:
        value = _log_sum(value, CHUNK, ITEM)
    item = chunk * (CHUNK // ITEM) + tl.arange(0, CHUNK // ITEM)
    tl.store(values + row * items + item, value, mask=item < items)
    top = tl.max(value, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(value - safe), 0)
    lowest = tl.min(tl.where(value == float("-inf"), float("inf"), value), 0)
    stat = stats + (row * tl.num_programs(0) + chunk) * 3
    tl.store(stat, tl.where(top == float("-inf"), top, safe + tl.log(tl.maximum(total, 1e-30))))
    tl.store(stat + 1, top)
    tl.store(stat + 2, lowest)


@triton.jit
def _start(stats, row, chunks, STEP: tl.constexpr):
    """From the chunks: the log of all weights, and the interval of scores that holds every edge."""
    top = tl.full([STEP], float("-inf"), tl.float32)
    low = tl.full([STEP], float("inf"), tl.float32)
    i = tl.arange(0, STEP)
    for start in tl.range(0, chunks, STEP):
        at = stats + (row * chunks + start + i) * 3
        inside = start + i < chunks
        top = tl.maximum(top, tl.load(at + 1, mask=inside, other=float("-inf")))
        low = tl.minimum(low, tl.load(at + 2, mask=inside, other=float("inf")))
    highest = tl.max(top, 0)
    total = tl.zeros([STEP], tl.float32)
    for start in tl.range(0, chunks, STEP):
        at = stats + (row * chunks + start + i) * 3
        part = tl.load(at, mask=start + i < chunks, other=float("-inf"))
        total += tl.exp(part - highest)
    lse = highest + tl.log(tl.sum(total, 0))
    # A weight below exp(-100) is nothing to float32. The margin keeps the smallest item above the interval's low end.
    lowest = tl.maximum(tl.min(low, 0), lse - 100.0)
    lowest = lowest - 1e-3
    return lse, lowest, highest - lowest


@triton.jit
def _above(
    values, row, items, n, recent, start, stop, lse, low, low_far, step,
    SINKS: tl.constexpr, MIN_KEEP: tl.constexpr, ITEM: tl.constexpr, TILE: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Of the items start .. stop - 1 above each candidate edge: their weight, and how many are not forced.

    Items with a token below SINKS or from ``recent`` on are forced; n tokens are visible.
    """
    j = tl.arange(0, WAYS)
    edge, edge_far = low + step * j, low_far + step * j
    mass = tl.zeros([TILE, WAYS], tl.float32)
    number = tl.zeros([TILE, WAYS], tl.float32)
    for first in tl.range(start, stop, TILE):
        item = first + tl.arange(0, TILE)
        begin = item * ITEM
        there = (item < stop) & (begin < n)
        value = tl.load(values + row * items + item, mask=there, other=float("-inf"))
        weight = tl.exp(value - lse)
        mass += tl.where(value[:, None] > edge[None, :], weight[:, None], 0.0)
        if MIN_KEEP > 0:
            forced = (begin < SINKS) | (tl.minimum(begin + ITEM, n) > recent)
            far = tl.where(there & (forced == 0) & (weight > 0.0), 1.0, 0.0)
            number += tl.where(value[:, None] > edge_far[None, :], far[:, None], 0.0)
    return tl.sum(mass, 0), tl.sum(number, 0)


@triton.jit
def _narrowed(mass, number, low, low_far, step, P: tl.constexpr, MIN_KEEP: tl.constexpr, WAYS: tl.constexpr):
    """Both intervals' low ends and their parts' width, after the part of each that holds the edge is taken."""
    j = tl.arange(0, WAYS)
    part = tl.sum(((mass >= P) & (j > 0)).to(tl.int32), 0)
    part_far = tl.sum(((number >= MIN_KEEP) & (j > 0)).to(tl.int32), 0)
    return low + part.to(tl.float32) * step, low_far + part_far.to(tl.float32) * step, step / WAYS


@triton.jit(do_not_specialize=["pass_number"])
def _search(
    values, lengths, stats, before, state, pass_number, scored, items, chunks, shares,
    sums, after, totals, edges,
    P: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, ITEM: tl.constexpr,
    HELD: tl.constexpr, TILE: tl.constexpr, WAYS: tl.constexpr, PASSES: tl.constexpr, ALONE: tl.constexpr,
    STEP: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Program (share of the items, scored head, sequence): one pass, or all of them where a share is all (ALONE).

    A pass reads the sums that the shares left in the pass before (``before``) and the interval it was about
    (``state``: low ends and widths of both searches), and leaves its own (``sums``, ``after``). The last one writes
    ``totals`` and ``edges``.
    """
    share, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(lengths + b) + 1
    row = (b * scored + h).to(tl.int64)
    j = tl.arange(0, WAYS)
    lse, low, width = _start(stats, row, chunks, STEP)
    low_far = low
    step = width / WAYS
    if not ALONE:
        if pass_number > 0:
            low = tl.load(state + row * 4)
            low_far = tl.load(state + row * 4 + 1)
            step = tl.load(state + row * 4 + 2)
            other = tl.arange(0, SHARES)
            at = before + (row * shares + other[:, None]) * 2 * WAYS + j[None, :]
            mass = tl.sum(tl.load(at, mask=(other < shares)[:, None], other=0.0), 0)
            number = tl.sum(tl.load(at + WAYS, mask=(other < shares)[:, None], other=0.0), 0)
            low, low_far, step = _narrowed(mass, number, low, low_far, step, P, MIN_KEEP, WAYS)
    start = share * HELD
    stop = tl.minimum(start + HELD, items)
    turns = PASSES if ALONE else tl.where(pass_number < PASSES, 1, 0)
    for _ in tl.range(0, turns):
        mass, number = _above(
            values, row, items, n, n - RECENT, start, stop, lse, low, low_far, step,
            SINKS, MIN_KEEP, ITEM, TILE, WAYS,
        )  # fmt: skip
        if ALONE:
            low, low_far, step = _narrowed(mass, number, low, low_far, step, P, MIN_KEEP, WAYS)
        else:
            mine = sums + (row * shares + share) * 2 * WAYS + j
            tl.store(mine, mass)
            tl.store(mine + WAYS, number)
            if share == 0:
                tl.store(after + row * 4, low)
                tl.store(after + row * 4 + 1, low_far)
                tl.store(after + row * 4 + 2, step)
    if share == 0:
        tl.store(totals + row, lse)
        tl.store(edges + row * 2, low)
        tl.store(edges + row * 2 + 1, low_far)


def score(
    index: Tensor, queries: Tensor, lengths: Tensor, item: int, values: Tensor, stats: Tensor,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Scores of one row.

    Args:
        index: [batch, scored heads, slots, rank], Wk k of every token by token number, bf16, fp16 or fp32; or the
            bytes of e4m3 numbers.
        queries: float32 [batch, scored heads, rank], Wq q.
        lengths: int32 [batch], tokens before the row's own.
        item: tokens an item.
        values: float32 [batch, scored heads, items]; stats: float32 [batch, scored heads, chunks, 3].
        scales: uint8 [batch, scored heads, slots, 1], biased exponents, where keys are in fp8; None: they are not.
    """
    batch, scored, _, rank = index.shape
    of = scales if scales is not None else index
    _score[stats.shape[2], scored, batch](
        index, of, queries, lengths, *index.stride()[:3], *of.stride()[:2], scored, values.shape[2], values, stats,
        RANK=rank, BLOCK_R=triton.next_power_of_2(rank), ITEM=item, CHUNK=CHUNK, FP8=scales is not None,
        num_warps=WARPS,
    )  # fmt: skip


def search(
    values: Tensor, lengths: Tensor, stats: Tensor, selector: Selector, sums: Tensor, states: Tensor,
    totals: Tensor, edges: Tensor,
) -> None:  # fmt: skip
    """The edges down to which items are kept.

    Args:
        values, stats: of :func:`score`.
        sums, states: scratch, float32 [2, batch, scored heads, shares, 2 x WAYS] and [2, batch, scored heads, 4].
        totals: float32 [batch, scored heads], the log of all weights.
        edges: float32 [batch, scored heads, 2]: of the top-p set, and of the ``min_keep`` largest that are not forced.
    """
    batch, scored, items = values.shape
    shares = sums.shape[3]
    alone = shares == 1
    item = selector.block if selector.granularity == "block" else 1
    for number in range(1 if alone else PASSES + 1):
        old, new = (number + 1) % 2, number % 2
        programs = shares if number < PASSES else 1  # the last one only reads what the others left
        _search[programs, scored, batch](
            values, lengths, stats, sums[old], states[old], number, scored, items, stats.shape[2], shares,
            sums[new], states[new], totals, edges,
            P=selector.top_p, SINKS=selector.sinks, RECENT=selector.recent,
            MIN_KEEP=-(-selector.min_keep // item), ITEM=item,
            HELD=_held(items), TILE=1024, WAYS=WAYS, PASSES=PASSES, ALONE=alone,
            STEP=min(1024, triton.next_power_of_2(stats.shape[2])), SHARES=triton.next_power_of_2(shares), num_warps=16,
        )  # fmt: skip


def shares_of(items: int) -> int:
    """Programs that divide the items of one head."""
    return triton.cdiv(items, _held(items))


def _held(items: int) -> int:
    return HELD * triton.cdiv(items, HELD * SHARES)


assert 100.1 / WAYS**PASSES < TIE, "the search is coarser than what counts as a tie"
