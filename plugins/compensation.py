"""The compensation token: what a local head no longer sees, as one key and one value.

RazorAttention (arXiv 2407.15891): the N tokens that a row dropped are replaced by the mean of their keys and the mean
of their values, and that token's softmax weight is multiplied by N (log N on its logit). Keys are averaged as they are
cached, after RoPE at their own positions.

Row t has dropped the tokens sinks .. t - window, whatever the chunk it stands in. So all that has to be kept of evicted
tokens is a sum a KV head; how many there are follows from t. Sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsec.plan import Plan, Window
from sparsec.plugins.masked import ROWS, reach


@dataclass
class Dropped:
    """Sums of keys and values over the tokens from the window's ``sinks`` up to, but not with, ``upto``."""

    keys: Tensor  # [batch, KV heads, head_dim] float32
    values: Tensor
    upto: Tensor  # [batch] token numbers

    @classmethod
    def none(cls, k: Tensor, heads: int, sinks: int) -> Dropped:
        """Nothing dropped yet, for so many KV heads. k: [batch, any heads, tokens, head_dim], for shape and device."""
        zeros = torch.zeros(k.shape[0], heads, k.shape[3], device=k.device)
        return cls(zeros, zeros.clone(), torch.full((k.shape[0],), sinks, device=k.device))

    def through(
        self, k: Tensor, v: Tensor, k_pos: Tensor, ends: Tensor, kv: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Dropped]:
        """The sums up to each row's end, and those up to the last one.

        Args:
            k, v: [batch, KV heads, tokens, head_dim], among them every token from ``upto`` to the last end.
            k_pos: [batch, tokens] token numbers, -1 padding; ascending where a sequence has several new tokens.
            ends: [batch, rows] token numbers: a row's sums go up to, but not with, its end. One before ``upto`` gets
                the sums up to ``upto``.
            kv: the KV heads of k and v that are summed; None is all of them.

        Returns:
            sums of keys and of values, [batch, KV heads, rows, head_dim] float32, and what is dropped afterwards.
        """
        last = torch.maximum(self.upto, ends.amax(1))
        new = (k_pos >= self.upto[:, None]) & (k_pos < last[:, None])
        at = new.any(0).nonzero()[:, 0]
        fresh = new[:, at]
        before = torch.full_like(self.upto[:, None], -1)  # stands for the sums so far
        numbers = torch.cat((before, torch.where(fresh, k_pos[:, at], -1)), 1).cummax(1).values
        ends = torch.cat((ends, last[:, None]), 1)
        row = (torch.searchsorted(numbers, ends.contiguous()) - 1)[:, None, :, None]

        def sums(x: Tensor, base: Tensor) -> Tensor:
            picked = x[:, :, at] if kv is None else x[:, kv[:, None], at]
            picked = picked.float().masked_fill(~fresh[:, None, :, None], 0.0)
            every = torch.cat((base[:, :, None], picked), 2).cumsum(2)
            return every.gather(2, row.expand(-1, every.shape[1], -1, every.shape[3]))

        keys, values = sums(k, self.keys), sums(v, self.values)
        after = Dropped(keys[:, :, -1].clone(), values[:, :, -1].clone(), last)
        return keys[:, :, :-1], values[:, :, :-1], after


def ends_of(q_pos: Tensor, window: Window, min_context: int) -> Tensor:
    """Where each row's dropped tokens end, as token numbers: ``sinks`` where it dropped none. [batch, rows]."""
    ends = (q_pos - window.size + 1).clamp_min(window.sinks)
    return torch.where(q_pos < min_context, window.sinks, ends)


@torch.autocast("cuda", enabled=False)
def compensated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    plan: Plan,
    scale: float,
    dropped: Dropped | None,
) -> tuple[Tensor, Dropped]:
    """:func:`~sparsec.plugins.masked.windowed` with the compensation token; softmax in float32, tile by tile.

    Args:
        q: [batch, heads, rows, dim]; k, v: [batch, KV heads, keys, dim]; heads: KV head of each query head.
        q_pos, k_pos: token numbers, k_pos ascending where rows > 1.
        dropped: sums of the KV heads that are read, ascending; None at the beginning of a sequence.

    Returns:
        [batch, heads, rows, dim] and what is dropped after the last row.
    """
    assert plan.window is not None
    size, sinks = plan.window.size, plan.window.sinks
    rows, keys = q.shape[2], k.shape[2]
    kv, place = torch.unique(heads, return_inverse=True)
    dropped = dropped or Dropped.none(k, len(kv), sinks)
    parts = []
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        t = q_pos[:, start:stop]
        ends = ends_of(t, plan.window, plan.min_context)
        sum_k, sum_v, dropped = dropped.through(k, v, k_pos, ends, kv)
        count = (ends - sinks)[:, None]
        some = count.clamp_min(1).float()
        mean_k, mean_v = (each[:, place] / some[..., None] for each in (sum_k, sum_v))

        index = reach(t, k_pos, size, sinks, plan.min_context, keys - rows + stop)
        tile_k, tile_v = (each[:, :, index][:, heads].float() for each in (k, v))
        i, j = t[:, None, :, None], k_pos[:, None, None, index]
        near = (i - j < size) | (j < sinks) | (i < plan.min_context)
        mask = ((j >= 0) & (j <= i) & near) | (i < 0)
        tile_q = q[:, :, start:stop].float() * scale
        seen = (tile_q @ tile_k.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
        rest = ((tile_q * mean_k).sum(-1) + some.log()).masked_fill(count < 1, float("-inf"))
        weights = torch.cat((seen, rest[..., None]), -1).softmax(-1)
        parts.append((weights[..., :-1] @ tile_v + weights[..., -1:] * mean_v).to(q.dtype))
    return torch.cat(parts, 2), dropped
