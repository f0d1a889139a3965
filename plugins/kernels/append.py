"""The first kernel of a decode step: the new token's keys and values go to their slots, its query is projected.

One launch writes the ring of local KV heads, the store of full KV heads and the index keys, and leaves the projected
queries of the layer's retrieval heads. Where the selector reads q and k before RoPE, the rotation is undone here.
"""
# ruff: noqa: SIM102  (a condition on a constant and one on a run-time value cannot be one condition in Triton)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsec.plugins.kernels.coarse import mean_of_block


@triton.jit
def _copy(source, to, d, wide):
    tl.store(to + d, tl.load(source + d, mask=wide, other=0.0), mask=wide)


@triton.jit
def _project(x, weight, cos, sin, d, wide, r, DIM: tl.constexpr, RANK: tl.constexpr, ROTARY: tl.constexpr):
    """weight [RANK, DIM] times x [DIM], float32; ROTARY > 0: the rotation of the first so many dimensions is undone."""
    value = tl.load(x + d, mask=wide, other=0.0).to(tl.float32)
    if ROTARY > 0:
        turns = d < ROTARY
        half = d < ROTARY // 2
        partner = tl.load(x + tl.where(half, d + ROTARY // 2, d - ROTARY // 2), mask=turns, other=0.0).to(tl.float32)
        c = tl.load(cos + d, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + d, mask=turns, other=0.0).to(tl.float32)
        first_c, first_s = tl.load(cos).to(tl.float32), tl.load(sin).to(tl.float32)
        back = (value * c - tl.where(half, -partner, partner) * s) / (first_c * first_c + first_s * first_s)
        value = tl.where(turns, back, value)
    w = tl.load(weight + r[:, None] * DIM + d[None, :], mask=(r < RANK)[:, None] & wide[None, :], other=0.0)
    return tl.sum(w * value[None, :], 1)


@triton.jit
def _eight_bits(key):
    """A key's e4m3 numbers as bytes, and the exponent of its scale: what sparsec.plugins.index_keys.stored gives.

    Rounded in float32 and integers, to the nearest and to the even one: the GPUs' own conversion does no other.
    """
    exponent = tl.maximum((tl.max(tl.abs(key), 0).to(tl.int32, bitcast=True) >> 23) - 7, 1)
    x = tl.abs(key) * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20  # three bits of the fraction remain
    small = ((x + 24576.0) - 24576.0) * 512.0  # below 2^-6 numbers are multiples of 2^-9
    code = tl.where(x < 0.015625, small.to(tl.int32), bits - (120 << 3))
    return tl.where(key < 0.0, code + 128, code), exponent


@triton.jit
def _append(
    q, k, v, cos, sin, q_proj, k_proj, lengths, kv_place, retrieval, retrieval_kv,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, rope_batch, kv_heads, scored,
    ring, near_batch, near_head, near_row, far_batch, far_head, far_row, index_batch, index_head, index_row,
    scale_batch, scale_head, means, mean_batch, mean_head, mean_row,
    near_k, near_v, far_k, far_v, index, scales, queries,
    SINKS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    ROTARY: tl.constexpr, FP8: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """Program (KV head, or behind them retrieval head; sequence)."""
    task, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(lengths + b).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    wide = d < DIM
    if task < kv_heads:
        place = tl.load(kv_place + task).to(tl.int64)  # full KV heads count from 0, local ones down from -1
        from_k = k + b * k_batch + task * k_head
        from_v = v + b * v_batch + task * v_head
        if place >= 0:
            at = b * far_batch + place * far_head + n * far_row
            _copy(from_k, far_k + at, d, wide)
            _copy(from_v, far_v + at, d, wide)
        else:
            slot = tl.where(n < SINKS, n, SINKS + (n - SINKS) % ring)
            at = b * near_batch + (-1 - place) * near_head + slot * near_row
            _copy(from_k, near_k + at, d, wide)
            _copy(from_v, near_v + at, d, wide)
    else:
        h = (task - kv_heads).to(tl.int64)
        r = tl.arange(0, BLOCK_R)
        head, kv = tl.load(retrieval + h), tl.load(retrieval_kv + h)
        c, s = cos + b * rope_batch, sin + b * rope_batch
        query = _project(q + b * q_batch + head * q_head, q_proj + h * RANK * DIM, c, s, d, wide, r, DIM, RANK, ROTARY)
        tl.store(queries + (b * scored + h) * RANK + r, query, mask=r < RANK)
        key = _project(k + b * k_batch + kv * k_head, k_proj + h * RANK * DIM, c, s, d, wide, r, DIM, RANK, ROTARY)
        to = index + b * index_batch + h * index_head + n * index_row
        if FP8:
            key, exponent = _eight_bits(key)
            tl.store(scales + b * scale_batch + h * scale_head + n, exponent.to(tl.uint8))
        tl.store(to + r, key.to(index.dtype.element_ty), mask=r < RANK)
        if COARSE > 0:
            if n % COARSE == COARSE - 1:
                tl.debug_barrier()  # the key is written and read by different threads of this program
                own, own_scales = index + b * index_batch + h * index_head, scales + b * scale_batch + h * scale_head
                own_means = means + b * mean_batch + h * mean_head
                mean_of_block(own, own_scales, own_means, index_row, mean_row, n, r, RANK, COARSE, FP8)


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    projections: tuple[Tensor, Tensor] | None,
    lengths: Tensor,
    kv_place: Tensor,
    retrieval: Tensor,
    retrieval_kv: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    index: Tensor,
    queries: Tensor,
    sinks: int,
    scales: Tensor | None = None,
    means: Tensor | None = None,
    block: int = 0,
) -> None:
    """Store the new token of every sequence.

    Args:
        q: [batch, heads, 1, head_dim]; k, v: [batch, KV heads, 1, head_dim].
        rope: cos and sin, [batch or 1, 1, rotary dims], where the selector reads before the rotary embedding.
        projections: Wq and Wk, float32 [retrieval heads, rank, head_dim]; None: nothing is projected.
        lengths: int32 [batch], tokens so far: the new one's number.
        kv_place: int32 [KV heads]: i of ``far``, or -1 - i of ``near``.
        retrieval, retrieval_kv: int32 [retrieval heads], query heads and the KV heads they read.
        near, far: keys and values of local KV heads, [batch, local, sinks + ring, head_dim], and of full ones,
            [batch, full, slots, head_dim].
        index, scales: [batch, retrieval heads, slots, rank] and, in fp8, [batch, retrieval heads, slots, 1], as in
            :func:`sparsec.plugins.kernels.choose.score`.
        queries: float32 [batch, retrieval heads, rank].
        means: of a coarse level, [batch, retrieval heads, blocks, rank]; ``block``: tokens a block.
    """
    batch, _, _, dim = q.shape
    wq, wk = projections if projections is not None else (queries, queries)
    cos, sin = rope if rope is not None else (queries, queries)
    scored, rank = index.shape[1], index.shape[3]
    of, coarse = scales if scales is not None else index, means if means is not None else index
    tasks = k.shape[1] + (scored if projections is not None else 0)
    _append[tasks, batch](
        q, k, v, cos, sin, wq, wk, lengths, kv_place, retrieval, retrieval_kv,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0) if cos.shape[0] > 1 else 0, k.shape[1],
        scored, near[0].shape[2] - sinks, *near[0].stride()[:3], *far[0].stride()[:3], *index.stride()[:3],
        *of.stride()[:2], coarse, *coarse.stride()[:3], *near, *far, index, of, queries,
        SINKS=sinks, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), RANK=rank, BLOCK_R=triton.next_power_of_2(rank),
        ROTARY=cos.shape[-1] if rope is not None else 0, FP8=scales is not None,
        COARSE=block if means is not None else 0, num_warps=4,
    )  # fmt: skip
