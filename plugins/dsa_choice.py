"""How the indexers of DeepSeek sparse attention (DSA) choose tokens: all of them, by blocks first, or with some heads.

DSA (DeepSeek-V3.2-Exp report), one set a layer for all query heads, prefill and decode alike, no token forced:

    I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s]),   T[t] = the top_k tokens s <= t

HISA (arXiv 2603.28458, Algorithm 1) scores the mean key of every block first, and tokens only in the best blocks, the
first one and the one that t is in. MISA (arXiv 2605.07363) lets each query use only its best indexer heads, ranked by
E[t, j] = mean over blocks of |w[t, j] ReLU(q[t, j] . mean key of the block)|; its two-stage form scores the best
candidates again with all heads. With both, blocks are ranked by all heads and tokens by the routed ones (ours).

What is left out is not computed: candidates' keys and routed heads' queries are gathered. This is the reference; no
speed is claimed for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsec.plan import Dsa, Hisa, Misa

GATHERED = 1 << 24  # numbers of candidate keys that a tile may hold
TILE = 128  # rows scored at once
NEVER = float("-inf")


def choose(q: Tensor, k: Tensor, w: Tensor, visible: Tensor, dsa: Dsa) -> Tensor:
    """The tokens that each row attends to.

    Args:
        q: [batch, rows, indexer heads, dim], scaled by dim ** -0.5; k: [batch, keys, dim]; both after RoPE.
        w: [batch, rows, indexer heads], scaled by heads ** -0.5.
        visible: bool [batch, rows, keys]; the last row's are the real tokens.
        dsa: how.

    Returns:
        int32 [batch, rows, min(top_k, keys)], best first. Where fewer tokens compete, the rest are tokens that the row
        does not see, or the best one again.
    """
    pooled = {block: Pooled(k, visible[:, -1], block) for block in _blocks(dsa)}
    size = TILE
    if dsa.hisa is not None:
        wide = (dsa.hisa.top_blocks + 2) * dsa.hisa.block * k.shape[-1]
        size = max(1, min(TILE, GATHERED // wide))
    parts = []
    for start in range(0, q.shape[1], size):
        rows = slice(start, start + size)
        parts.append(_tile(q[:, rows], k, w[:, rows], visible[:, rows], dsa, pooled))
    return torch.cat(parts, 1).int()


class Pooled:
    """Mean keys of blocks of a sequence, and of the part of a block up to each of its tokens."""

    def __init__(self, k: Tensor, real: Tensor, block: int) -> None:
        batch, keys, dim = k.shape
        self.block = block
        self.blocks = -(-keys // block)
        pad = self.blocks * block - keys
        # Padding counts for nothing; where a block starts does not depend on it, as in an engine's paged cache.
        parts = torch.nn.functional.pad(k.float() * real[..., None], (0, 0, 0, pad)).view(batch, -1, block, dim)
        counts = torch.nn.functional.pad(real.float(), (0, pad)).view(batch, -1, block)
        sums, count = parts.cumsum(2), counts.cumsum(2)
        self.upto = (sums / count.clamp_min(1)[..., None]).flatten(1, 2)[:, :keys]  # [batch, keys, dim]
        self.real = count[:, :, -1] > 0  # [batch, blocks]: not all padding
        self.whole = sums[:, :, -1] / count[:, :, -1].clamp_min(1)[..., None]  # [batch, blocks, dim]

    def scores(self, q: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Per head ReLU(q . mean key) of every block and whether a row may look there.

        Args:
            q: [batch, rows, heads, dim].
            at: int64 [batch, rows], the rows' own columns.

        Returns:
            [batch, rows, heads, blocks], where the row's own block is pooled up to the row, and bool [batch, rows, 1,
            blocks]: blocks with a real token that begin at or before the row.
        """
        found = torch.relu(q @ self.whole.transpose(-1, -2)[:, None])
        own = at // self.block
        partial = self.upto.gather(1, at[..., None].expand(-1, -1, q.shape[-1]))  # [batch, rows, dim]
        near = torch.relu((q * partial[:, :, None]).sum(-1, keepdim=True))
        found = found.scatter(-1, own[:, :, None, None].expand(-1, -1, q.shape[2], -1), near)
        begun = torch.arange(self.blocks, device=q.device) <= own[..., None]
        return found, (begun & self.real[:, None])[:, :, None]


def _blocks(dsa: Dsa) -> set[int]:
    return {one.block for one in (dsa.hisa, dsa.misa) if one is not None}


def _tile(q: Tensor, k: Tensor, w: Tensor, visible: Tensor, dsa: Dsa, pooled: dict[int, Pooled]) -> Tensor:
    count = min(dsa.top_k, k.shape[1])
    if dsa.hisa is None and dsa.misa is None:
        return flat(q, k, w, visible).topk(count, dim=-1).indices
    q, w = q.float(), w.float()
    columns = torch.arange(k.shape[1], device=k.device)
    at = torch.where(visible, columns, 0).amax(-1)  # the rows' own columns
    routed_q, routed_w = q, w
    if dsa.misa is not None:
        routed_q, routed_w = _routed(q, w, at, dsa.misa, pooled[dsa.misa.block])
    if dsa.hisa is None:
        scores = flat(routed_q, k, routed_w, visible)
    else:
        scores = _in_blocks(q, w, routed_q, routed_w, k, visible, at, dsa.hisa, pooled[dsa.hisa.block])
        scores = _gated(scores, q, k, w, visible, dsa.hisa.min_context)
    if dsa.misa is not None and dsa.misa.candidates is not None:
        chosen = scores.topk(min(dsa.misa.candidates, k.shape[1]), dim=-1)
        again = _at(q, w, k, chosen.indices).masked_fill(chosen.values == NEVER, NEVER)
        scores = torch.full_like(scores, NEVER).scatter(-1, chosen.indices, again)
    if dsa.misa is not None:
        scores = _gated(scores, q, k, w, visible, dsa.misa.min_context)
    best = scores.topk(count, dim=-1)
    # A row's blocks may hold fewer tokens than are to be chosen; what did not compete is not kept in their place.
    return torch.where(best.values == NEVER, best.indices[..., :1], best.indices)


def flat(q: Tensor, k: Tensor, w: Tensor, visible: Tensor | None = None) -> Tensor:
    """I of every token: [batch, rows, keys], float32; minus infinity where a row does not see it."""
    scores = torch.relu(q.float() @ k.float().transpose(-1, -2)[:, None])
    total = (w.float()[:, :, None] @ scores)[:, :, 0]
    return total if visible is None else total.masked_fill(~visible, NEVER)


def _gated(scores: Tensor, q: Tensor, k: Tensor, w: Tensor, visible: Tensor, least: int) -> Tensor:
    """Rows of at most ``least`` tokens score all tokens with all heads."""
    short = visible.sum(-1) <= least
    if not bool(short.any()):
        return scores
    return torch.where(short[..., None], flat(q, k, w, visible), scores)


def _routed(q: Tensor, w: Tensor, at: Tensor, misa: Misa, pooled: Pooled) -> tuple[Tensor, Tensor]:
    """Queries and weights of each row's best heads: [batch, rows, heads, dim] and [batch, rows, heads]."""
    found, begun = pooled.scores(q, at)
    mean = (found * begun).sum(-1) / begun.sum(-1).clamp_min(1)
    energy = (w * mean).abs()  # a weight may be negative
    # Stable: over few blocks several heads see none of them, and every runtime has to take the same of these.
    best = energy.sort(dim=-1, descending=True, stable=True).indices[..., : min(misa.heads, w.shape[-1])]
    return q.gather(2, best[..., None].expand(-1, -1, -1, q.shape[-1])), w.gather(-1, best)


def _in_blocks(
    q: Tensor,
    w: Tensor,
    routed_q: Tensor,
    routed_w: Tensor,
    k: Tensor,
    visible: Tensor,
    at: Tensor,
    hisa: Hisa,
    pooled: Pooled,
) -> Tensor:
    """I of the tokens in each row's best blocks, minus infinity elsewhere: [batch, rows, keys]."""
    found, begun = pooled.scores(q, at)
    ranks = (w[:, :, None] @ found)[:, :, 0].masked_fill(~begun[:, :, 0], NEVER)  # [batch, rows, blocks]
    kept = torch.zeros_like(ranks, dtype=torch.bool)
    best = ranks.topk(min(hisa.top_blocks, pooled.blocks), dim=-1)
    kept.scatter_(-1, best.indices, best.values > NEVER)
    kept.scatter_(-1, pooled.real.int().argmax(-1)[:, None, None].expand(-1, kept.shape[1], 1), True)  # the first one
    kept.scatter_(-1, (at // hisa.block)[..., None], True)
    order = kept.float().topk(min(hisa.top_blocks + 2, pooled.blocks), dim=-1)  # the kept ones first, then padding
    tokens = (order.indices[..., None] * hisa.block + torch.arange(hisa.block, device=k.device)).flatten(-2)
    inside = tokens < k.shape[1]
    tokens = tokens.clamp_max(k.shape[1] - 1)
    real = inside & visible.gather(-1, tokens) & (order.values > 0).repeat_interleave(hisa.block, -1)
    scores = _at(routed_q, routed_w, k, tokens).masked_fill(~real, NEVER)
    # amax: the last token may stand for padding as well as for itself.
    return torch.full(visible.shape, NEVER, device=k.device).scatter_reduce(-1, tokens, scores, "amax")


def _at(q: Tensor, w: Tensor, k: Tensor, tokens: Tensor) -> Tensor:
    """I of some tokens of each row: tokens [batch, rows, n] -> [batch, rows, n]."""
    batch = torch.arange(k.shape[0], device=k.device)[:, None, None]
    keys = k.float()[batch, tokens]  # [batch, rows, n, dim]
    scores = torch.relu(q @ keys.transpose(-1, -2))  # [batch, rows, heads, n]
    return (w[:, :, None] @ scores)[:, :, 0]
