"""Embeddings of merged tokens without training: the mean of the pieces, and TokenAdapt's estimates.

TokenAdapt (arXiv 2505.09738, ``src/heuristics.py``): *local* weighs a token's pieces by likeness and length, *global*
averages the nearest tokens of the old vocabulary, *hybrid* mixes them 0.7 to 0.3. The paper measures likeness with an
embedding model of its own; here it is the base model's input embedding, centred, because no other model is at hand.
So a merged token's own vector, which local and global compare with, is the mean of its pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sparsec.plugins.hypernetwork import padded

Heuristic = Literal["mean", "local", "global", "hybrid"]
TEMPERATURE = 0.3
NEAREST = 3
GLOBAL_SHARE = 0.3


@torch.no_grad()
def estimate(
    kind: Heuristic, embedding: Tensor, constituents: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]]
) -> Tensor:
    """Rows for merged tokens, float32 [tokens, width].

    Args:
        embedding: [vocabulary, width], of the base model.
        constituents: base tokens of each merged token.
        lengths: bytes of each of them.
    """
    rows = embedding.detach().float().cpu()
    ids, real = padded(constituents)
    parts = rows[ids] * real[..., None]
    count = real.sum(1, keepdim=True)
    mean = parts.sum(1) / count
    if kind == "mean":
        return mean
    centre = rows.mean(0)
    near = torch.nn.functional.normalize(rows - centre, dim=-1)
    own = torch.nn.functional.normalize(mean - centre, dim=-1)
    local = _local(parts, near[ids], own, real, padded(lengths)[0])
    if kind == "local":
        return local
    parts_of = own.tensor_split(tuple(range(1024, len(own), 1024)))
    found = torch.cat([_nearest(part, near, rows) for part in parts_of])
    return found if kind == "global" else (1 - GLOBAL_SHARE) * local + GLOBAL_SHARE * found


def _local(parts: Tensor, near: Tensor, own: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Two softmaxes, one in the other, as in the authors' code; the first has temperature 1."""
    like = (near * own[:, None]).sum(-1).masked_fill(~real, -torch.inf).softmax(1)
    share = lengths / lengths.sum(1, keepdim=True)
    weights = ((like + share) / 2 / TEMPERATURE).masked_fill(~real, -torch.inf).softmax(1)
    return (weights[..., None] * parts).sum(1)


def _nearest(own: Tensor, near: Tensor, rows: Tensor) -> Tensor:
    best = (own @ near.T).topk(NEAREST, dim=-1)
    weights = (best.values / TEMPERATURE).softmax(-1)
    return (weights[..., None] * rows[best.indices]).sum(1)


@torch.no_grad()
def never_sampled(hidden: Tensor, head: Tensor, least: float = 100.0) -> Tensor:
    """An output row whose logit lies ``least`` below the largest one, for every hidden state like these.

    Hidden states that reach the output layer share a direction u with h·u near 1 (ridge regression on 1); the row is a
    multiple of -u. exp(-100) is no number in float32 that a sampler could draw.

    Args:
        hidden: [rows, width], what the output layer gets on calibration text.
        head: [vocabulary, width], the output layer's weight.

    Returns:
        float32 [width].
    """
    states = hidden.double().cpu()
    gram = states.T @ states
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    u = torch.linalg.solve(gram + ridge, states.sum(0))
    top = (hidden.float() @ head.float().T).max(-1).values.double().cpu()
    along = states @ u
    floor = along.quantile(0.001).clamp_min(0.05 * along.mean())
    scale = (least - top.min().clamp_max(0)) / floor
    row: Tensor = (-scale * u).float()
    return row
