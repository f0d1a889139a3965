"""Trains a model's hypernetwork (plugins/hypernetwork.py), first stage: it imitates tokens that the vocabulary has.

Almost each is merged from two others, and the model knows its row (ZeTT's first phase, arXiv 2405.07883; MIMICK, arXiv
1707.06961). What follows is in merged_distillation.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsec.events import Event, Listener, silent
from sparsec.plugins.byte_level import ByteLevel
from sparsec.plugins.hypernetwork import Hypernetwork, Pieces, embeddings

HELD = 16  # every so many-th token of the vocabulary is not imitated, but judged by


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A tenth of the steps up, the rest down to nothing in half a cosine."""
    warm = max(1, steps // 10)

    def share(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / max(1, steps))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def new_hypernetwork(model: object, seed: int) -> Hypernetwork:
    """An untrained one for a model: it gives the mean of the pieces."""
    table, _, tied = embeddings(model)
    width = table.shape[1]
    scale = float(table.float().pow(2).mean().sqrt())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Hypernetwork(width, width if tied else 2 * width, scale).to(table.device)


def imitate(
    network: Hypernetwork,
    model: object,
    tokenizer: ByteLevel,
    *,
    steps: int,
    batch: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
    listen: Listener = silent,
) -> Mapping[str, float]:
    """First stage: give the rows of tokens that the vocabulary has, from the two tokens each is merged from.

    Returns:
        JSON data: the mean squared error, as a share of the variance, of the mean of the pieces and of the network,
        on tokens that were not trained on.
    """
    table, head, tied = embeddings(model)
    stage = "imitate known tokens"
    known = [(token, parts) for token, parts in tokenizer.parts.items() if token < len(table)]
    if not known:  # a vocabulary of single bytes
        listen(Event(stage, 0, 0))
        return {"error_of_mean": 0.0, "error": 0.0, "tokens": 0}
    targets = torch.tensor([token for token, _ in known], device=table.device)
    pieces = Pieces([parts for _, parts in known], table, head, tied)
    number = torch.arange(len(known), device=table.device)
    held, own = number[number % HELD == 0], number[number % HELD != 0]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    schedule = cosine(optimizer, steps)
    before = _error(network, pieces, table[targets], held)
    listen(Event(stage, 0, steps))
    for step in range(steps):
        which = own[torch.randint(len(own), (batch,), generator=generator).to(own.device)]
        error = network(*pieces.of(which)) - table[targets[which]].float()
        loss = error.pow(2).mean() / network.scale**2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        listen(Event(stage, step + 1, steps))
    return {"error_of_mean": before, "error": _error(network, pieces, table[targets], held), "tokens": len(known)}


@torch.no_grad()
def _error(network: Hypernetwork, pieces: Pieces, rows: Tensor, which: Tensor) -> float:
    wrong = 0.0
    for part in which.tensor_split(tuple(range(1024, len(which), 1024))):
        wrong += float((network(*pieces.of(part)) - rows[part].float()).pow(2).sum())
    spread = float((rows[which].float() - rows.float().mean(0)).pow(2).sum())
    return wrong / spread
