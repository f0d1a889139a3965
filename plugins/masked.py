"""Attention of some rows over the keys that they may see: dense, windowed, or the kept ones gathered.

Token numbers say who sees whom: -1 marks padding, which nobody sees; what a padded row itself computes is thrown away.
Rows run in tiles, so that nothing of the size rows x keys of a whole prompt is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.plan import Plan
from sparsec.plugins.selector import causal

BANDED = 1 << 24  # rows x window up to which all tiles of a prompt run in one call: its mask is held at once
ROWS = 512  # rows a tile: what is held at once is [heads, ROWS, keys], never rows x keys of a whole prompt


def attended(q: Tensor, k: Tensor, v: Tensor, *, scale: float, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
    """PyTorch's attention; arguments are those of ``torch.nn.functional.scaled_dot_product_attention``.

    PyTorch keeps cuDNN's backward graphs by the layouts of q, k and v. A gradient in another layout than the first one
    of its shape would be read as that one: so each is laid out in order.
    """
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale, **how)
    if found.requires_grad:
        found.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
    return found


def gathered(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """One row: attention that reads the kept keys and values only.

    q: [batch, heads, 1, dim]; k, v: [batch, heads, keys, dim]; keep: bool [batch, heads or 1, 1, keys].
    """
    kept = keep[:, :, 0].expand(-1, q.shape[1], -1)
    most = max(1, int(kept.sum(-1).max()))
    # Kept keys first, in order of time; rows with fewer are padded with dropped keys and masked.
    flags, at = kept.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
    flags, at = flags[..., :most].bool(), at[..., :most]
    rows = at[..., None].expand(*at.shape, k.shape[-1])
    flags = flags | ~flags.any(-1, keepdim=True)
    picked_k, picked_v = k.gather(2, rows), v.gather(2, rows)
    return attended(q, picked_k, picked_v, attn_mask=flags[:, :, None], scale=scale)


def dense(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, scale: float, padded: bool | None = None
) -> Tensor:
    """Causal attention over all real keys, tiled over rows.

    q: [batch, heads, rows, dim]; k, v: [batch, heads, keys, dim], or the KV heads, each read by as many heads in order.
    padded: some of the keys are padding; None: not known, which waits for the device.
    """
    rows, keys, shared = q.shape[2], k.shape[2], k.shape[1] != q.shape[1]
    if rows == 1 and shared:
        # A KV head's query heads are its rows: nothing is repeated.
        mask = causal(q_pos, k_pos) | (q_pos < 0)[:, None, :, None]
        folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        return attended(folded, k, v, attn_mask=mask, scale=scale).reshape(q.shape)
    if rows == keys and not (bool((k_pos < 0).any()) if padded is None else padded):
        return attended(q, k, v, is_causal=rows > 1, scale=scale, enable_gqa=shared)
    parts = []
    for start in range(0, rows, ROWS):
        seen = keys - rows + min(start + ROWS, rows)
        part_pos = q_pos[:, start : start + ROWS]
        mask = causal(part_pos, k_pos[:, :seen]) | (part_pos < 0)[:, None, :, None]
        part = q[:, :, start : start + ROWS]
        seen_k, seen_v = k[:, :, :seen], v[:, :, :seen]
        parts.append(attended(part, seen_k, seen_v, attn_mask=mask, scale=scale, enable_gqa=shared))
    return torch.cat(parts, 2)


def windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    plan: Plan,
    scale: float,
    padded: bool | None = None,
    masks: dict[Any, Tensor] | None = None,
) -> Tensor:
    """Local heads: sinks and the last ``window.size`` tokens of every row, the row's own included.

    q: [batch, heads, rows, dim]; k, v: [batch, KV heads, keys, dim]; heads: KV head of each query head;
    q_pos, k_pos: token numbers, k_pos ascending where rows > 1. Each tile reads its own slice of the keys.
    padded: some of the keys are padding; None: not known, which waits for the device. masks: what calls of one forward
    call share.
    """
    assert plan.window is not None
    size, sinks = plan.window.size, plan.window.sinks
    rows, keys = q.shape[2], k.shape[2]
    whole = rows == keys > max(size + sinks, ROWS) and plan.min_context <= size + sinks
    if whole and rows * size <= BANDED and (padded is False or bool((k_pos[:, 0] == 0).all())):
        return banded(q, k, v, heads, size, sinks, scale, masks)
    parts = []
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        part_pos = q_pos[:, start:stop]
        if rows == 1:
            tile_k, tile_v, tile_pos = k, v, k_pos
        else:
            index = reach(part_pos, k_pos, size, sinks, plan.min_context, keys - rows + stop)
            tile_k, tile_v, tile_pos = k[:, :, index], v[:, :, index], k_pos[:, index]
        t, j = part_pos[:, None, :, None], tile_pos[:, None, None, :]
        near = (t - j < size) | (j < sinks) | (t < plan.min_context)
        mask = ((j >= 0) & (j <= t) & near) | (t < 0)
        tile_k, tile_v = tile_k.index_select(1, heads), tile_v.index_select(1, heads)
        parts.append(attended(q[:, :, start:stop], tile_k, tile_v, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)


def banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    size: int,
    sinks: int,
    scale: float,
    masks: dict[Any, Tensor] | None = None,
) -> Tensor:
    """:func:`windowed` for whole prompts, padded on the right at most: all tiles of rows in one call.

    A tile is at least a window long, so its keys are the tile before it, itself and the sinks.
    """
    batch, rows, dim = q.shape[0], q.shape[2], q.shape[3]
    tile = max(size, 128)
    tiles = -(-rows // tile)
    columns = -(-sinks // 8) * 8  # fused kernels want masks of aligned rows; the columns behind the sinks are masked

    def tiled(x: Tensor) -> Tensor:
        """[batch, tiles, heads, tile, dim]."""
        if tiles * tile > rows:
            x = F.pad(x, (0, 0, 0, tiles * tile - rows))
        return x.reshape(batch, x.shape[1], tiles, tile, dim).transpose(1, 2)

    def keys(x: Tensor) -> Tensor:
        x = x.index_select(1, heads)
        own = tiled(x)
        before = torch.cat((torch.zeros_like(own[:, :1]), own[:, :-1]), 1)
        first = x[:, None, :, :columns].expand(-1, tiles, -1, -1, -1)
        return torch.cat((before, own, first), 3).flatten(0, 1)

    masks = {} if masks is None else masks
    of = (batch, rows, tile, size, sinks, q.get_device(), q.dtype)
    if of not in masks:
        masks[of] = _band(rows, tile, size, sinks, columns, q).repeat(batch, 1, 1)[:, None]
    queries = tiled(q).flatten(0, 1)
    found = attended(queries, keys(k), keys(v), attn_mask=masks[of], scale=scale)
    return found.reshape(batch, tiles, -1, tile, dim).transpose(1, 2).flatten(2, 3)[:, :, :rows]


def _band(rows: int, tile: int, size: int, sinks: int, columns: int, like: Tensor) -> Tensor:
    """What each tile's rows see, added to logits: [tiles, tile, 2 * tile + columns] of 0 and -inf, as ``like``."""
    tiles = -(-rows // tile)
    t = torch.arange(tiles * tile, device=like.device).view(tiles, tile, 1)
    j = torch.arange(2 * tile, device=like.device) - tile + t[:, :1]
    near = (j >= 0) & (j <= t) & (t - j < size)
    j = torch.arange(columns, device=like.device)
    first = (j < sinks) & (t - j >= size)
    # A padded row sees whatever: it is cut off.
    seen = torch.cat((near, first), -1) | (t >= rows)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


PICKED = 256  # rows a tile: a smaller one wastes less on keys that stand behind its first rows


@dataclass(frozen=True)
class Picked:
    """Query rows of a call that are not its last ones: those that a router lets run, in order of time."""

    pos: Tensor  # [batch, rows] token numbers, -1 behind a sequence's last row
    ends: tuple[int, ...]  # by tile of PICKED rows: how many of the new tokens its rows may see
    new: int  # new tokens of the call

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: Tensor, k_pos: Tensor, scale: float, plan: Plan | None = None
    ) -> Tensor:
        """Causal attention of the picked rows; with a plan they see its sinks and window alone.

        q: [batch, heads, rows, dim], the picked rows; k, v: [batch, KV heads, keys, dim], all keys so far or those that
        a window may see, in order of time; heads: KV head of each query head; k_pos: [batch, keys] token numbers.
        """
        if not self.ends:  # nobody runs: the cache is written, nothing is computed
            return q
        parts, keys = [], k.shape[2]
        before = keys - self.new
        for tile, end in enumerate(self.ends):
            part_pos = self.pos[:, tile * PICKED : (tile + 1) * PICKED]
            seen = max(1, before + end)
            if plan is None:
                tile_k, tile_v = k[:, :, :seen], v[:, :, :seen]
                mask = causal(part_pos, k_pos[:, :seen])
            else:
                assert plan.window is not None
                size, sinks = plan.window.size, plan.window.sinks
                index = reach(part_pos, k_pos, size, sinks, plan.min_context, seen)
                tile_k, tile_v, j = k[:, :, index], v[:, :, index], k_pos[:, None, None, index]
                t = part_pos[:, None, :, None]
                mask = (j >= 0) & (j <= t) & ((t - j < size) | (j < sinks) | (t < plan.min_context))
            mask = mask | (part_pos < 0)[:, None, :, None]
            part = q[:, :, tile * PICKED : (tile + 1) * PICKED]
            tile_k, tile_v = tile_k.index_select(1, heads), tile_v.index_select(1, heads)
            parts.append(attended(part, tile_k, tile_v, attn_mask=mask, scale=scale))
        return torch.cat(parts, 2)


def reach(q_pos: Tensor, k_pos: Tensor, size: int, sinks: int, min_context: int, seen: int) -> Tensor:
    """Indices of the keys that any row of a tile can see."""
    real = q_pos[q_pos >= 0]
    first = int(real.min()) if real.numel() else 0
    low = 0 if first < min_context else max(0, first - size + 1)
    candidates = ((k_pos >= low) | ((k_pos >= 0) & (k_pos < sinks))).any(0)
    candidates[seen:] = False
    if not bool(candidates.any()):
        candidates[:1] = True
    return candidates.nonzero()[:, 0]
