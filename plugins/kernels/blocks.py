"""Prefill of retrieval heads with the selector: groups of query rows choose blocks of keys, then attend to those.

What :mod:`sparsec.plugins.blocks` says, in four steps that hold no rows x keys: the selector's log-sum of every voting
row and key block; each group's mean mass of every block and the edge down to which blocks are kept; their list; flash
attention over the list. All run for some groups at a time, so that what they hold grows with the keys alone.

Sequences lie in order of token numbers in the stores (:mod:`sparsec.plugins.kernels.cache`); row m of sequence b is
token ``first[b] + m``. A group is the tokens from g x query_block to the next one's, of which this call has some.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsec.plan import Selector
from sparsec.plugins.kernels.choose import PASSES, WAYS, _above, _narrowed, scale_of
from sparsec.plugins.kernels.flash import fold
from sparsec.plugins.selector import TIE

HELD = 1 << 28  # bytes of log-sums at a time
WIDE = 2048  # keys a scoring program
EMPTY = tl.constexpr(-3.0e38)  # log of no mass; finite, so that differences stay numbers


@triton.jit
def _span(group, first, rows, MIN_CONTEXT: tl.constexpr, ROWS: tl.constexpr):
    """The first and the last of the group's tokens that are rows of this call and choose; none: last < first."""
    oldest = tl.maximum(group * ROWS, tl.maximum(first, MIN_CONTEXT))
    return oldest, tl.minimum(group * ROWS + ROWS, first + rows) - 1


@triton.jit
def _block_scores(
    queries, index, scales, first, group0, groups, rows, scored, blocks, index_batch, index_head, index_row,
    scale_batch, scale_head, scores,
    MIN_CONTEXT: tl.constexpr, ROWS: tl.constexpr, EVERY: tl.constexpr, VOTES: tl.constexpr, BLOCK_M: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, ITEM: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
    EXACT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Program (WIDE keys, pack of groups, sequence x scored head): log-sums of blocks for every row that votes.

    A pack is so many groups that their VOTES voters each fill BLOCK_M rows. ``scores``: [.., packs, blocks, BLOCK_M].
    EXACT: index keys are float32; else queries are split into three parts of the keys' type, or of float16, which holds
    every e4m3 number: their products are as exact as float32's and cheaper.
    """
    chunk, pack = tl.program_id(0), tl.program_id(1)
    b, h = tl.program_id(2) // scored, tl.program_id(2) % scored
    begin = tl.load(first + b)
    m = tl.arange(0, BLOCK_M)
    local = pack * (BLOCK_M // VOTES) + m // VOTES
    oldest, newest = _span(group0 + local, begin, rows, MIN_CONTEXT, ROWS)
    t = oldest + m % VOTES * EVERY
    votes = (t <= newest) & (local < groups)
    last = tl.max(tl.where(votes, t, -1), 0)
    sure = tl.min(tl.where(votes, t, 2147483647), 0)  # keys up to here are seen by all
    start = chunk * WIDE
    stop = tl.minimum(start + WIDE, last + 1)
    if start < stop:
        r = tl.arange(0, BLOCK_R)
        line = (b * scored + h).to(tl.int64)
        q_at = queries + (line * rows + (t - begin)[:, None]) * RANK + r[None, :]
        q = tl.load(q_at, mask=votes[:, None] & (r < RANK)[None, :], other=0.0) * 1.4426950408889634
        kind = tl.float16 if FP8 else index.dtype.element_ty
        high = q.to(kind)
        middle = (q - high.to(tl.float32)).to(kind)
        low = (q - high.to(tl.float32) - middle.to(tl.float32)).to(kind)
        k_at = index + b.to(tl.int64) * index_batch + h.to(tl.int64) * index_head + r[:, None]
        scale_at = scales + b.to(tl.int64) * scale_batch + h.to(tl.int64) * scale_head
        to = scores + (line * tl.num_programs(1) + pack) * blocks * BLOCK_M + m
        for n0 in tl.range(start, stop, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            k_mask = (n <= last)[None, :] & (r < RANK)[:, None]
            k = tl.load(k_at + n[None, :].to(tl.int64) * index_row, mask=k_mask, other=0)
            if FP8:
                k = k.to(tl.float8e4nv, bitcast=True).to(kind)
            if EXACT:
                s = tl.dot(q, k, input_precision="tf32x3")
            else:
                s = tl.dot(low, k)
                s = tl.dot(middle, k, s)
                s = tl.dot(high, k, s)
            if FP8:
                s = s * scale_of(tl.load(scale_at + n, mask=n <= last, other=0))[None, :]
            if n0 + BLOCK_N - 1 > sure:
                s = tl.where(n[None, :] <= t[:, None], s, EMPTY)
            if BLOCK_N == ITEM:
                top = tl.max(s, 1)
                total = tl.sum(tl.exp2(s - top[:, None]), 1)
                value = tl.where(top == EMPTY, EMPTY, (top + tl.log2(total)) * 0.6931471805599453)
                tl.store(to + n0 // ITEM * BLOCK_M, value)
            else:
                s = tl.reshape(s, [BLOCK_M, BLOCK_N // ITEM, ITEM])
                top = tl.max(s, 2)
                total = tl.sum(tl.exp2(s - top[:, :, None]), 2)
                value = tl.where(top == EMPTY, EMPTY, (top + tl.log2(total)) * 0.6931471805599453)
                block = n0 // ITEM + tl.arange(0, BLOCK_N // ITEM)
                at = to[:, None] + block[None, :] * BLOCK_M
                tl.store(at, value, mask=(block < blocks)[None, :])


@triton.jit
def _group_edges(
    scores, first, group0, rows, scored, blocks, packs,
    masses, edges,
    P: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    ROWS: tl.constexpr, EVERY: tl.constexpr, VOTES: tl.constexpr, BLOCK_M: tl.constexpr, ITEM: tl.constexpr,
    TILE: tl.constexpr, FAST: tl.constexpr, WAYS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Program (group, sequence x scored head): the log of each block's mean mass, and the two edges."""
    local = tl.program_id(0)
    b = tl.program_id(1) // scored
    line = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + local
    oldest, newest = _span(group0 + local, tl.load(first + b), rows, MIN_CONTEXT, ROWS)
    j = tl.arange(0, VOTES)
    t = oldest + j * EVERY
    votes = t <= newest
    count = tl.sum(votes.to(tl.int32), 0)
    here = tl.where(count > 0, newest // ITEM + 1, 0)  # blocks that some row sees, which may be one that no voter sees
    pack = tl.program_id(1).to(tl.int64) * packs + local // (BLOCK_M // VOTES)
    at = scores + pack * blocks * BLOCK_M + (local % (BLOCK_M // VOTES)) * VOTES + j[None, :]
    top = tl.full([VOTES], EMPTY, tl.float32)
    total = tl.zeros([VOTES], tl.float32)
    for start in tl.range(0, here, TILE):
        block = start + tl.arange(0, TILE)
        inside = (block < here)[:, None] & (block[:, None] * ITEM <= t[None, :]) & votes[None, :]
        value = tl.load(at + block[:, None].to(tl.int64) * BLOCK_M, mask=inside, other=EMPTY)
        higher = tl.maximum(top, tl.max(value, 0))
        part = tl.sum(tl.where(inside, tl.exp(value - higher[None, :]), 0.0), 0)
        total = total * tl.exp(top - higher) + part
        top = higher
    lse = top + tl.log(tl.where(total > 0.0, total, 1.0))
    low = tl.full([TILE], float("inf"), tl.float32)
    high = tl.full([TILE], float("-inf"), tl.float32)
    for start in tl.range(0, here, TILE):
        block = start + tl.arange(0, TILE)
        inside = (block < here)[:, None] & (block[:, None] * ITEM <= t[None, :]) & votes[None, :]
        value = tl.load(at + block[:, None].to(tl.int64) * BLOCK_M, mask=inside, other=EMPTY)
        mass = tl.sum(tl.where(inside, tl.exp(value - lse[None, :]), 0.0), 1) / tl.maximum(count, 1)
        value = tl.where(mass > 0.0, tl.maximum(tl.log(tl.maximum(mass, 1e-37)), -99.0), -100.0)
        tl.store(masses + line * blocks + block, value, mask=block < here)
        low = tl.minimum(low, tl.where(block < here, value, float("inf")))
        high = tl.maximum(high, tl.where(block < here, value, float("-inf")))
    tl.debug_barrier()  # masses are written and read by different threads of this program
    edge = tl.min(low, 0) - 1e-3
    edge_far = edge
    step = (tl.max(high, 0) - edge) / WAYS
    recent = oldest - RECENT + 1
    for _ in tl.range(0, tl.where(here > 0, PASSES, 0)):
        mass, number = _above(
            masses, line, blocks, newest + 1, recent, 0, here, 0.0, edge, edge_far, step,
            SINKS, MIN_KEEP, ITEM, FAST, WAYS,
        )  # fmt: skip
        edge, edge_far, step = _narrowed(mass, number, edge, edge_far, step, P, MIN_KEEP, WAYS)
    tl.store(edges + line * 2, edge)
    tl.store(edges + line * 2 + 1, edge_far)


@triton.jit
def _group_lists(
    masses, edges, first, set_first, set_members, group0, rows, scored, blocks,
    lists, counts,
    ALL: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    ROWS: tl.constexpr, ITEM: tl.constexpr, UNION: tl.constexpr, SLACK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (group, set, sequence): the blocks that any of the set's heads keeps, ascending."""
    local, which, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin_of, size = tl.load(set_first + which), tl.load(set_members + which)
    oldest, newest = _span(group0 + local, tl.load(first + b), rows, MIN_CONTEXT, ROWS)
    recent = oldest - RECENT + 1
    here = tl.where(newest >= oldest, newest // ITEM + 1, 0)
    mine = (b * tl.num_programs(1) + which).to(tl.int64) * tl.num_programs(0) + local
    count = 0
    for start in tl.range(0, here, TILE):
        block = start + tl.arange(0, TILE)
        begin = block * ITEM
        keep = (begin < SINKS) | (begin + ITEM > recent)
        if ALL:
            keep = begin >= 0
        else:
            for other in tl.static_range(UNION):
                line = (b * scored + begin_of + tl.minimum(other, size - 1)).to(tl.int64) * tl.num_programs(0) + local
                value = tl.load(masses + line * blocks + block, mask=block < here, other=float("-inf"))
                keep = keep | (value >= tl.load(edges + line * 2) - SLACK)
                if MIN_KEEP > 0:
                    keep = keep | ((value >= tl.load(edges + line * 2 + 1) - SLACK) & (value > -99.9))
        keep = keep & (block < here)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(lists + mine * blocks + place, block, mask=keep)
        count += tl.sum(keep.to(tl.int32), 0)
    tl.store(counts + mine, count)


@triton.jit
def _block_prefill(
    q, k, v, heads, kv_heads, sets, first, lists, counts, group0, rows, blocks, all_sets,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    out,
    SCALE: tl.constexpr, MIN_CONTEXT: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, ITEM: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (group, head, sequence): attention over the listed blocks; rows that do not choose are left alone."""
    local, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.load(heads + tl.program_id(1)).to(tl.int64)
    kv = tl.load(kv_heads + tl.program_id(1)).to(tl.int64)
    mine = (b * all_sets + tl.load(sets + tl.program_id(1))) * tl.num_programs(0) + local
    begin = tl.load(first + b)
    oldest, newest = _span(group0 + local, begin, rows, MIN_CONTEXT, ROWS)
    t = (group0 + local) * ROWS + tl.arange(0, BLOCK_M)
    row = t - begin
    chooses = (t >= oldest) & (t <= newest)
    d = tl.arange(0, BLOCK_D)
    wide = d < DIM
    q_at = q + b * q_batch + head * q_head + row[:, None].to(tl.int64) * q_row + d[None, :]
    query = tl.load(q_at, mask=chooses[:, None] & wide[None, :], other=0.0)
    k_at = k + b * k_batch + kv * k_head + d[:, None]
    v_at = v + b * v_batch + kv * v_head + d[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    count = tl.load(counts + mine) * ITEM
    for start in tl.range(0, count, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        if ITEM % BLOCK_N == 0:  # one block holds the tile: its keys lie side by side
            n = tl.load(lists + mine * blocks + start // ITEM) * ITEM + start % ITEM + tl.arange(0, BLOCK_N)
        else:
            n = tl.load(lists + mine * blocks + i // ITEM, mask=i < count, other=0) * ITEM + i % ITEM
        # What lies behind the group's rows is in no store yet.
        inside = (i < count) & (n <= newest)
        at = n.to(tl.int64)
        keys = tl.load(k_at + at[None, :] * k_row, mask=wide[:, None] & inside[None, :], other=0.0)
        values = tl.load(v_at + at[:, None] * v_row, mask=inside[:, None] & wide[None, :], other=0.0)
        seen = inside[None, :] & (n[None, :] <= t[:, None])
        s = tl.where(seen, tl.dot(query, keys, input_precision="tf32x3"), float("-inf"))
        acc, total, top = fold(acc, total, top, s, values, SCALE)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    o_at = out + b * o_batch + head * o_head + row[:, None].to(tl.int64) * o_row + d[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=chooses[:, None] & wide[None, :])


@dataclass(frozen=True)
class Lists:
    """The blocks that some groups keep: int32 [batch, sets, groups, blocks] and [batch, sets, groups]."""

    group: int  # the first group
    lists: Tensor
    counts: Tensor


def group_range(first: int, rows: int, lines: int, selector: Selector) -> list[tuple[int, int]]:
    """Groups that tokens ``first`` .. first + rows - 1 stand in, some at a time: (first one, how many).

    lines: sequences x scored heads.
    """
    start, stop = max(0, first) // selector.query_block, (first + rows - 1) // selector.query_block + 1
    each = 4 * lines * _votes(selector) * triton.cdiv(first + rows, selector.block)
    step = max(16, HELD // each)
    return [(group, min(step, stop - group)) for group in range(start, stop, step)]


def _votes(selector: Selector) -> int:
    """Rows of a group that vote, rounded up to a power of two."""
    return int(triton.next_power_of_2(-(-selector.query_block // selector.vote_every)))


def choose_lists(
    queries: Tensor, index: Tensor, first: Tensor, group: int, groups: int, tokens: int, selector: Selector,
    min_context: int, set_first: Tensor, set_members: Tensor, most: int, scales: Tensor | None = None,
) -> Lists:  # fmt: skip
    """What some groups keep.

    Args:
        queries: float32 [batch, scored heads, rows, rank], Wq q of the call's rows.
        index, scales: [batch, scored heads, slots, rank] and, in fp8, [batch, scored heads, slots, 1], as in
            :func:`sparsec.plugins.kernels.choose.score`.
        first: int32 [batch], the token number of row 0, negative where rows are padding.
        group, groups: which; tokens: the longest sequence, these rows included.
        set_first, set_members: int32 [sets], which scored heads a set is the union of; ``most``: so many at most.
    """
    batch, scored, rows, rank = queries.shape
    item = selector.block
    blocks, votes = triton.cdiv(tokens, item), _votes(selector)
    size = max(64, votes)
    packs = triton.cdiv(groups, size // votes)
    masses, edges = queries.new_empty(batch, scored, groups, blocks), queries.new_empty(batch, scored, groups, 2)
    shape = {"MIN_CONTEXT": min_context, "ROWS": selector.query_block, "ITEM": item}
    voting = {"EVERY": selector.vote_every, "VOTES": votes, "BLOCK_M": size}
    forced = {"SINKS": selector.sinks, "RECENT": max(1, selector.recent), "MIN_KEEP": -(-selector.min_keep // item)}
    if selector.top_p < 1:
        scores = queries.new_empty(batch, scored, packs, blocks, size)
        keys, of = max(16, item), scales if scales is not None else index
        _block_scores[triton.cdiv(blocks * item, max(WIDE, keys)), packs, batch * scored](
            queries, index, of, first, group, groups, rows, scored, blocks, *index.stride()[:3], *of.stride()[:2],
            scores,
            RANK=rank, BLOCK_R=max(16, triton.next_power_of_2(rank)), BLOCK_N=keys, WIDE=max(WIDE, keys),
            EXACT=index.element_size() > 2, FP8=scales is not None, **shape, **voting, num_warps=4, num_stages=3,
        )  # fmt: skip
        _group_edges[groups, batch * scored](
            scores, first, group, rows, scored, blocks, packs, masses, edges,
            P=selector.top_p, TILE=max(16, 4096 // votes), FAST=256, WAYS=WAYS, PASSES=PASSES, **forced, **shape,
            **voting, num_warps=4,
        )  # fmt: skip
    sets = len(set_first)
    lists = torch.empty(batch, sets, groups, blocks, dtype=torch.int32, device=queries.device)
    counts = torch.empty(batch, sets, groups, dtype=torch.int32, device=queries.device)
    _group_lists[groups, sets, batch](
        masses, edges, first, set_first, set_members, group, rows, scored, blocks, lists, counts,
        ALL=selector.top_p >= 1, UNION=most, SLACK=-math.log1p(-TIE), TILE=256, **forced, **shape,
        num_warps=4,
    )  # fmt: skip
    return Lists(group, lists, counts)


def block_prefill(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, heads: Tensor, kv_heads: Tensor, sets: Tensor, first: Tensor,
    chosen: Lists, selector: Selector, min_context: int, scale: float,
) -> None:  # fmt: skip
    """Attention of the groups' rows over their lists.

    Args:
        q, out: [batch, heads of the layer, rows, head_dim]; k, v: stores in order of token numbers.
        heads, kv_heads: int32 [n], which heads run, and where they read; sets: int32 [n], whose list each follows.
        Others: as in :func:`choose_lists`.
    """
    batch, _, rows, dim = q.shape
    _, all_sets, groups, blocks = chosen.lists.shape
    block_d = triton.next_power_of_2(dim)
    keys = min(64 if block_d <= 128 else 32, max(16, selector.block))
    # Keys of blocks smaller than a tile are gathered; only what lies side by side is loaded ahead.
    stages = 3 if selector.block >= keys and q.element_size() == 2 else 1
    _block_prefill[groups, len(heads), batch](
        q, k, v, heads, kv_heads, sets, first, chosen.lists, chosen.counts, chosen.group, rows, blocks, all_sets,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], out,
        SCALE=scale * math.log2(math.e), MIN_CONTEXT=min_context, ROWS=selector.query_block,
        BLOCK_M=max(16, int(triton.next_power_of_2(selector.query_block))), ITEM=selector.block,
        DIM=dim, BLOCK_D=block_d, BLOCK_N=keys, num_warps=4, num_stages=stages,
    )  # fmt: skip
