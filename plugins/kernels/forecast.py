"""Forecasts of the tokens that do not run a unit: gather, down, activation, up, scatter, in two launches.

How many tokens that are is read on the device: the grid is as large as if all were sent away, and programs beyond
the list's end return at once. So nothing waits for the host, which learns the number while these kernels run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

FEW = 16  # tokens up to which a tile is small in rows and many programs divide the weights: decode


@triton.jit
def _inner(
    x, weight, bias, off, ran, tokens, x_row,
    inner,
    WIDTH: tl.constexpr, RANK: tl.constexpr, SILU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (tile of the list, tile of the rank): act(down(x)) of the listed tokens."""
    start, count = tl.program_id(0) * BLOCK_M, tokens - tl.load(ran)
    if start < count:
        i, n = start + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        there, within = i < count, n < RANK
        token = tl.load(off + i, mask=there, other=0)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.range(0, WIDTH, BLOCK_K):
            c = first + tl.arange(0, BLOCK_K)
            wide = c < WIDTH
            state = tl.load(x + token[:, None] * x_row + c[None, :], mask=there[:, None] & wide[None, :], other=0.0)
            w = tl.load(weight + n[None, :] * WIDTH + c[:, None], mask=wide[:, None] & within[None, :], other=0.0)
            acc = tl.dot(state, w, acc, input_precision="tf32x3")
        acc += tl.load(bias + n, mask=within, other=0.0).to(tl.float32)[None, :]
        if SILU:
            acc = acc / (1.0 + tl.exp(-acc))
        to = inner + i[:, None].to(tl.int64) * RANK + n[None, :]
        tl.store(to, acc.to(inner.dtype.element_ty), mask=there[:, None] & within[None, :])


@triton.jit
def _outer(
    inner, weight, bias, off, ran, tokens, out_row,
    out,
    WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (tile of the list, tile of the width): up(inner), into the listed tokens' rows."""
    start, count = tl.program_id(0) * BLOCK_M, tokens - tl.load(ran)
    if start < count:
        i, n = start + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        there, within = i < count, n < WIDTH
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.range(0, RANK, BLOCK_K):
            r = first + tl.arange(0, BLOCK_K)
            deep = r < RANK
            at = inner + i[:, None].to(tl.int64) * RANK + r[None, :]
            part = tl.load(at, mask=there[:, None] & deep[None, :], other=0.0)
            w = tl.load(weight + n[None, :] * RANK + r[:, None], mask=deep[:, None] & within[None, :], other=0.0)
            acc = tl.dot(part, w, acc, input_precision="tf32x3")
        acc += tl.load(bias + n, mask=within, other=0.0).to(tl.float32)[None, :]
        token = tl.load(off + i, mask=there, other=0)
        to = out + token[:, None] * out_row + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=there[:, None] & within[None, :])


@triton.jit
def _scatter(found, on, found_row, out_row, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row): one row of ``found`` goes to its token's row."""
    i = tl.program_id(0).to(tl.int64)
    to = out + tl.load(on + i) * out_row
    for start in tl.static_range(0, WIDTH, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(found + i * found_row + c, mask=c < WIDTH, other=0.0)
        tl.store(to + c, value.to(out.dtype.element_ty), mask=c < WIDTH)


def forecast(
    x: Tensor,
    down: tuple[Tensor, Tensor | None],
    up: tuple[Tensor, Tensor | None],
    silu: bool,
    off: Tensor,
    ran: Tensor,
    out: Tensor,
) -> None:
    """Write the forecasts of the listed tokens into their rows.

    Args:
        x: [tokens, width], dense rows; out: the same.
        down, up: weight [rank, width] and bias [rank]; weight [width, rank] and bias [width]; x's type.
        silu: between the two; else nothing is.
        off: int64 [tokens], the list.
        ran: int32 [1], how many tokens are *not* in it.
    """
    tokens, width = x.shape
    rank = down[0].shape[0]
    inner = x.new_empty(tokens, rank)
    few, wide = tokens <= FEW, x.element_size() > 2
    rows = FEW if few else 64
    columns, deep = (16, 128) if few else (64, 32 if wide else 64)
    _inner[triton.cdiv(tokens, rows), triton.cdiv(rank, columns)](
        x, *down, off, ran, tokens, x.stride(0), inner, WIDTH=width, RANK=rank, SILU=silu,
        BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=deep, num_warps=4, num_stages=4,
    )  # fmt: skip
    columns = 32 if few else 64 if wide else 128
    _outer[triton.cdiv(tokens, rows), triton.cdiv(width, columns)](
        inner, *up, off, ran, tokens, out.stride(0), out, WIDTH=width, RANK=rank,
        BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=32 if wide else 64, num_warps=4, num_stages=3,
    )  # fmt: skip


def scatter(found: Tensor, on: Tensor, out: Tensor) -> None:
    """Rows of ``found``, [count, width], go to the rows ``on``, int64 [at least count], of ``out``, [tokens, width]."""
    count, width = found.shape
    _scatter[count,](
        found, on, found.stride(0), out.stride(0), out,
        WIDTH=width, BLOCK=min(4096, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
