"""Routers: which tokens run a unit, and the lists of those that do and of those that do not.

Scores are float32, as in :class:`sparsec.plugins.routed_units.Router`. Tiles are the same for any number of tokens, so
a token's score is the same, bit by bit, in any call: alone, in a batch, in a prompt. The lists are made where the
decisions are, and stay on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # tokens a program: each reads all weights, and from 64 on a GPU may add up in another order
COLUMNS = 128  # of the state at once
LINE = 4096  # tokens that are listed at once


@triton.jit
def _write_lists(run, i, tokens, done, on, off, before):
    """List tokens i by ``run``, int32 0 or 1, behind ``done`` that run already; how many run up to the last of them."""
    there = i < tokens
    place = done + tl.cumsum(run, 0) - run
    tl.store(before + i, place, mask=there)
    tl.store(on + place, i.to(tl.int64), mask=there & (run != 0))
    tl.store(off + i - place, i.to(tl.int64), mask=there & (run == 0))
    return done + tl.sum(run, 0)


@triton.jit
def _decide(
    x, weight, bias, out, keep, real, threshold, tokens, x_row,
    run, on, off, before,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    KEEP: tl.constexpr, REAL: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens). LIST: there is one, which writes the lists as well."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_H)
    there = i < tokens
    acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        wide = c < WIDTH
        at = x + i[:, None].to(tl.int64) * x_row + c[None, :]
        state = tl.load(at, mask=there[:, None] & wide[None, :], other=0.0).to(tl.float32)
        w = tl.load(weight + h[None, :] * WIDTH + c[:, None], mask=wide[:, None] & (h <= HIDDEN)[None, :], other=0.0)
        acc = tl.dot(state, w, acc, input_precision="tf32x3")
    acc += tl.load(bias + h, mask=h <= HIDDEN, other=0.0)[None, :]
    # Column 0 is the linear part, the others are hidden units.
    factor = tl.load(out + h - 1, mask=(h > 0) & (h <= HIDDEN), other=0.0)
    score = tl.sum(tl.where((h == 0)[None, :], acc, tl.maximum(acc, 0.0) * factor[None, :]), 1)
    runs = score >= threshold
    if KEEP:
        runs = runs | (tl.load(keep + i, mask=there, other=0) != 0)
    if REAL:
        runs = runs & (tl.load(real + i, mask=there, other=0) != 0)
    flag = (runs & there).to(tl.int32)
    tl.store(run + i, flag.to(tl.uint8), mask=there)
    if LIST:
        tl.store(before + tokens, _write_lists(flag, i, tokens, 0, on, off, before))


@triton.jit
def _list(run, tokens, on, off, before, LINE: tl.constexpr):
    """One program: all tokens, in order."""
    count = 0
    for start in tl.range(0, tokens, LINE):
        i = start + tl.arange(0, LINE)
        flag = tl.load(run + i, mask=i < tokens, other=0).to(tl.int32)
        count = _write_lists(flag, i, tokens, count, on, off, before)
    tl.store(before + tokens, count)


def decide(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    threshold: float,
    keep: Tensor | None,
    real: Tensor | None,
    run: Tensor,
    on: Tensor,
    off: Tensor,
    before: Tensor,
) -> None:
    """Decide and list.

    Args:
        x: [tokens, width], any float type, dense rows.
        weights: of :meth:`sparsec.plugins.routed_units.Router.stacked`, float32.
        threshold: a token runs where its score is no less.
        keep, real: bool [tokens], who runs whatever the score, and who never does.
        run: uint8 [tokens], written: 1 where a token runs.
        on, off: int64 [tokens], written: the tokens that run, those that do not, ascending; the rest is left as it was.
        before: int32 [tokens + 1], written: how many of the tokens before this one run; at the end, how many run.
    """
    tokens, width = x.shape
    weight, bias, out = weights
    hidden = weight.shape[0] - 1
    one = tokens <= ROWS
    _decide[triton.cdiv(tokens, ROWS),](
        x, weight, bias, out if hidden else bias, run if keep is None else keep, run if real is None else real,
        threshold, tokens, x.stride(0), run, on, off, before,
        WIDTH=width, HIDDEN=hidden, BLOCK_H=max(16, triton.next_power_of_2(1 + hidden)), BLOCK_M=ROWS, BLOCK_K=COLUMNS,
        KEEP=keep is not None, REAL=real is not None, LIST=one, num_warps=4, num_stages=4,
    )  # fmt: skip
    if not one:
        _list[1,](run, tokens, on, off, before, LINE=LINE, num_warps=8)
