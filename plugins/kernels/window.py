"""Prefill of local heads: flash attention over sinks and a sliding window, on some heads of a layer.

Only the tiles of keys that a tile of queries can see are read, so operations and time grow with rows x window. K and V
are read where they lie: query heads of one KV head share it, no head is copied or gathered.

Token numbers say who sees whom. Row m of the call is token ``first + m``; token n < sinks lies in column
``n - sink_at``, every other token in column ``n - window_at`` (both 0 where the columns begin with token 0; a ring
buffer that was put in order of time has lost the tokens between its sinks and its window). Rows before token 0 are
padding: they see nothing and get zeros.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from sparsec.plan import Window
from sparsec.plugins.kernels.flash import fold


@triton.jit
def _seen(
    acc, total, top, query, k_at, v_at, t, n, at, columns, k_row, v_row, wide,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MIN_CONTEXT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys, with token numbers n in the columns ``at``."""
    inside = (at >= 0) & (at < columns)
    k = tl.load(k_at + at[None, :].to(tl.int64) * k_row, mask=wide[:, None] & inside[None, :], other=0.0)
    v = tl.load(v_at + at[:, None].to(tl.int64) * v_row, mask=inside[:, None] & wide[None, :], other=0.0)
    s = tl.dot(query, k, input_precision="tf32x3")
    if MASKED:
        near = (t[:, None] - n[None, :] < WINDOW) | (n[None, :] < SINKS) | (t[:, None] < MIN_CONTEXT)
        s = tl.where(near & (n[None, :] <= t[:, None]) & inside[None, :], s, float("-inf"))
    return fold(acc, total, top, s, v, SCALE)


@triton.jit
def _window_prefill(
    q, k, v, heads, kv_heads, first, sink_at, window_at,
    rows, columns, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    out,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, one of ``heads``, sequence)."""
    start = tl.program_id(0) * BLOCK_M
    b = tl.program_id(2).to(tl.int64)
    head = tl.load(heads + tl.program_id(1)).to(tl.int64)
    kv = tl.load(kv_heads + tl.program_id(1)).to(tl.int64)
    begin = tl.load(first + b)
    sinks_from, window_from = tl.load(sink_at + b), tl.load(window_at + b)
    m, d = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    t = begin + m
    wide = d < DIM
    q_at = q + b * q_batch + head * q_head + m[:, None].to(tl.int64) * q_row + d[None, :]
    query = tl.load(q_at, mask=(m < rows)[:, None] & wide[None, :], other=0.0)
    k_at = k + b * k_batch + kv * k_head + d[:, None]
    v_at = v + b * v_batch + kv * v_head + d[None, :]

    oldest = begin + start
    newest = begin + tl.minimum(start + BLOCK_M, rows) - 1
    low = tl.maximum(oldest - WINDOW + 1, 0)
    low = tl.where((oldest < MIN_CONTEXT) | (low < SINKS), 0, low)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if (SINKS > 0) & (low > 0):
        n = tl.arange(0, BLOCK_S)
        at = tl.where(n < SINKS, n - sinks_from, -1)
        acc, total, top = _seen(
            acc, total, top, query, k_at, v_at, t, n, at, columns, k_row, v_row, wide, SCALE, 0, SINKS, 0, True
        )
    # Every row of the tile sees the tokens from ``even`` to ``oldest``: no mask is needed there.
    even = tl.minimum(low + tl.cdiv(tl.maximum(newest - WINDOW + 1 - low, 0), BLOCK_N) * BLOCK_N, newest + 1)
    until = even + tl.maximum(oldest + 1 - even, 0) // BLOCK_N * BLOCK_N
    for token in tl.range(low, even, BLOCK_N):
        n = token + tl.arange(0, BLOCK_N)
        acc, total, top = _seen(
            acc, total, top, query, k_at, v_at, t, n, n - window_from, columns, k_row, v_row, wide,
            SCALE, WINDOW, SINKS, MIN_CONTEXT, True,
        )  # fmt: skip
    for token in tl.range(even, until, BLOCK_N):
        n = token + tl.arange(0, BLOCK_N)
        acc, total, top = _seen(
            acc, total, top, query, k_at, v_at, t, n, n - window_from, columns, k_row, v_row, wide,
            SCALE, WINDOW, SINKS, MIN_CONTEXT, False,
        )  # fmt: skip
    for token in tl.range(until, newest + 1, BLOCK_N):
        n = token + tl.arange(0, BLOCK_N)
        acc, total, top = _seen(
            acc, total, top, query, k_at, v_at, t, n, n - window_from, columns, k_row, v_row, wide,
            SCALE, WINDOW, SINKS, MIN_CONTEXT, True,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    o_at = out + b * o_batch + head * o_head + m[:, None].to(tl.int64) * o_row + d[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=(m < rows)[:, None] & wide[None, :])


def window_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    heads: Tensor,
    kv_heads: Tensor,
    window: Window,
    min_context: int,
    scale: float,
    first: Tensor,
    sink_at: Tensor | None = None,
    window_at: Tensor | None = None,
) -> None:
    """Write what ``heads`` see into their places of ``out``.

    Args:
        q, out: [batch, heads of the layer, rows, head_dim], any strides with a dense last dimension.
        k, v: [batch, KV heads, columns, head_dim], the rows' own tokens included; not repeated.
        heads: int32 [n], which heads of ``q`` run; ``kv_heads``: int32 [n], the head of ``k`` that each reads.
        min_context: rows before this token number see all tokens.
        first: int32 [batch], the token number of row 0; negative where rows are padding.
        sink_at, window_at: int32 [batch], see the module; None: as ``first`` minus the columns before the rows.
    """
    batch, _, rows, dim = q.shape
    columns = k.shape[2]
    if sink_at is None:
        sink_at = first - (columns - rows)
    if window_at is None:
        window_at = sink_at
    block_d = triton.next_power_of_2(dim)
    block_m, block_n, warps, stages = tiles(block_d, q.element_size())
    _window_prefill[triton.cdiv(rows, block_m), len(heads), batch](
        q, k, v, heads, kv_heads, first, sink_at, window_at,
        rows, columns, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        out,
        SCALE=scale * math.log2(math.e), WINDOW=window.size, SINKS=window.sinks, MIN_CONTEXT=min_context,
        DIM=dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_S=max(16, triton.next_power_of_2(window.sinks)), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def tiles(block_d: int, element_size: int) -> tuple[int, int, int, int]:
    """Rows and keys a tile, warps and pipeline stages: what fits a Hopper multiprocessor's 227 KiB."""
    if element_size > 2:
        return 64, 32, 4, 2
    return (128, 128, 8, 3) if block_d <= 128 else (128, 64, 8, 2)
