"""Decode under a coarse level: mean index keys of blocks, candidates, and the scores of what is in them.

What :mod:`sparsec.plugins.coarse` says. The mean of a block is written with its last token; nothing reads it before.
One program a head lists the candidates, down to the edge of the means' scores (:mod:`sparsec.plugins.kernels.edge`).
Items that are no candidates score -inf, so what follows is the same as without a coarse level.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsec.plan import Selector
from sparsec.plugins.index_keys import loaded
from sparsec.plugins.kernels.choose import CHUNK, _log_sum, _scored, scale_of
from sparsec.plugins.kernels.edge import edge_of_count, extremes, passes, tiling, written
from sparsec.plugins.selector import TIE

BLOCKS = 128  # a program that reads means
WIDEST = 10_000.0  # scores of means this far apart are still told apart as finely as a tie
AT_ONCE = 1 << 16  # tokens of a prompt whose means are made together


@triton.jit
def mean_of_block(index, scales, means, row, mean_row, n, r, RANK: tl.constexpr, ITEM: tl.constexpr, FP8: tl.constexpr):
    """Write the mean of the block that token n ends; index and so on: where the head's lie."""
    block = n // ITEM
    token = block * ITEM + tl.arange(0, ITEM).to(tl.int64)
    k = tl.load(index + token[:, None] * row + r[None, :], mask=(r < RANK)[None, :], other=0)
    if FP8:
        k = k.to(tl.float8e4nv, bitcast=True)
    k = k.to(tl.float32)
    if FP8:
        k = k * scale_of(tl.load(scales + token))[:, None]
    tl.store(means + block * mean_row + r, (tl.sum(k, 0) / ITEM).to(means.dtype.element_ty), mask=r < RANK)


@triton.jit
def _score_means(
    means, queries, lengths, mean_batch, mean_head, mean_row, scored, items,
    values,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, MIN_CONTEXT: tl.constexpr, ITEM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (TILE blocks, scored head, sequence): the scores of means, of blocks before the row's own."""
    start, h, b = tl.program_id(0) * TILE, tl.program_id(1), tl.program_id(2)
    n = tl.load(lengths + b) + 1
    own = (n - 1) // ITEM
    if (n > MIN_CONTEXT) & (start < own):
        row = (b * scored + h).to(tl.int64)
        r = tl.arange(0, BLOCK_R)
        query = tl.load(queries + row * RANK + r, mask=r < RANK, other=0.0)
        block = start + tl.arange(0, TILE)
        at = means + b.to(tl.int64) * mean_batch + h.to(tl.int64) * mean_head
        at = at + block[:, None].to(tl.int64) * mean_row + r[None, :]
        mean = tl.load(at, mask=(block < own)[:, None] & (r < RANK)[None, :], other=0.0).to(tl.float32)
        tl.store(values + row * items + block, tl.sum(mean * query[None, :], 1), mask=block < own)


@triton.jit
def _candidates(
    values, lengths, scored, items,
    lists, counts,
    SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_CONTEXT: tl.constexpr, ONE_IN: tl.constexpr, ITEM: tl.constexpr,
    K: tl.constexpr, TILE: tl.constexpr, PASSES: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """Program (scored head, sequence): the blocks whose tokens are scored, ascending; other values become -inf."""
    h, b = tl.program_id(0), tl.program_id(1)
    n = tl.load(lengths + b) + 1
    here = tl.cdiv(n, ITEM)
    own = tl.where(n > MIN_CONTEXT, here - 1, 0)  # below it the means decide; in a short context about nothing
    wanted = tl.cdiv(here, ONE_IN).to(tl.float32)
    line = (b * scored + h).to(tl.int64)
    at = values + line * items
    t = tl.arange(0, TILE)
    value = ()
    for k in tl.static_range(K):
        ranked = _ranked(k * TILE + t, n, own, SINKS, RECENT, ITEM)
        value = value + (tl.load(at + k * TILE + t, mask=ranked, other=float("-inf")),)  # noqa: RUF005
    top, low = extremes(value, K)
    top, low = tl.where(top > float("-inf"), top, 0.0), tl.where(low < float("inf"), low, 0.0)
    low = low - 1e-3 - 1e-6 * tl.abs(low)  # the least of them lies above the interval's low end
    low = edge_of_count(value, low, top, wanted, PASSES, K)
    keeps = ()
    for k in tl.static_range(K):
        block = k * TILE + t
        keep = (value[k] >= low - SLACK) | (_ranked(block, n, own, SINKS, RECENT, ITEM).to(tl.int32) == 0)
        keep = keep & (block < here)
        tl.store(at + block, float("-inf"), mask=(block < items) & (keep.to(tl.int32) == 0))
        keeps = keeps + (keep,)  # noqa: RUF005
    tl.store(counts + line, written(lists + line * items, keeps, K, TILE))


@triton.jit
def _ranked(block, n, own, SINKS: tl.constexpr, RECENT: tl.constexpr, ITEM: tl.constexpr):
    """Blocks that the means decide about: neither forced nor the row's own."""
    return (block < own) & (block * ITEM >= SINKS) & (block * ITEM + ITEM <= n - RECENT)


@triton.jit
def _score_listed(
    index, scales, queries, lengths, lists, counts,
    index_batch, index_head, index_row, scale_batch, scale_head, scored, items,
    values,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, ITEM: tl.constexpr, CHUNK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Program (share of the candidates, scored head, sequence)."""
    h, b = tl.program_id(1), tl.program_id(2)
    n = tl.load(lengths + b) + 1
    row = (b * scored + h).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    query = tl.load(queries + row * RANK + r, mask=r < RANK, other=0.0)
    k_at = index + b.to(tl.int64) * index_batch + h.to(tl.int64) * index_head
    scale_at = scales + b.to(tl.int64) * scale_batch + h.to(tl.int64) * scale_head
    mine = lists + row * items
    count = tl.load(counts + row)
    EACH: tl.constexpr = CHUNK // ITEM
    for start in tl.range(tl.program_id(0) * EACH, count, tl.num_programs(0) * EACH):
        i = tl.arange(0, CHUNK)
        there = start + i // ITEM < count
        token = tl.load(mine + start + i // ITEM, mask=there, other=0) * ITEM + i % ITEM
        value = _scored(k_at, scale_at, index_row, token, there & (token < n), query, r, RANK, FP8)
        place = start + tl.arange(0, EACH)
        block = tl.load(mine + place, mask=place < count, other=0)
        tl.store(values + row * items + block, _log_sum(value, CHUNK, ITEM), mask=place < count)


def score(
    index: Tensor, scales: Tensor | None, means: Tensor, queries: Tensor, lengths: Tensor, selector: Selector,
    values: Tensor,
) -> None:  # fmt: skip
    """Scores of one row's candidates.

    Args:
        index, scales, queries, lengths: as in :func:`sparsec.plugins.kernels.choose.score`.
        means: [batch, scored heads, blocks, rank], of complete blocks.
        selector: with ``coarse``; an item is a block.
        values: float32 [batch, scored heads, items]; -inf where an item is no candidate.
    """
    assert selector.coarse is not None
    batch, scored, _, rank = index.shape
    items, item = values.shape[2], selector.block
    lists = torch.empty(batch, scored, items, dtype=torch.int32, device=values.device)
    counts = torch.empty(batch, scored, dtype=torch.int32, device=values.device)
    wide, of = triton.next_power_of_2(rank), scales if scales is not None else index
    how = {"MIN_CONTEXT": selector.coarse.min_context, "ITEM": item}
    count, tile, warps = tiling(items)
    _score_means[triton.cdiv(items, BLOCKS), scored, batch](
        means, queries, lengths, *means.stride()[:3], scored, items, values,
        RANK=rank, BLOCK_R=wide, TILE=BLOCKS, **how, num_warps=4,
    )  # fmt: skip
    _candidates[scored, batch](
        values, lengths, scored, items, lists, counts,
        SINKS=selector.sinks, RECENT=selector.recent, ONE_IN=selector.coarse.one_in, K=count, TILE=tile,
        PASSES=passes(WIDEST), SLACK=TIE, **how, num_warps=warps,
    )  # fmt: skip
    chunk = max(CHUNK, item)
    programs = triton.cdiv(items * item, chunk * selector.coarse.one_in) + 1  # ties, and short contexts, take turns
    _score_listed[programs, scored, batch](
        index, of, queries, lengths, lists, counts, *index.stride()[:3], *of.stride()[:2], scored, items, values,
        RANK=rank, BLOCK_R=wide, ITEM=item, CHUNK=chunk, FP8=scales is not None, num_warps=4,
    )  # fmt: skip


def means_of_prompt(index: Tensor, means: Tensor, block: int, start: int, stop: int) -> None:
    """Means of the blocks ``start`` to ``stop`` - 1; index: those blocks' keys, as they are stored."""
    step = max(1, AT_ONCE // block)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        keys = loaded(index[:, :, (first - start) * block : (last - start) * block])
        means[:, :, first:last] = keys.unflatten(2, (-1, block)).mean(3).to(means.dtype)
