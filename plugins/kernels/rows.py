"""The selector's sets of many rows at once: a training window's decode rows, or those that a measurement reads.

One program a row and head holds all scores of its row. Where :func:`sparsec.plugins.selector.select` sorts, the edge is
searched for: weights are not negative, so their bits rise as they do, and 31 halvings find the very weight at which a
sort would have stopped. Sums run in another order than there: sets differ where the mass meets p to the last digit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsec.plan import Selector
from sparsec.plugins.selector import TIE

MOST_KEYS = 32768  # that the threads of one program hold


@triton.jit
def _both(a1, a2, b1, b2):
    return a1 + b1, a2 + b2


@triton.jit
def _row_sets(
    scores, q_pos, k_pos, keep, heads, rows, keys,
    P: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, MIN_KEEP: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, head, sequence). KEPT: 1 less what counts as a tie."""
    row, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = tl.arange(0, BLOCK)
    there = at < keys
    line = ((b * heads + h).to(tl.int64) * rows + row) * keys
    t = tl.load(q_pos + b * rows + row).to(tl.int32)
    k = tl.load(k_pos + b.to(tl.int64) * keys + at, mask=there, other=-1).to(tl.int32)
    visible = (k >= 0) & (k <= t)
    value = tl.load(scores + line + at, mask=visible, other=float("-inf"))
    top = tl.max(value, 0)
    weight = tl.exp(value - tl.where(top == float("-inf"), 0.0, top))
    weight = weight / tl.maximum(tl.sum(weight, 0), 1e-30)
    forced = (k < SINKS) | (t - k < RECENT)
    far = tl.where(forced, 0.0, weight)
    edge = tl.zeros([], tl.int32)
    edge_far = edge
    bit = tl.full([], 1 << 30, tl.int32)
    for _ in tl.range(0, 31):
        candidate = (edge + bit).to(tl.float32, bitcast=True)
        candidate_far = (edge_far + bit).to(tl.float32, bitcast=True)
        mass = tl.where(weight >= candidate, weight, 0.0)
        number = tl.where(far >= candidate_far, 1.0, 0.0)
        mass, number = tl.reduce((mass, number), 0, _both)
        edge += tl.where(mass >= P, bit, 0)
        edge_far += tl.where(number >= MIN_KEEP, bit, 0)
        bit = bit >> 1
    kept = weight >= edge.to(tl.float32, bitcast=True) * KEPT
    if MIN_KEEP > 0:
        kept = kept | ((far >= edge_far.to(tl.float32, bitcast=True) * KEPT) & (far > 0.0))
    kept = (kept | forced | (t < MIN_CONTEXT)) & visible
    tl.store(keep + line + at, kept.to(tl.uint8), mask=there)


def kept_rows(scores: Tensor, q_pos: Tensor, k_pos: Tensor, selector: Selector, min_context: int) -> Tensor:
    """The tokens that each row and head keeps, before any union: bool as ``scores``.

    Args:
        scores: float32 [batch, heads, rows, keys], any causal state, at most ``MOST_KEYS`` keys.
        q_pos, k_pos: [batch, rows] and [batch, keys], token numbers from 0; -1 marks padding.
        selector: of tokens, with a ``top_p`` below 1.
        min_context: rows whose context is at most this long keep everything.
    """
    batch, heads, rows, keys = scores.shape
    keep = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    block = max(16, triton.next_power_of_2(keys))
    _row_sets[rows, heads, batch](
        scores.contiguous(), q_pos.contiguous(), k_pos.contiguous(), keep, heads, rows, keys,
        P=selector.top_p, SINKS=selector.sinks, RECENT=selector.recent, MIN_KEEP=selector.min_keep,
        MIN_CONTEXT=min_context, KEPT=1 - TIE, BLOCK=block, num_warps=min(32, max(1, block // 512)),
    )  # fmt: skip
    return keep.view(torch.bool)


def takes(scores: Tensor, selector: Selector) -> bool:
    """Can the kernel choose here?"""
    whole = selector.granularity == "token" and selector.top_p < 1
    return whole and scores.dtype == torch.float32 and 0 < scores.shape[-1] <= MOST_KEYS and scores.numel() > 0
