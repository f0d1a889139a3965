"""Retrieval-head detection: how much later needle tokens attend to the same needle earlier.

RTPurbo (arXiv 2605.16928), "Offline Head-wise Calibration": with N_pre and N_post the token sets of the two needles and
A_h the post-softmax attention of query head h,

    R_h = 1/|N_post| · sum over t in N_post, j in N_pre of A_h(t, j)

The paper takes one document; its needle is not described. Here: random ordinary words, many needles in several
documents, and the rank stability between halves of them is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.capture import Captured, capture
from sparsec.calibrate.needles import NeedleDocument
from sparsec.events import Listener, tracked
from sparsec.plan import ModelShape


def needle_mass(model: Any, documents: Sequence[NeedleDocument], shape: ModelShape, listen: Listener) -> Tensor:
    """R_h of every document: [documents, layers, heads], float64. Only the needles' rows are scored."""
    scores = torch.zeros(len(documents), shape.layers, shape.heads, dtype=torch.float64)
    for number, document in enumerate(tracked(documents, "detect retrieval heads", listen, len(documents))):

        def note(seen: Captured, row: Tensor = scores[number], document: NeedleDocument = document) -> None:
            k = seen.k[0].repeat_interleave(shape.group, 0).float()
            for earlier, later in document.pairs:
                logits = seen.q[0, :, later.start : later.stop].float() @ k[:, : later.stop].transpose(-1, -2)
                rows = torch.arange(later.start, later.stop, device=logits.device)[:, None]
                future = torch.arange(later.stop, device=logits.device)[None] > rows
                weights = (logits * seen.scale).masked_fill(future, float("-inf")).softmax(-1)
                mass = weights[:, :, earlier.start : earlier.stop].sum(-1).mean(-1)
                row[seen.layer] += mass.double().cpu() / len(document.pairs)

        capture(model, document.tokens[None], note)
    return scores


def top_heads(scores: Tensor, count: int, allowed: Tensor) -> list[tuple[int, int]]:
    """The ``count`` best (layer, head); ties go to the lower layer, then the lower head. allowed: bool [layers]."""
    ranked = sorted(
        (-float(scores[layer, head]), layer, head)
        for layer in range(scores.shape[0])
        if bool(allowed[layer])
        for head in range(scores.shape[1])
    )
    return sorted((layer, head) for _, layer, head in ranked[:count])


def stability(scores: Tensor, count: int, allowed: Tensor) -> dict[str, float]:
    """Do two halves of the documents agree? Spearman of all ranks, Jaccard of the kept set."""
    halves = scores[0::2].mean(0), scores[1::2].mean(0)
    first, second = (set(top_heads(half, count, allowed)) for half in halves)
    ranks = [half[allowed].flatten().argsort().argsort().double() for half in halves]
    correlation = torch.corrcoef(torch.stack(ranks))[0, 1]
    return {"spearman": float(correlation), "jaccard": len(first & second) / len(first | second)}


@torch.no_grad()
def copying_accuracy(model: Any, documents: Sequence[NeedleDocument]) -> tuple[float, int]:
    """Share of later needle tokens that the model predicts from the earlier copy, and how many were tried.

    The first token of a needle cannot be predicted and is left out. Runs whatever plan is installed.
    """
    hits = tried = 0
    for document in documents:
        tokens = document.tokens[None].to(model.device)
        keep = max(document.tokens.shape[0] - later.start for _, later in document.pairs)
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits[0]
        guesses = logits.argmax(-1).cpu()
        offset = tokens.shape[1] - keep
        for _, later in document.pairs:
            rows = torch.arange(later.start, later.stop - 1)
            hits += int((guesses[rows - offset] == document.tokens[rows + 1]).sum())
            tried += len(rows)
    return hits / max(1, tried), tried
