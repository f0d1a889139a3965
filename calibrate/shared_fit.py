"""Trains kept indexers for all layers that read their index sets: IndexCache's multi-layer distillation.

IndexCache (arXiv 2603.12201, training-aware variant): an indexer q that serves layers l .. l+m minimises

    L_multi = sum_j 1/(m+1) KL(p_j || q),   grad L_multi = grad KL(mean_j p_j || q)   (Proposition 1)

since only q depends on the parameters. The sum is what is computed here, as in the paper.

The paper's indexers have one distribution a layer. rtpurbo's have a row a retrieval head, and a layer's set is the
union of what its rows choose (ours). So every served head is assigned to one row, the one that is nearest to it, and a
row minimises the sum over its heads: all heads count alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from sparsec.calibrate.indexer_fit import TILE, Forced, Window, divergence, scores, train
from sparsec.events import Listener
from sparsec.plan import Plan

Pairs = dict[int, tuple[Tensor, Tensor]]  # Wq, Wk by layer
ROUNDS = 3
Served = dict[int, dict[int, Tensor]]  # by full layer, by layer it serves (itself too): the row of each of its heads


def readers(plan: Plan) -> dict[int, list[int]]:
    """By full layer: the layers that read its set, itself first."""
    found: dict[int, list[int]] = {}
    for layer in plan.indexed():
        found.setdefault(plan.index_source(layer), []).append(layer)
    return found


@torch.no_grad()
def assigned(windows: Sequence[Window], weights: Pairs, plan: Plan, forced: Forced) -> Served:
    """Every served head's nearest row by KL, on the first tile of each window."""
    served: Served = {}
    for full, layers in readers(plan).items():
        rows = weights[full][0].shape[0]
        served[full] = {}
        for layer in layers:
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
    plan: Plan,
    *,
    forced: Forced,
    steps: int,
    lr: float,
    seed: int,
    listen: Listener,
) -> tuple[Pairs, Served, list[float]]:
    """The full layers' weights, trained for all heads they serve.

    In rounds, as k-means goes: heads are assigned to the rows as they are now, then the rows are trained for them.

    Returns:
        Wq, Wk by full layer, the last assignment, and the loss a head of every step.
    """
    weights = {full: weights[full] for full in readers(plan)}
    losses: list[float] = []
    served = assigned(windows, weights, plan, forced)
    for number in range(ROUNDS):
        share = steps * (number + 1) // ROUNDS - steps * number // ROUNDS
        weights, found = train(
            windows,
            weights,
            forced=forced,
            steps=share,
            lr=lr,
            seed=seed + number,
            listen=listen,
            loss=partial(_of_layer, served=served, forced=forced),
            heads=served_heads(served),
            stage=f"train shared indexers {number + 1} of {ROUNDS}",
        )
        losses += found
        served = assigned(windows, weights, plan, forced)
    return weights, served, losses


def _of_layer(
    window: Window, full: int, pair: tuple[Tensor, Tensor], start: int, *, served: Served, forced: Forced
) -> Tensor:
    return multi_layer_loss(window, pair, served[full], full, start, forced)


def served_heads(served: Served) -> int:
    """Heads that read an index, in all layers."""
    return sum(len(rows) for layers in served.values() for rows in layers.values())
