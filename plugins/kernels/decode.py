"""Decode: one query row of every sequence against a window, or against chosen tokens, split over the keys.

Caches lie in order of token numbers: token n of a full KV head in slot n; of a local KV head in slot n if n < sinks,
else in ``sinks + (n - sinks) mod ring``. Lengths are read on the device, so one captured graph serves every step.

A program attends from the query heads of one KV head (up to 16, a *group*) to one share of the keys and leaves a
partial result; :func:`combine` adds them up in a fixed order. Query heads that read the same keys share the loads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsec.plan import Selector, Window
from sparsec.plugins.kernels.flash import fold
from sparsec.plugins.selector import TIE

GROUP = 16  # query heads a program: what the tensor cores take at least
KEYS = 64  # keys a tile of a window, or of what ranges keep
LISTED, STAGES = 64, 2  # keys a tile of a list, which is divided in such steps, and tiles under way


@triton.jit
def _queries(q, q_batch, q_head, heads, group, b, d, wide):
    """The queries of a group, [16, BLOCK_D], and its heads, [16]; -1: no head."""
    m = tl.arange(0, 16)
    head = tl.load(heads + group * 16 + m)
    at = q + b * q_batch + head.to(tl.int64)[:, None] * q_head + d[None, :]
    return tl.load(at, mask=(head >= 0)[:, None] & wide[None, :], other=0.0), head


@triton.jit
def _tile(acc, total, top, query, k_at, v_at, slot, valid, k_row, v_row, wide, SCALE: tl.constexpr):
    slot = slot.to(tl.int64)
    k = tl.load(k_at + slot[None, :] * k_row, mask=wide[:, None] & valid[None, :], other=0.0)
    v = tl.load(v_at + slot[:, None] * v_row, mask=valid[:, None] & wide[None, :], other=0.0)
    s = tl.where(valid[None, :], tl.dot(query, k, input_precision="tf32x3"), float("-inf"))
    return fold(acc, total, top, s, v, SCALE)


@triton.jit
def _leave(acc, total, top, head, b, share, layer_heads, most, d, wide, partial, lse, DIM: tl.constexpr):
    """Write a partial result: the mean over the share's keys, and the logarithm (base 2) of their summed weights."""
    at = (b * layer_heads + head).to(tl.int64) * most + share
    there = head >= 0
    some = tl.where(total == 0.0, 1.0, total)
    tl.store(partial + at[:, None] * DIM + d[None, :], acc / some[:, None], mask=there[:, None] & wide[None, :])
    tl.store(lse + at, tl.where(total == 0.0, float("-inf"), top + tl.log2(some)), mask=there)


@triton.jit
def _near(
    query, k_at, v_at, n, share, shares, ring, row, wide,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MIN_CONTEXT: tl.constexpr, RING: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A share of the sinks and the window of n tokens, which lie in a ring or by token number."""
    count = tl.where(n <= MIN_CONTEXT, n, tl.minimum(n, SINKS + WINDOW))
    straight = tl.where(count == n, n, SINKS)  # so many of the keys are tokens 0, 1, …; the others end at the newest
    each = tl.cdiv(tl.cdiv(count, shares), BLOCK_N) * BLOCK_N
    start = share * each
    stop = tl.minimum(start + each, count)
    acc = tl.zeros([16, BLOCK_D], tl.float32)
    total = tl.zeros([16], tl.float32)
    top = tl.full([16], float("-inf"), tl.float32)
    for first in tl.range(start, stop, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        token = tl.where(i < straight, i, n - count + i)
        slot = token
        if RING > 0:
            slot = tl.where((token < SINKS) | (ring == 0), token, SINKS + (token - SINKS) % RING)
        acc, total, top = _tile(acc, total, top, query, k_at, v_at, slot, i < stop, row, row, wide, SCALE)
    return acc, total, top


@triton.jit
def _listed(
    query, k_at, v_at, mine, keys, n, share, shares, k_row, v_row, wide,
    SCALE: tl.constexpr, ITEM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A share of the ``keys`` in the items that a list names."""
    each = tl.cdiv(tl.cdiv(keys, shares), BLOCK_N) * BLOCK_N
    start = share * each
    stop = tl.minimum(start + each, keys)
    acc = tl.zeros([16, BLOCK_D], tl.float32)
    total = tl.zeros([16], tl.float32)
    top = tl.full([16], float("-inf"), tl.float32)
    for at in tl.range(start, stop, BLOCK_N):
        i = at + tl.arange(0, BLOCK_N)
        if ITEM % BLOCK_N == 0:  # one block holds the tile: its keys lie side by side
            slot = tl.load(mine + at // ITEM) * ITEM + at % ITEM + tl.arange(0, BLOCK_N)
        else:
            slot = tl.load(mine + i // ITEM, mask=i < stop, other=0) * ITEM + i % ITEM
        valid = (i < stop) & (slot < n)
        acc, total, top = _tile(acc, total, top, query, k_at, v_at, slot, valid, k_row, v_row, wide, SCALE)
    return acc, total, top


@triton.jit
def _mean(partial, lse, row, count, d, DIM: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr):
    """The weighted mean of the ``count`` shares of one head that begin at ``row``, [BLOCK_D]."""
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = tl.zeros([STEP], tl.float32)
    top = tl.full([STEP], float("-inf"), tl.float32)
    for start in tl.range(0, count, STEP):
        i = start + tl.arange(0, STEP)
        top = tl.maximum(top, tl.load(lse + row + i, mask=i < count, other=float("-inf")))
    most_of_all = tl.max(top, 0)
    for start in tl.range(0, count, STEP):
        i = start + tl.arange(0, STEP)
        weight = tl.exp2(tl.load(lse + row + i, mask=i < count, other=float("-inf")) - most_of_all)
        at = partial + (row + i)[:, None] * DIM + d[None, :]
        part = tl.load(at, mask=(weight > 0.0)[:, None] & (d < DIM)[None, :], other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
        total += weight
    return acc / tl.sum(total, 0)


@triton.jit
def _window_decode(
    q, near_k, near_v, far_k, far_v, lengths, heads, kv_heads, near_groups,
    q_batch, q_head, near_batch, near_head, near_row, far_batch, far_head, far_row, layer_heads, shares, most,
    partial, lse,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MIN_CONTEXT: tl.constexpr, RING: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (share of the keys, group, sequence). The first groups read the ring, the others by token number."""
    share, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(lengths + b) + 1
    kv = tl.load(kv_heads + group).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    wide = d < DIM
    query, head = _queries(q, q_batch, q_head, heads, group, b.to(tl.int64), d, wide)
    near = group < near_groups
    if near:
        at = b.to(tl.int64) * near_batch + kv * near_head
        k_at, v_at = near_k + at, near_v + at
    else:
        at = b.to(tl.int64) * far_batch + kv * far_head
        k_at, v_at = far_k + at, far_v + at
    row = tl.where(near, near_row, far_row)
    acc, total, top = _near(
        query, k_at + d[:, None], v_at + d[None, :], n, share, shares, near, row, wide,
        SCALE, WINDOW, SINKS, MIN_CONTEXT, RING, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    _leave(acc, total, top, head, b, share, layer_heads, most, d, wide, partial, lse, DIM)


@triton.jit
def _chosen_decode(
    q, k, v, lengths, heads, kv_heads, values, totals, edges, sets, first, members,
    q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row, layer_heads, most, scored, items,
    lists, partial, lse,
    SCALE: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr,
    MIN_CONTEXT: tl.constexpr, EVERY: tl.constexpr, ITEM: tl.constexpr, UNION: tl.constexpr, SLACK: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Program (range of items, group, sequence). An item is a token or a block of ITEM tokens."""
    share, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(lengths + b) + 1
    item = share * RANGE + tl.arange(0, RANGE)
    begin = item * ITEM
    there = begin < n
    keep = (begin < tl.where(n <= MIN_CONTEXT, n, SINKS)) | (tl.minimum(begin + ITEM, n) > n - RECENT)
    if EVERY:
        keep = there
    else:
        which = tl.load(sets + group)
        begin_of, size = tl.load(first + which), tl.load(members + which)
        for other in tl.static_range(UNION):
            row = (b * scored + begin_of + tl.minimum(other, size - 1)).to(tl.int64)
            value = tl.load(values + row * items + item, mask=there, other=float("-inf"))
            keep = keep | (value >= tl.load(edges + row * 2) - SLACK)
            if MIN_KEEP > 0:
                some = tl.exp(value - tl.load(totals + row)) > 0.0
                keep = keep | ((value >= tl.load(edges + row * 2 + 1) - SLACK) & some)
    keep = keep & there
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    count = tl.sum(keep.to(tl.int32), 0) * ITEM
    mine = lists + ((b * tl.num_programs(1) + group).to(tl.int64) * tl.num_programs(0) + share) * RANGE
    tl.store(mine + place, item, mask=keep)
    tl.debug_barrier()  # the list is written and read by different threads of this program

    kv = tl.load(kv_heads + group).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    wide = d < DIM
    query, head = _queries(q, q_batch, q_head, heads, group, b.to(tl.int64), d, wide)
    k_at = k + b.to(tl.int64) * k_batch + kv * k_head + d[:, None]
    v_at = v + b.to(tl.int64) * v_batch + kv * v_head + d[None, :]
    acc = tl.zeros([16, BLOCK_D], tl.float32)
    total = tl.zeros([16], tl.float32)
    top = tl.full([16], float("-inf"), tl.float32)
    for at in tl.range(0, count, BLOCK_N):
        i = at + tl.arange(0, BLOCK_N)
        if ITEM % BLOCK_N == 0:  # one block holds the tile: its keys lie side by side
            slot = tl.load(mine + at // ITEM) * ITEM + at % ITEM + tl.arange(0, BLOCK_N)
        else:
            slot = tl.load(mine + i // ITEM, mask=i < count, other=0) * ITEM + i % ITEM
        valid = (i < count) & (slot < n)
        acc, total, top = _tile(acc, total, top, query, k_at, v_at, slot, valid, k_row, v_row, wide, SCALE)
    _leave(acc, total, top, head, b, share, layer_heads, most, d, wide, partial, lse, DIM)


@triton.jit
def _listed_decode(
    q, k, v, lengths, heads, kv_heads, lists, counts, sets,
    q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row, layer_heads, most, all_sets, items,
    partial, lse,
    SCALE: tl.constexpr, ITEM: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (share of the list, group, sequence)."""
    share, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(lengths + b) + 1
    kv = tl.load(kv_heads + group).to(tl.int64)
    line = (b * all_sets + tl.load(sets + group)).to(tl.int64)
    keys = tl.load(counts + line) * ITEM
    mine = lists + line * items
    d = tl.arange(0, BLOCK_D)
    wide = d < DIM
    query, head = _queries(q, q_batch, q_head, heads, group, b.to(tl.int64), d, wide)
    k_at = k + b.to(tl.int64) * k_batch + kv * k_head + d[:, None]
    v_at = v + b.to(tl.int64) * v_batch + kv * v_head + d[None, :]
    acc, total, top = _listed(
        query, k_at, v_at, mine, keys, n, share, tl.num_programs(0), k_row, v_row, wide, SCALE, ITEM, BLOCK_D, BLOCK_N
    )
    _leave(acc, total, top, head, b, share, layer_heads, most, d, wide, partial, lse, DIM)


@triton.jit(do_not_specialize=["count_it"])
def _combine(
    partial, lse, shares, most, layer_heads, o_batch, o_head, count_it, out, lengths,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program (query head, sequence): the weighted mean of its shares; the layer's last kernel counts the new token."""
    head, b = tl.program_id(0), tl.program_id(1)
    row = (b * layer_heads + head).to(tl.int64) * most
    count = tl.load(shares + head)
    d = tl.arange(0, BLOCK_D)
    mean = _mean(partial, lse, row, count, d, DIM, BLOCK_D, STEP)
    at = out + b.to(tl.int64) * o_batch + head.to(tl.int64) * o_head + d
    tl.store(at, mean.to(out.dtype.element_ty), mask=d < DIM)
    tl.store(lengths + b, tl.load(lengths + b) + 1, mask=(head == 0) & (count_it != 0))


def window_decode(
    q: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    lengths: Tensor,
    heads: Tensor,
    kv_heads: Tensor,
    near_groups: int,
    window: Window,
    min_context: int,
    scale: float,
    ring: int,
    shares: int,
    partial: Tensor,
    lse: Tensor,
) -> None:
    """Local heads: sinks and window.

    Args:
        q: [batch, heads of the layer, 1, head_dim].
        near, far: keys and values, [batch, KV heads, slots, head_dim] each, of a ring and by token number.
        lengths: int32 [batch], tokens before the row's own, which is in the cache already.
        heads: int32 [groups, 16], -1 where there is none; kv_heads: int32 [groups], where each reads.
        near_groups: so many of the groups, the first ones, read ``near``.
        ring: slots behind the sinks of ``near`` that are used over again.
        shares: how many programs divide a group's keys.
        partial, lse: float32 [batch, heads, most shares, head_dim] and [batch, heads, most shares].
    """
    batch, layer_heads, _, dim = q.shape
    _window_decode[shares, len(heads), batch](
        q, *near, *far, lengths, heads, kv_heads, near_groups,
        *q.stride()[:2], *near[0].stride()[:3], *far[0].stride()[:3], layer_heads, shares, lse.shape[2],
        partial, lse,
        SCALE=scale * math.log2(math.e), WINDOW=window.size, SINKS=window.sinks, MIN_CONTEXT=min_context,
        RING=ring, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_N=KEYS, num_warps=4, num_stages=3,
    )  # fmt: skip


def listed_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    heads: Tensor,
    kv_heads: Tensor,
    lists: Tensor,
    counts: Tensor,
    sets: Tensor,
    item: int,
    scale: float,
    shares: int,
    partial: Tensor,
    lse: Tensor,
) -> None:
    """Retrieval heads: exact attention on listed items.

    Args:
        lists, counts: int32 [batch, sets, items] and [batch, sets], as :mod:`sparsec.plugins.kernels.lists` leaves
            them; of a shared layer the full layer's below.
        sets: int32 [groups], which list a group follows.
        item: tokens an item.
        Others: as in :func:`window_decode`.
    """
    batch, layer_heads, _, dim = q.shape
    _listed_decode[shares, len(heads), batch](
        q, k, v, lengths, heads, kv_heads, lists, counts, sets,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], layer_heads, lse.shape[2], *lists.shape[1:], partial, lse,
        SCALE=scale * math.log2(math.e), ITEM=item, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_N=LISTED,
        num_warps=4, num_stages=STAGES,
    )  # fmt: skip


def chosen_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    heads: Tensor,
    kv_heads: Tensor,
    values: Tensor,
    totals: Tensor,
    edges: Tensor,
    sets: Tensor,
    first: Tensor,
    members: Tensor,
    most: int,
    selector: Selector,
    min_context: int,
    scale: float,
    lists: Tensor,
    partial: Tensor,
    lse: Tensor,
) -> None:
    """Retrieval heads: exact attention on what the selector keeps, where its items are too many for one list.

    Args:
        values: float32 [batch, scored heads, items], totals: [batch, scored heads], edges: [batch, scored heads, 2],
            as :mod:`sparsec.plugins.kernels.choose` leaves them; of a shared layer the full layer's below.
        sets: int32 [groups], the set that a group follows.
        first, members: int32 [sets], which scored heads a set is the union of; ``most``: so many at most.
        lists: int32 [batch, groups, ranges, RANGE], scratch; ranges x RANGE covers the items.
        Others: as in :func:`window_decode`.
    """
    batch, layer_heads, _, dim = q.shape
    ranges, size = lists.shape[2:]
    _chosen_decode[ranges, len(heads), batch](
        q, k, v, lengths, heads, kv_heads, values, totals, edges, sets, first, members,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], layer_heads, lse.shape[2], *values.shape[1:],
        lists, partial, lse,
        SCALE=scale * math.log2(math.e), SINKS=selector.sinks, RECENT=selector.recent, MIN_KEEP=selector.min_keep,
        MIN_CONTEXT=min_context, EVERY=selector.top_p >= 1,
        ITEM=selector.block if selector.granularity == "block" else 1,
        UNION=most, SLACK=-math.log1p(-TIE),
        DIM=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_N=KEYS, RANGE=size, num_warps=4, num_stages=3,
    )  # fmt: skip


def combine(partial: Tensor, lse: Tensor, shares: Tensor, out: Tensor, lengths: Tensor, count: bool = True) -> None:
    """Add up what the shares left, and count the new token.

    shares: int32 [heads], how many each head has; out: [batch, heads, 1, head_dim]; lengths: int32 [batch], + 1.
    """
    batch, heads, most, dim = partial.shape
    _combine[heads, batch](
        partial, lse, shares, most, heads, *out.stride()[:2], int(count), out, lengths,
        DIM=dim, BLOCK_D=triton.next_power_of_2(dim), STEP=min(64, triton.next_power_of_2(most)), num_warps=4,
    )  # fmt: skip


def groups_of(heads: dict[int, list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables for the kernels: query heads by KV head -> int32 [groups, 16] and int32 [groups]."""
    rows, where = [], []
    for kv, own in heads.items():
        for start in range(0, len(own), GROUP):
            part = own[start : start + GROUP]
            rows.append(part + [-1] * (GROUP - len(part)))
            where.append(kv)
    return (
        torch.tensor(rows, dtype=torch.int32, device=device).view(-1, GROUP),
        torch.tensor(where, dtype=torch.int32, device=device),
    )
