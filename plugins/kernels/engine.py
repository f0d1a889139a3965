"""Decode attention as kernels of an engine: compiled ahead of time, launched by TensorRT without Python.

The same steps as in :mod:`sparsec.plugins.kernels.decode`, in the order of parameters that TensorRT's ahead-of-time
plugins want: inputs, integers, outputs. Tensors are dense in memory. Instead of tables, query heads are equal runs on
the KV heads that ``KV_HEADS`` names: run r, GROUP heads, reads KV head KV_HEADS[r]. ``lengths`` are int64, as in the
graphs, and count the tokens before the row's own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsec.plugins.kernels.choose import _above, _log_sum, _narrowed, _scored
from sparsec.plugins.kernels.decode import _leave, _listed, _mean, _near
from sparsec.plugins.kernels.lists import _forced, _kept


@triton.jit
def _run(q, group, b, heads, d, wide, GROUP: tl.constexpr, DIM: tl.constexpr):
    """The queries of a program's group, [16, BLOCK_D], its heads, [16], -1: no head, and the run that they are of."""
    parts = (GROUP + 15) // 16
    m = group % parts * 16 + tl.arange(0, 16)
    run = group // parts
    head = tl.where(m < GROUP, run * GROUP + m, -1)
    at = q + (b * heads + head).to(tl.int64)[:, None] * DIM + d[None, :]
    return tl.load(at, mask=(head >= 0)[:, None] & wide[None, :], other=0.0), head, run


@triton.jit
def _store_of(run, b, stores, slots, KV_HEADS: tl.constexpr, DIM: tl.constexpr):
    """Where the keys of a run begin."""
    kv = run * 0
    for r in tl.static_range(len(KV_HEADS)):
        kv = tl.where(run == r, KV_HEADS[r], kv)
    return (b * stores + kv).to(tl.int64) * slots * DIM


@triton.jit
def near_shares(
    q, k, v, lengths,
    heads, stores, slots,
    partial, lse,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MIN_CONTEXT: tl.constexpr, RING: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (share of the keys, group, sequence) of local heads. RING 0: token n is in slot n.

    q: [batch, heads, 1, DIM]; k, v: [batch, stores, slots, DIM]; partial, lse: float32 [batch, heads, shares, DIM] and
    [batch, heads, shares].
    """
    share, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(lengths + b).to(tl.int32) + 1
    d = tl.arange(0, BLOCK_D)
    wide = d < DIM
    query, head, run = _run(q, group, b, heads, d, wide, GROUP, DIM)
    at = _store_of(run, b, stores, slots, KV_HEADS, DIM)
    acc, total, top = _near(
        query, k + at + d[:, None], v + at + d[None, :], n, share, tl.num_programs(0), 1, DIM, wide,
        SCALE, WINDOW, SINKS, MIN_CONTEXT, RING, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    _leave(acc, total, top, head, b, share, heads, tl.num_programs(0), d, wide, partial, lse, DIM)


@triton.jit
def score_items(
    queries, index, lengths,
    heads, slots, items,
    values,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, ITEM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (chunk of tokens, head, sequence) of the selector's scores, by items of ITEM tokens.

    queries: float32 [batch, heads, 1, RANK]; index: [batch, heads, slots, RANK]; values: float32 [batch, heads, items].
    """
    chunk, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(lengths + b).to(tl.int32) + 1
    line = (b * heads + h).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    r = tl.arange(0, BLOCK_R)
    query = tl.load(queries + line * RANK + r, mask=r < RANK, other=0.0)
    value = _scored(index + line * slots * RANK, index, RANK, token, token < n, query, r, RANK, False)
    if ITEM > 1:
        value = _log_sum(value, CHUNK, ITEM)
    item = chunk * (CHUNK // ITEM) + tl.arange(0, CHUNK // ITEM)
    tl.store(values + line * items + item, value, mask=item < items)


@triton.jit
def _edges(
    values, line, items, here, n,
    P: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, ITEM: tl.constexpr,
    TILE: tl.constexpr, WAYS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """The log of all weights of a head's ``here`` items, the edge of the top-p set, and that of the floor.

    How many items there can be is known when an engine runs, so they are read again in every pass.
    """
    i = tl.arange(0, TILE)
    tops = tl.full([TILE], float("-inf"), tl.float32)
    lows = tl.full([TILE], float("inf"), tl.float32)
    for start in tl.range(0, here, TILE):
        value = tl.load(values + line * items + start + i, mask=start + i < here, other=float("-inf"))
        tops = tl.maximum(tops, value)
        lows = tl.minimum(lows, tl.where(start + i < here, value, float("inf")))
    top = tl.max(tops, 0)
    sums = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, here, TILE):
        value = tl.load(values + line * items + start + i, mask=start + i < here, other=float("-inf"))
        sums += tl.exp(value - top)
    lse = top + tl.log(tl.sum(sums, 0))
    # A weight below exp(-100) is nothing to float32. The margin keeps the smallest item above the interval's low end.
    low = tl.maximum(tl.min(lows, 0), lse - 100.0) - 1e-3
    low_far = low
    step = (top - low) / WAYS
    for _ in tl.range(0, PASSES):
        mass, number = _above(
            values, line, items, n, n - RECENT, 0, here, lse, low, low_far, step, SINKS, MIN_KEEP, ITEM, TILE, WAYS
        )
        low, low_far, step = _narrowed(mass, number, low, low_far, step, P, MIN_KEEP, WAYS)
    return lse, low, low_far


@triton.jit
def keep_items(
    values, lengths,
    heads, items, slots,
    keep,
    P: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    ITEM: tl.constexpr, TILE: tl.constexpr, WAYS: tl.constexpr, PASSES: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """Program (head, sequence): which tokens a head keeps, keep: bytes [batch, heads, slots], by its items' values."""
    h, b = tl.program_id(0), tl.program_id(1)
    n = tl.load(lengths + b).to(tl.int32) + 1
    line = (b * heads + h).to(tl.int64)
    at = values + line * items
    lse, edge, edge_far = _edges(
        values, line, items, tl.cdiv(n, ITEM), n, P, SINKS, RECENT, MIN_KEEP, ITEM, TILE, WAYS, PASSES
    )
    for start in tl.range(0, slots, TILE):
        token = start + tl.arange(0, TILE)
        begin = token // ITEM * ITEM
        value = tl.load(at + token // ITEM, mask=token < n, other=float("-inf"))
        kept = _forced(begin, n, SINKS, RECENT, MIN_CONTEXT, ITEM) | _kept(value, edge, edge_far, lse, MIN_KEEP, SLACK)
        if P >= 1:
            kept = token >= 0
        tl.store(keep + line * slots + token, (kept & (token < n)).to(tl.int8), mask=token < slots)


@triton.jit
def list_kept(keep, slots, lists, counts, TILE: tl.constexpr):
    """Program (set, sequence): the slots that are kept, in order. keep: bytes [batch, sets, slots]; lists: int32."""
    line = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    at = line.to(tl.int64) * slots
    count = 0
    for start in tl.range(0, slots, TILE):
        i = start + tl.arange(0, TILE)
        kept = (tl.load(keep + at + i, mask=i < slots, other=0) != 0).to(tl.int32)
        tl.store(lists + at + count + tl.cumsum(kept, 0) - 1, i, mask=kept != 0)
        count += tl.sum(kept, 0)
    tl.store(counts + line, count)


@triton.jit
def listed_shares(
    q, k, v, lists, counts,
    heads, stores, slots, sets,
    partial, lse,
    SCALE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (share of the list, group, sequence) of retrieval heads, on what :func:`list_kept` left.

    A set is of one run, or the one of all.
    """
    share, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    wide = d < DIM
    query, head, run = _run(q, group, b, heads, d, wide, GROUP, DIM)
    at = _store_of(run, b, stores, slots, KV_HEADS, DIM)
    line = b * sets + tl.where(sets == 1, 0, run)
    mine = lists + line.to(tl.int64) * slots
    acc, total, top = _listed(
        query, k + at + d[:, None], v + at + d[None, :], mine, tl.load(counts + line), slots, share,
        tl.num_programs(0), DIM, DIM, wide, SCALE, 1, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    _leave(acc, total, top, head, b, share, heads, tl.num_programs(0), d, wide, partial, lse, DIM)


@triton.jit
def combine_shares(
    partial, lse, like, shares, out, DIM: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Program (query head, sequence): the weighted mean of its shares. ``like`` gives ``out`` its type."""
    line = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    mean = _mean(partial, lse, line.to(tl.int64) * shares, shares, d, DIM, BLOCK_D, STEP)
    tl.store(out + line.to(tl.int64) * DIM + d, mean.to(out.dtype.element_ty), mask=d < DIM)
