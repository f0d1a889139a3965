"""The coarse level of the selector: mean index keys of blocks, which say where tokens are scored at all.

Beside the index keys the cache holds their mean over every complete block of ``block`` tokens. A row's projected query
ranks the blocks by it, and tokens are scored only in the best ones, as HISA (arXiv 2603.28458) does it in a model's own
indexers. A mean is made once, of what is stored, when a block is complete: how a prompt is cut changes nothing. The
row's own block, which it may see in part, is always a candidate.

Quest (arXiv 2406.10774) ranks pages by the least and the largest of each number instead, which bound every score from
above. On the demo model neither finds more mass at every context (benchmarks/coarse.py); means take half the bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.plan import Selector
from sparsec.plugins.index_keys import loaded
from sparsec.plugins.selector import TIE


def extended(means: Tensor | None, index: Tensor, pos: Tensor, rows: int, block: int, dtype: torch.dtype) -> Tensor:
    """The means after more tokens.

    Args:
        means: [batch, heads, blocks, rank], before; None: there were none.
        index: [batch, heads, tokens, ...], all index keys as they are stored.
        pos: [batch, tokens], their token numbers, -1 where there is padding.
        rows: so many of them, the last ones, are new.
        block: tokens a block.
        dtype: the cache's.

    Returns:
        [batch, heads, blocks, rank]; of sequences shorter than the longest the last ones mean nothing yet.
    """
    before = pos[:, : pos.shape[1] - rows]
    done = int(before.amax(1).min() + 1) // block if before.shape[1] and means is not None else 0
    count = int(pos.max() + 1) // block - done
    keys = loaded(index)
    at = torch.div(pos, block, rounding_mode="floor") - done
    at = torch.where((pos >= 0) & (at >= 0) & (at < count), at, count)  # what is left over goes to one more
    sums = keys.new_zeros(*keys.shape[:2], count + 1, keys.shape[3])
    sums = sums.scatter_add_(2, at[:, None, :, None].expand(keys.shape), keys)
    new = (sums[:, :, :count] / block).to(dtype)
    return torch.cat((means[:, :, :done], new), 2) if means is not None else new


def candidates(queries: Tensor, means: Tensor, q_pos: Tensor, k_pos: Tensor, selector: Selector) -> Tensor:
    """The keys that each row scores.

    Args:
        queries: float32 [batch, heads, rows, rank], Wq q.
        means: [batch, heads, blocks, rank].
        q_pos, k_pos: [batch, rows] and [batch, keys], token numbers from 0; -1 marks padding.
        selector: with ``coarse``.

    Returns:
        bool [batch, heads, rows, keys], whole blocks.
    """
    coarse, size = selector.coarse, selector.block
    assert coarse is not None
    means = F.pad(means.float(), (0, 0, 0, 1))  # the block that is not complete
    block = torch.arange(means.shape[2], device=means.device)
    own = torch.div(q_pos, size, rounding_mode="floor")[:, None, :, None]
    forced = (block * size < selector.sinks) | ((block + 1) * size > q_pos[:, None, :, None] - selector.recent + 1)
    value = (queries @ means.transpose(-1, -2)).masked_fill(forced | (block >= own), float("-inf"))
    wanted = (-(-(own + 1) // coarse.one_in)).clamp(1, len(block))  # of the blocks that the row sees, rounded up
    edge = value.sort(-1, descending=True).values.gather(-1, (wanted - 1).expand(*value.shape[:-1], 1))
    chosen = ((value >= edge - TIE) & (value > float("-inf"))) | forced | (block == own)
    chosen = chosen | (q_pos < coarse.min_context)[:, None, :, None]
    at = (k_pos.clamp_min(0) // size)[:, None, None, :]
    return chosen.gather(-1, at.expand(*chosen.shape[:-1], k_pos.shape[1]))
