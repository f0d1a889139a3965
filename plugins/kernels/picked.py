"""Causal attention of rows that routers picked: query rows are a list, keys are all of them.

Queries come as the projection left them, one behind the other, [1, heads, count, head_dim]; who they are is read from
the list. Dense, or in a plan's window and sinks. Nothing is padded or repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsec.plan import Plan
from sparsec.plugins.kernels.flash import fold
from sparsec.plugins.kernels.support import launching_on
from sparsec.plugins.kernels.window import tiles


@triton.jit
def _seen(
    acc, total, top, query, k_at, v_at, numbers, t, column, n, k_row, v_row, wide, keys,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MIN_CONTEXT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys, in the columns n; numbers: of the sequence's tokens, -1 is padding."""
    inside = n < keys
    k = tl.load(k_at + n[None, :].to(tl.int64) * k_row, mask=wide[:, None] & inside[None, :], other=0.0)
    v = tl.load(v_at + n[:, None].to(tl.int64) * v_row, mask=inside[:, None] & wide[None, :], other=0.0)
    s = tl.dot(query, k, input_precision="tf32x3")
    if MASKED:
        j = tl.load(numbers + n, mask=inside, other=-1)
        seen = (j >= 0)[None, :] & (n[None, :] <= column[:, None])
        if WINDOW > 0:
            near = (t[:, None] - j[None, :] < WINDOW) | (j[None, :] < SINKS) | (t[:, None] < MIN_CONTEXT)
            seen = seen & near
        s = tl.where(seen, s, float("-inf"))
    return fold(acc, total, top, s, v, SCALE)


@triton.jit
def _picked(
    q, k, v, on, before, numbers, kv_heads,
    keys, new, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, n_batch, o_head, o_row,
    out,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MIN_CONTEXT: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (tile of a sequence's picked rows, the last ones first; head; sequence). WINDOW 0: there is none."""
    b = tl.program_id(2).to(tl.int64)
    begin, end = tl.load(before + b * new), tl.load(before + (b + 1) * new)
    start = begin + (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if start < end:
        h = tl.program_id(1).to(tl.int64)
        kv = tl.load(kv_heads + h)
        i, d = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        there, wide = i < end, d < DIM
        column = keys - new + (tl.load(on + i, mask=there, other=0) % new).to(tl.int32)
        first, last = tl.min(tl.where(there, column, keys), 0), tl.max(tl.where(there, column, 0), 0)
        numbers_at = numbers + b * n_batch
        t = tl.load(numbers_at + column, mask=there, other=0)
        row = i[:, None].to(tl.int64)
        query = tl.load(q + h * q_head + row * q_row + d[None, :], mask=there[:, None] & wide[None, :], other=0.0)
        k_at, v_at = k + b * k_batch + kv * k_head + d[:, None], v + b * v_batch + kv * v_head + d[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        low = 0
        if WINDOW > 0:
            # Token numbers grow by one a column at least: a key that is a window's columns away is out of it.
            low = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
            if PADDED | (tl.min(tl.where(there, t, MIN_CONTEXT), 0) < MIN_CONTEXT):
                low = 0
            for at in tl.range(0, tl.minimum(low, SINKS), BLOCK_N):
                n = at + tl.arange(0, BLOCK_N)
                acc, total, top = _seen(
                    acc, total, top, query, k_at, v_at, numbers_at, t, column, n, k_row, v_row, wide, keys,
                    SCALE, WINDOW, SINKS, MIN_CONTEXT, True,
                )  # fmt: skip
        elif not PADDED:
            # Every row of the tile sees the columns before its first row: no mask is needed there.
            low = (first + 1) // BLOCK_N * BLOCK_N
            for at in tl.range(0, low, BLOCK_N):
                n = at + tl.arange(0, BLOCK_N)
                acc, total, top = _seen(
                    acc, total, top, query, k_at, v_at, numbers_at, t, column, n, k_row, v_row, wide, keys,
                    SCALE, WINDOW, SINKS, MIN_CONTEXT, False,
                )  # fmt: skip
        for at in tl.range(low, last + 1, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            acc, total, top = _seen(
                acc, total, top, query, k_at, v_at, numbers_at, t, column, n, k_row, v_row, wide, keys,
                SCALE, WINDOW, SINKS, MIN_CONTEXT, True,
            )  # fmt: skip
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        o_at = out + h * o_head + row * o_row + d[None, :]
        tl.store(o_at, acc.to(out.dtype.element_ty), mask=there[:, None] & wide[None, :])


@dataclass(frozen=True)
class Listed:
    """As :class:`sparsec.plugins.masked.Picked`, for queries one behind the other."""

    on: Tensor  # int64 [at least count], the rows that run, of [batch, new] as one row, ascending
    before: Tensor  # int32 [batch * new + 1], how many run before each row
    batch: int
    new: int  # new tokens of the call
    padded: bool

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: Tensor, k_pos: Tensor, scale: float, plan: Plan | None = None
    ) -> Tensor:
        """What the picked rows see, in q's shape.

        Args:
            q: [1, heads, count, head_dim], a dense last dimension.
            k, v: [batch, KV heads, keys, head_dim], in order of time, the call's tokens last.
            heads: int64 [heads], the KV head that each query head reads.
            k_pos: int64 [batch, keys], token numbers.
            plan: of its window and sinks; None: all earlier tokens are seen.
        """
        _, own, count, dim = q.shape
        found = torch.empty(1, count, own, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
        if not count:
            return found
        size, sinks, least = 0, 0, 0
        if plan is not None:
            assert plan.window is not None
            size, sinks, least = plan.window.size, plan.window.sinks, plan.min_context
        keys, block_d = k.shape[2], triton.next_power_of_2(dim)
        block_m, widest, warps, stages = tiles(block_d, q.element_size())
        block_n = min(64, widest)  # tiles on the diagonal are masked: the narrower, the fewer keys in vain
        with launching_on(q):
            _picked[triton.cdiv(self.new, block_m), own, self.batch](
                q, k, v, self.on, self.before, k_pos, heads, keys, self.new, *q.stride()[1:3], *k.stride()[:3],
                *v.stride()[:3], k_pos.stride(0), *found.stride()[1:3], found,
                SCALE=scale * math.log2(math.e), WINDOW=size, SINKS=sinks, MIN_CONTEXT=least, PADDED=self.padded,
                DIM=dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return found
