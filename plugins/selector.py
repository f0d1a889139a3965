"""The selector of retrieval heads: low-rank scores, softmax over causal keys, top-p, forced tokens.

RTPurbo (arXiv 2605.16928), "Offline calibration" and "top-p decoding": s_h(m, n) = (Wq_h q_m)·(Wk_h k_n), keep the
largest until their softmax mass reaches p. Where sinks hold most of the mass, p is reached with hardly any other key,
so a floor of ``min_keep`` unforced keys can be set. Nothing is divided by sqrt(rank): the weights were
trained on softmax(s), so any scale is inside them and p means what it meant in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from sparsec.plan import Selector

TIE = 1e-4  # weights closer than this, relative, count as equal


class Indexer(nn.Module):
    """The projections of one layer's retrieval heads.

    Tensors: ``q_proj.weight`` and ``k_proj.weight``, each [retrieval heads, rank, head_dim], float32; row i belongs to
    the layer's i-th retrieval head in ascending order.
    """

    def __init__(self, q_proj: Tensor, k_proj: Tensor) -> None:
        super().__init__()
        self.q_proj = _Weight(q_proj)
        self.k_proj = _Weight(k_proj)

    def queries(self, q: Tensor) -> Tensor:
        """[batch, retrieval heads, rows, head_dim] -> [batch, retrieval heads, rows, rank], float32."""
        return torch.einsum("bhmd,hrd->bhmr", q.float(), self.q_proj.weight)

    def keys(self, k: Tensor) -> Tensor:
        """The same for keys; k has one slice for every retrieval head (GQA groups already repeated)."""
        return torch.einsum("bhnd,hrd->bhnr", k.float(), self.k_proj.weight)


class _Weight(nn.Module):
    """Holds ``weight``, so that tensor names read ``indexer.q_proj.weight`` as other engines' do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float(), requires_grad=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding (rotate-half layout), in x's dtype, as Transformers computes it.

    x: [..., rows, head_dim]; cos, sin: [..., rows, rotary_dim], as x broadcasts. A partial one leaves the tail alone.
    """
    rotary = cos.shape[-1]
    part, half = x[..., :rotary], rotary // 2
    turned = torch.cat((-part[..., half:], part[..., :half]), dim=-1)
    found = part * cos + turned * sin
    return found if rotary == x.shape[-1] else torch.cat((found, x[..., rotary:]), dim=-1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo the rotary embedding (rotate-half layout): the pre-RoPE q or k from the one attention sees.

    x: [batch, heads, rows, head_dim]; cos, sin: [batch, rows, rotary_dim]. A partial rotary embedding leaves the tail
    alone. cos and sin may carry an attention scale s (YaRN): rotating back with them gives s² times the original.
    """
    cos, sin = cos[:, None].float(), sin[:, None].float()
    rotary = cos.shape[-1]
    part = x[..., :rotary].float()
    half = rotary // 2
    turned = torch.cat((-part[..., half:], part[..., :half]), dim=-1)
    scale = cos[..., :1].square() + sin[..., :1].square()
    return torch.cat(((part * cos - turned * sin) / scale, x[..., rotary:].float()), dim=-1)


def select(
    scores: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    selector: Selector,
    min_context: int,
    *,
    union: bool | None = None,
    kv_heads: Sequence[int] = (),
    candidates: Tensor | None = None,
) -> Tensor:
    """The keys that each row keeps.

    Args:
        scores: [batch, heads, rows, keys] float32, any causal state (masked here).
        q_pos, k_pos: [batch, rows] and [batch, keys], token numbers from 0; -1 marks padding.
        selector: how to choose; ``scope`` 'layer' gives the union over heads.
        min_context: rows whose context is at most this long keep everything.
        union: overrides the selector's scope (for measuring).
        kv_heads: the KV head that each head reads, for ``scope`` 'kv_head'; its heads all get the union of theirs.
        candidates: bool as ``scores``, whole blocks and all forced ones: of a coarse level, all others weigh nothing.

    Returns:
        bool [batch, heads (1 for a union), rows, keys].
    """
    if candidates is None and (found := _on_device(scores, q_pos, k_pos, selector, min_context)) is not None:
        if union is None:
            return united(found, selector, kv_heads)
        return found.any(1, keepdim=True) if union else found
    visible = causal(q_pos, k_pos)
    if candidates is not None:
        scores = scores.masked_fill(~candidates, float("-inf"))
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
    distance = q_pos[:, None, :, None] - k_pos[:, None, None, :]
    forced = (k_pos[:, None, None, :] < selector.sinks) | (distance < selector.recent)
    least = selector.min_keep
    if selector.granularity == "block":  # forced ones too are kept whole
        index = (k_pos.clamp_min(0) // selector.block)[:, None, None, :]
        forced = by_block((forced & visible).float(), index.expand(visible.shape)) > 0
        weights = by_block(weights, index.expand(weights.shape))
        least = -(-least // selector.block)
    keep = top_p(weights, selector.top_p) | largest(weights.masked_fill(forced, 0.0), least) | forced
    if selector.granularity == "block":
        keep = keep.gather(-1, index.expand(*keep.shape[:-1], visible.shape[-1]))
    if candidates is not None:  # also where top_p is so near 1 that a sum never reaches it
        keep = keep & candidates
    short = (q_pos < min_context)[:, None, :, None]
    keep = (keep | short) & visible
    if union is None:
        return united(keep, selector, kv_heads)
    return keep.any(1, keepdim=True) if union else keep


def _on_device(scores: Tensor, q_pos: Tensor, k_pos: Tensor, selector: Selector, min_context: int) -> Tensor | None:
    """The sets of tokens of a row each, searched for by a kernel: sorting takes most of a training step on a GPU."""
    if not scores.is_cuda or not _launches_on(scores.device):
        return None
    from sparsec.plugins.kernels.rows import kept_rows, takes
    from sparsec.plugins.kernels.support import launching_on

    if not takes(scores, selector):
        return None
    with launching_on(scores):
        return kept_rows(scores, q_pos, k_pos, selector, min_context)


@cache
def _launches_on(device: torch.device) -> bool:
    """Do the kernels run there?"""
    from sparsec.plugins.kernels.support import reason_there

    return torch.version.hip is None and reason_there(device, torch.float32) is None


def united(keep: Tensor, selector: Selector, kv_heads: Sequence[int]) -> Tensor:
    """Sets as the selector's scope has them: bool [batch, heads, ...] -> the same, or [batch, 1, ...] for a layer's."""
    if selector.scope == "layer":
        return keep.any(1, keepdim=True)
    if selector.scope == "head" or not keep.shape[1]:
        return keep
    assert len(kv_heads) == keep.shape[1]
    alike = {kv: [place for place, other in enumerate(kv_heads) if other == kv] for kv in kv_heads}
    each = {kv: keep[:, of].any(1) for kv, of in alike.items()}
    return torch.stack([each[kv] for kv in kv_heads], 1)


def causal(q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """bool [batch, 1, rows, keys]: real keys at or before the row."""
    k = k_pos[:, None, None, :]
    return (k >= 0) & (k <= q_pos[:, None, :, None])


def top_p(weights: Tensor, p: float) -> Tensor:
    """Keep the largest weights through the one whose cumulative sum crosses p; at least one; ties at the edge stay.

    weights: [..., n], non-negative, each row summing to 1 (or 0 where nothing is visible).
    """
    # Equal tokens have equal keys before RoPE, so ties are common, and rounding must not tear them apart: the same
    # row would keep one set as a decode step and another in a chunk.
    if p >= 1.0:
        return torch.ones_like(weights, dtype=torch.bool)
    ranked = weights.sort(dim=-1, descending=True).values
    count = ((ranked.cumsum(-1) - ranked) < p).sum(-1, keepdim=True).clamp_min(1)
    return weights >= ranked.gather(-1, count - 1) * (1 - TIE)


def largest(weights: Tensor, count: int) -> Tensor:
    """The ``count`` largest positive weights of each row, ties at the edge too."""
    if count == 0:
        return torch.zeros_like(weights, dtype=torch.bool)
    edge = weights.topk(min(count, weights.shape[-1]), dim=-1).values[..., -1:]
    return (weights >= edge * (1 - TIE)) & (weights > 0)


def by_block(weights: Tensor, index: Tensor) -> Tensor:
    """Mass of each block; block b holds tokens b*block .. (b+1)*block - 1."""
    blocks = int(index.max()) + 1
    return torch.zeros(*weights.shape[:-1], blocks, device=weights.device).scatter_add_(-1, index, weights)
