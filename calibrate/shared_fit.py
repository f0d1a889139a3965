"""Trains kept indexers for all layers that read their index sets: IndexCache's multi-layer distillation.

IndexCache (arXiv 2603.12201, training-aware variant): an indexer q that serves layers l .. l+m minimises

    L_multi = sum_j 1/(m+1) KL(p_j || q),   grad L_multi = grad KL(mean_j p_j || q)   (Proposition 1)

since only q depends on the parameters. The sum is what is computed here, as in the paper.

The paper's indexers have one distribution a layer. rtpurbo's have a row a retrieval head, and a layer's set is the
union of what its rows choose (ours). So every served head is assigned to one row, the one that is nearest to it before
training, and a row minimises the sum over its heads: all heads count alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsec.calibrate.indexer_fit import TILE, Forced, Window, divergence, scores, train
from sparsec.events import Listener
from sparsec.plan import Plan

Pairs = dict[int, tuple[Tensor, Tensor]]  # Wq, Wk by layer
Served = dict[int, dict[int, Tensor]]  # by full layer, by layer it serves (itself too): the row of each of its heads


def readers(plan: Plan) -> dict[int, list[int]]:
    """By full layer: the layers that read its set, itself first."""
    found: dict[int, list[int]] = {}
    for layer in plan.indexed():
        found.setdefault(plan.index_source(layer), []).append(layer)
    return found


@torch.no_grad()
def assigned(windows: Sequence[Window], weights: Pairs, plan: Plan, forced: Forced) -> Served:
    """Every served head's nearest row by KL, on the first tile of each window; a layer's own heads keep their own."""
    served: Served = {}
    for full, layers in readers(plan).items():
        rows = weights[full][0].shape[0]
        served[full] = {full: torch.arange(rows)}
        for layer in layers[1:]:
            far = torch.zeros(rows, len(plan.layers[layer].retrieval))
            for window in windows:
                said = scores(window[full], *weights[full], 0)
                for row in range(rows):
                    alone = said[row].expand(far.shape[1], -1, -1)
                    far[row] += divergence(window[layer], alone, 0, forced).cpu()
            served[full][layer] = far.argmin(0)
    return served


def multi_layer_loss(
    window: Window, pair: tuple[Tensor, Tensor], served: Mapping[int, Tensor], full: int, start: int, forced: Forced
) -> Tensor:
    """KL of one tile from the rows of layer ``full``, summed over all heads that they serve."""
    said = scores(window[full], *pair, start)
    each = [divergence(window[layer], said[rows], start, forced).sum() for layer, rows in served.items()]
    return torch.stack(each).sum()


@torch.no_grad()
def mean_multi_layer(windows: Sequence[Window], weights: Pairs, served: Served, forced: Forced) -> float:
    """The loss a head over all rows, in nats."""
    total, heads = 0.0, served_heads(served)
    for window in windows:
        for full, layers in served.items():
            starts = range(0, window[full].q.shape[1], TILE)
            found = [multi_layer_loss(window, weights[full], layers, full, start, forced) for start in starts]
            total += float(torch.stack(found).mean())
    return total / max(1, len(windows) * heads)


def train_shared(
    windows: Sequence[Window],
    weights: Pairs,
    served: Served,
    *,
    forced: Forced,
    steps: int,
    lr: float,
    seed: int,
    listen: Listener,
) -> tuple[Pairs, list[float]]:
    """The full layers' weights, trained for all heads they serve, and the loss a head of every step."""
    return train(
        windows,
        {full: weights[full] for full in served},
        forced=forced,
        steps=steps,
        lr=lr,
        seed=seed,
        listen=listen,
        loss=lambda window, full, pair, start: multi_layer_loss(window, pair, served[full], full, start, forced),
        heads=served_heads(served),
        stage="train shared indexers",
    )


def served_heads(served: Served) -> int:
    """Heads that read an index, in all layers."""
    return sum(len(rows) for layers in served.values() for rows in layers.values())
