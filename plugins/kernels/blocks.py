"""Prefill of retrieval heads with the selector: groups of query rows choose blocks of keys, then attend to those.

What :mod:`sparsec.plugins.blocks` says, in four steps that hold no rows x keys: the selector's log-sum of every row
and key block; each group's mean mass of every block and the edge down to which blocks are kept; their list; flash
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
from sparsec.plugins.kernels.choose import PASSES, WAYS, _above, _narrowed
from sparsec.plugins.kernels.flash import fold
from sparsec.plugins.selector import TIE

HELD = 1 << 28  # bytes of log-sums at a time
WIDE = 8192  # query rows x keys a scoring program
EMPTY = tl.constexpr(-3.0e38)  # log of no mass; finite, so that differences stay numbers


@triton.jit
def _rows_of(group, first, rows, MIN_CONTEXT: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The group's token numbers, their rows, and which of them are in this call and choose."""
    m = tl.arange(0, BLOCK_M)
    t = group * ROWS + m
    row = t - first
    chooses = (m < ROWS) & (row >= 0) & (row < rows) & (t >= MIN_CONTEXT) & (t >= 0)
    return t, row, chooses


@triton.jit
def _block_scores(
    queries, index, first, group0, rows, scored, blocks, index_batch, index_head, index_row,
    scores,
    MIN_CONTEXT: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    ITEM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (WIDE keys, group, sequence x scored head): log-sums of blocks for every row of the group."""
    tile, local = tl.program_id(0), tl.program_id(1)
    b, h = tl.program_id(2) // scored, tl.program_id(2) % scored
    t, row, chooses = _rows_of(group0 + local, tl.load(first + b), rows, MIN_CONTEXT, ROWS, BLOCK_M)
    if (tile * WIDE <= tl.max(t, 0)) & (tl.max(chooses.to(tl.int32), 0) > 0):
        r = tl.arange(0, BLOCK_R)
        n = tile * WIDE + tl.arange(0, WIDE)
        line = (b * scored + h).to(tl.int64)
        q_at = queries + (line * rows + row[:, None]) * RANK + r[None, :]
        q = tl.load(q_at, mask=chooses[:, None] & (r < RANK)[None, :], other=0.0)
        k_at = index + b.to(tl.int64) * index_batch + h.to(tl.int64) * index_head
        k_at = k_at + n[None, :].to(tl.int64) * index_row + r[:, None]
        visible = n <= tl.max(tl.where(chooses, t, -1), 0)
        k = tl.load(k_at, mask=visible[None, :] & (r < RANK)[:, None], other=0.0)
        s = tl.dot(q, k.to(tl.float32), input_precision="tf32x3")
        s = tl.where(n[None, :] <= t[:, None], s, EMPTY)
        s = tl.reshape(s, [BLOCK_M, WIDE // ITEM, ITEM])
        top = tl.max(s, 2)
        total = tl.sum(tl.exp(s - top[:, :, None]), 2)
        value = tl.where(top == EMPTY, EMPTY, top + tl.log(total))
        block = tile * (WIDE // ITEM) + tl.arange(0, WIDE // ITEM)
        place = (line * tl.num_programs(1) + local) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(scores + place[:, None] * blocks + block[None, :], value, mask=(block < blocks)[None, :])


@triton.jit
def _group_edges(
    scores, first, group0, rows, scored, blocks,
    masses, edges,
    P: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, ITEM: tl.constexpr, TILE: tl.constexpr, WAYS: tl.constexpr,
    PASSES: tl.constexpr,
):  # fmt: skip
    """Program (group, sequence x scored head): the log of each block's mean mass, and the two edges."""
    local = tl.program_id(0)
    b = tl.program_id(1) // scored
    line = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + local
    t, _, chooses = _rows_of(group0 + local, tl.load(first + b), rows, MIN_CONTEXT, ROWS, BLOCK_M)
    newest = tl.max(tl.where(chooses, t, -1), 0)
    oldest = tl.min(tl.where(chooses, t, 2147483647), 0)
    count = tl.sum(chooses.to(tl.int32), 0)
    here = tl.where(newest >= 0, newest // ITEM + 1, 0)  # blocks that some row sees
    m = tl.arange(0, BLOCK_M)
    at = scores + (line * BLOCK_M + m[:, None]) * blocks
    top = tl.full([BLOCK_M], EMPTY, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, here, TILE):
        block = start + tl.arange(0, TILE)
        inside = (block < here)[None, :] & (block[None, :] * ITEM <= t[:, None]) & chooses[:, None]
        value = tl.load(at + block[None, :], mask=inside, other=EMPTY)
        higher = tl.maximum(top, tl.max(value, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.where(inside, tl.exp(value - higher[:, None]), 0.0), 1)
        top = higher
    lse = top + tl.log(tl.where(total > 0.0, total, 1.0))
    low = tl.full([TILE], float("inf"), tl.float32)
    high = tl.full([TILE], float("-inf"), tl.float32)
    for start in tl.range(0, here, TILE):
        block = start + tl.arange(0, TILE)
        inside = (block < here)[None, :] & (block[None, :] * ITEM <= t[:, None]) & chooses[:, None]
        value = tl.load(at + block[None, :], mask=inside, other=EMPTY)
        mass = tl.sum(tl.where(inside, tl.exp(value - lse[:, None]), 0.0), 0) / tl.maximum(count, 1)
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
            SINKS, MIN_KEEP, ITEM, TILE, WAYS,
        )  # fmt: skip
        edge, edge_far, step = _narrowed(mass, number, edge, edge_far, step, P, MIN_KEEP, WAYS)
    tl.store(edges + line * 2, edge)
    tl.store(edges + line * 2 + 1, edge_far)


@triton.jit
def _group_lists(
    masses, edges, first, group0, rows, scored, blocks,
    lists, counts,
    EVERY: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, ITEM: tl.constexpr, UNION: tl.constexpr, SLACK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (group, set, sequence): the blocks kept, ascending. A set is a scored head's, or the union of all."""
    local, which, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t, _, chooses = _rows_of(group0 + local, tl.load(first + b), rows, MIN_CONTEXT, ROWS, BLOCK_M)
    newest = tl.max(tl.where(chooses, t, -1), 0)
    recent = tl.min(tl.where(chooses, t, 2147483647), 0) - RECENT + 1
    here = tl.where(newest >= 0, newest // ITEM + 1, 0)
    mine = (b * tl.num_programs(1) + which).to(tl.int64) * tl.num_programs(0) + local
    count = 0
    for start in tl.range(0, here, TILE):
        block = start + tl.arange(0, TILE)
        begin = block * ITEM
        keep = (begin < SINKS) | (begin + ITEM > recent)
        if EVERY:
            keep = begin >= 0
        else:
            for other in tl.static_range(UNION):
                line = (b * scored + which + other).to(tl.int64) * tl.num_programs(0) + local
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
    t, row, chooses = _rows_of(group0 + local, tl.load(first + b), rows, MIN_CONTEXT, ROWS, BLOCK_M)
    oldest = tl.min(tl.where(chooses, t, 2147483647), 0)
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
        n = tl.load(lists + mine * blocks + i // ITEM, mask=i < count, other=0) * ITEM + i % ITEM
        # What lies behind the oldest row is behind all rows but needs no mask; there are few such blocks.
        seen = (i < count)[None, :] & (n[None, :] <= t[:, None])
        inside = (i < count) & (n <= oldest + BLOCK_M)
        at = n.to(tl.int64)
        keys = tl.load(k_at + at[None, :] * k_row, mask=wide[:, None] & inside[None, :], other=0.0)
        values = tl.load(v_at + at[:, None] * v_row, mask=inside[:, None] & wide[None, :], other=0.0)
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
    each = 4 * lines * _rows(selector) * triton.cdiv(first + rows, selector.block)
    step = max(16, HELD // each)
    return [(group, min(step, stop - group)) for group in range(start, stop, step)]


def _rows(selector: Selector) -> int:
    """Rows of a program's tile: a group's, rounded up to what the tensor cores take."""
    return max(16, int(triton.next_power_of_2(selector.query_block)))


def choose_lists(
    queries: Tensor, index: Tensor, first: Tensor, group: int, groups: int, tokens: int, selector: Selector,
    min_context: int,
) -> Lists:  # fmt: skip
    """What some groups keep.

    Args:
        queries: float32 [batch, scored heads, rows, rank], Wq q of the call's rows.
        index: [batch, scored heads, slots, rank], Wk k by token number.
        first: int32 [batch], the token number of row 0, negative where rows are padding.
        group, groups: which; tokens: the longest sequence, these rows included.
    """
    batch, scored, rows, rank = queries.shape
    item = selector.block
    blocks, size = triton.cdiv(tokens, item), _rows(selector)
    union = selector.scope == "layer"
    every = selector.top_p >= 1
    wide = max(WIDE // size, item)
    masses, edges = queries.new_empty(batch, scored, groups, blocks), queries.new_empty(batch, scored, groups, 2)
    shape = {"MIN_CONTEXT": min_context, "ROWS": selector.query_block, "BLOCK_M": size, "ITEM": item}
    forced = {"SINKS": selector.sinks, "RECENT": max(1, selector.recent), "MIN_KEEP": -(-selector.min_keep // item)}
    if not every:
        scores = queries.new_empty(batch, scored, groups, size, blocks)
        _block_scores[triton.cdiv(blocks * item, wide), groups, batch * scored](
            queries, index, first, group, rows, scored, blocks, *index.stride()[:3], scores,
            RANK=rank, BLOCK_R=max(16, triton.next_power_of_2(rank)), WIDE=wide, **shape, num_warps=4,
        )  # fmt: skip
        _group_edges[groups, batch * scored](
            scores, first, group, rows, scored, blocks, masses, edges,
            P=selector.top_p, TILE=64, WAYS=WAYS, PASSES=PASSES, **forced, **shape, num_warps=4,
        )  # fmt: skip
    sets = 1 if union else scored
    lists = torch.empty(batch, sets, groups, blocks, dtype=torch.int32, device=queries.device)
    counts = torch.empty(batch, sets, groups, dtype=torch.int32, device=queries.device)
    _group_lists[groups, sets, batch](
        masses, edges, first, group, rows, scored, blocks, lists, counts,
        EVERY=every, UNION=scored if union else 1, SLACK=-math.log1p(-TIE), TILE=256, **forced, **shape, num_warps=4,
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
    # With fewer than three stages Triton does not pipeline loads through a list.
    _block_prefill[groups, len(heads), batch](
        q, k, v, heads, kv_heads, sets, first, chosen.lists, chosen.counts, chosen.group, rows, blocks, all_sets,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], out,
        SCALE=scale * math.log2(math.e), MIN_CONTEXT=min_context, ROWS=selector.query_block,
        BLOCK_M=_rows(selector), ITEM=selector.block,
        DIM=dim, BLOCK_D=block_d, BLOCK_N=64 if block_d <= 128 else 32, num_warps=4, num_stages=3,
    )  # fmt: skip
