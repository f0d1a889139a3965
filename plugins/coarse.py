"""The coarse level of the selector: bounds of index keys by block, which say where keys are scored at all.

Of every block of ``block`` tokens the least and the largest of each of the rank numbers are kept beside the index keys.
With the row's projected query they bound every score in the block from above, as Quest (arXiv 2406.10774) bounds
pages of keys; the blocks with the highest bounds are candidates. Least and largest numbers do not hang on the order in
which tokens come, and are numbers that are stored anyway: nothing is rounded, nothing depends on how a prompt is cut.

A row reads bounds of blocks that are complete, and end before its own block. Its own block is always a candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsec.plan import Selector
from sparsec.plugins.selector import TIE


def extended(bounds: Tensor | None, keys: Tensor, pos: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The bounds after more tokens.

    Args:
        bounds: [batch, heads, blocks, 2 rank], the least numbers and behind them the largest; None: of no tokens.
        keys: float32 [batch, heads, tokens, rank], the new ones as they are stored.
        pos: [batch, tokens], their token numbers, -1 where there is padding.
        block: tokens a block.
        dtype: the cache's.
    """
    batch, heads, _, rank = keys.shape
    held = bounds.shape[2] if bounds is not None else 0
    count = max(held, int(pos.max()) // block + 1)
    out = keys.new_full((2, batch, heads, count + 1, rank), float("inf"))  # what is padding goes to the last one
    out[1].neg_()
    if bounds is not None:
        out[:, :, :, :held] = bounds.float().unflatten(-1, (2, rank)).movedim(-2, 0)
    at = torch.where(pos >= 0, pos // block, count)[:, None, :, None].expand(keys.shape)
    for side, how in zip(out, ("amin", "amax"), strict=True):
        side.scatter_reduce_(2, at, keys, how)
    return torch.cat((out[0], out[1]), -1)[:, :, :count].to(dtype)


def highest(queries: Tensor, bounds: Tensor) -> Tensor:
    """What no score in a block exceeds: [batch, heads, rows, blocks], float32.

    queries: float32 [batch, heads, rows, rank], Wq q; bounds: [batch, heads, blocks, 2 rank].
    """
    least, largest = bounds.float().transpose(-1, -2).chunk(2, -2)
    return queries.clamp_min(0) @ largest + queries.clamp_max(0) @ least


def candidates(queries: Tensor, bounds: Tensor, q_pos: Tensor, k_pos: Tensor, selector: Selector) -> Tensor:
    """The keys that each row scores: bool [batch, heads, rows, keys].

    Args:
        queries, bounds: as for :func:`highest`.
        q_pos, k_pos: [batch, rows] and [batch, keys], token numbers from 0; -1 marks padding.
        selector: with ``coarse``.
    """
    coarse, size = selector.coarse, selector.block
    assert coarse is not None
    block = torch.arange(bounds.shape[2], device=bounds.device)
    own = (q_pos // size)[:, None, :, None]
    forced = (block * size < selector.sinks) | ((block + 1) * size > q_pos[:, None, :, None] - selector.recent + 1)
    value = highest(queries, bounds).masked_fill(forced | (block >= own), float("-inf"))
    wanted = (-(-(own + 1) // coarse.one_in)).clamp(1, len(block))  # of the blocks that the row sees, rounded up
    ranked = value.sort(-1, descending=True).values
    edge = ranked.gather(-1, (wanted - 1).expand(*value.shape[:-1], 1))
    chosen = ((value >= edge - TIE) & (value > float("-inf"))) | forced | (block == own)
    chosen = chosen | (q_pos < coarse.min_context)[:, None, :, None]
    at = (k_pos.clamp_min(0) // size)[:, None, None, :]
    return chosen.gather(-1, at.expand(*chosen.shape[:-1], k_pos.shape[1]))
