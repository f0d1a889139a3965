"""The inner step of all attention kernels here: one tile of keys goes into a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold(acc, total, top, s, v, SCALE: tl.constexpr):
    """Add a tile.

    Args:
        acc: float32 [rows, BLOCK_D], sums of values; total: float32 [rows], sums of weights.
        top: float32 [rows], the largest logit so far in units of log 2; -inf where a row has seen nothing.
        s: float32 [rows, keys], q·k, -inf where it is masked; v: [keys, BLOCK_D].
        SCALE: the logits' scale times log2(e).
    """
    higher = tl.maximum(top, tl.max(s, 1) * SCALE)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s * SCALE - shift[:, None])
    fade = tl.exp2(top - shift)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="tf32x3")  # concerns float32 alone
    return acc, total * fade + tl.sum(p, 1), higher
