"""Second stage: rows under which the model reads merged text as it reads the text unmerged.

The teacher is the model on base tokens, the student the same frozen model on merged ones; only what makes the rows is
trained. A merged token is compared with the last of its pieces, every other token with itself: there both models have
read the same text. Compared are hidden states (as the model's last norm gives them, squared error) behind the first
``depth`` layers or all, and, with all layers, the next-token distributions over the base vocabulary (KL).
Behind a part of the layers alone a step costs that part: what makes one thing of several pieces happens early.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.calibrate.hypernetwork import cosine
from sparsec.calibrate.teacher import Head
from sparsec.events import Event, Listener, silent
from sparsec.plugins.hypernetwork import Hypernetwork, Pieces, rows_of


@dataclass(frozen=True)
class Window:
    """A text in base tokens and in merged ones, with the last base token's place of each merged one."""

    base: Tensor  # int64 [n]
    merged: Tensor  # int64 [m], ids from ``first`` on are merged tokens
    ends: Tensor  # int64 [m]


@dataclass(frozen=True)
class Settings:
    """How long and on what."""

    steps: int
    batch: int
    lr: float
    row_lr: float  # of corrections to single rows; 0: the network alone is trained
    depth: int | None  # layers behind which hidden states are compared; None: all, and distributions too
    seed: int
    rows: int = 1024  # positions a step whose distributions are compared


def as_windows(tokens: Tensor, merger: Any, pieces: Any) -> list[Window]:
    """Windows of base tokens, int64 [windows, n], with what the merges make of them."""
    made = []
    for row in tokens:
        ids, spans = merger(row.tolist(), pieces(row.tolist()))
        made.append(Window(row, torch.tensor(ids), torch.tensor(spans).cumsum(0) - 1))
    return made


class Rows(nn.Module):
    """Rows of merged tokens: the network's, and a correction for each, which starts at nothing."""

    def __init__(self, network: Hypernetwork, pieces: Pieces, count: int, width: int) -> None:
        super().__init__()
        self.network, self.pieces = network, pieces
        self.own = nn.Parameter(torch.zeros(count, width, device=pieces.ids.device))

    def forward(self, which: Tensor) -> Tensor:
        """[tokens] -> float32 [tokens, width]."""
        return rows_of(self.network, self.pieces, which) + self.network.scale * self.own[which]

    @torch.no_grad()
    def all(self) -> Tensor:
        """All rows, float32 [tokens, width], on the CPU."""
        every = torch.arange(len(self.own), device=self.own.device)
        return torch.cat([self(part) for part in every.tensor_split(tuple(range(1024, len(every), 1024)))]).cpu()


def distil(
    model: Any,
    rows: Rows,
    first: int,
    train: Sequence[Window],
    held: Sequence[Window],
    settings: Settings,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Train ``rows`` in place, keep the best of them by the held-out loss.

    Args:
        model: dense, of base tokens, frozen.
        first: id of the first merged token.

    Returns:
        JSON data: held-out loss by step, the best step, the loss of each step.
    """
    groups = [{"params": list(rows.network.parameters()), "lr": settings.lr}]
    if settings.row_lr:
        groups.append({"params": [rows.own], "lr": settings.row_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = cosine(optimizer, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    stage, losses = "distil merged tokens", []
    checks = [(0, _held_loss(model, rows, first, held, settings))]
    best = {name: value.clone() for name, value in rows.state_dict().items()}
    listen(Event(stage, 0, settings.steps))
    for step in range(1, settings.steps + 1):
        which = torch.randint(len(train), (settings.batch,), generator=generator).tolist()
        loss = _loss(model, rows, first, [train[number] for number in which], settings, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(rows.network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step == settings.steps or step % max(1, settings.steps // 5) == 0:
            checks.append((step, _held_loss(model, rows, first, held, settings)))
            if checks[-1][1] <= min(loss for _, loss in checks):
                best = {name: value.clone() for name, value in rows.state_dict().items()}
        listen(Event(stage, step, settings.steps))
    rows.load_state_dict(best)
    return {
        "checks": [{"step": step, "loss": loss} for step, loss in checks],
        "best_step": min(checks, key=lambda check: check[1])[0],
        "losses": [round(loss, 5) for loss in losses],
    }


@torch.no_grad()
def _held_loss(model: Any, rows: Rows, first: int, held: Sequence[Window], settings: Settings) -> float:
    generator = torch.Generator().manual_seed(0)
    parts = [
        float(_loss(model, rows, first, held[at : at + settings.batch], settings, generator))
        for at in range(0, len(held), settings.batch)
    ]
    return sum(parts) / len(parts)


def _loss(
    model: Any, rows: Rows, first: int, windows: Sequence[Window], settings: Settings, generator: torch.Generator
) -> Tensor:
    device = model.device
    merged = nn.utils.rnn.pad_sequence([window.merged for window in windows], batch_first=True).to(device)
    ends = nn.utils.rnn.pad_sequence([window.ends for window in windows], batch_first=True).to(device)
    real = (torch.arange(merged.shape[1]) < torch.tensor([len(window.merged) for window in windows])[:, None]).to(
        device
    )
    table = model.get_input_embeddings()
    new = merged >= first
    inputs = table(merged.masked_fill(new, 0))
    used, place = (merged[new] - first).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    if len(used):
        inputs = inputs.clone()
        inputs[new] = rows(used)[place].to(inputs.dtype)
    wide = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with wide, _first_layers(model, settings.depth) as decoder:
        with torch.no_grad():
            base = torch.stack([window.base for window in windows]).to(device)
            taught = decoder(input_ids=base, use_cache=False).last_hidden_state
            taught = taught.gather(1, ends[..., None].expand(-1, -1, taught.shape[-1]))
        # Padding stands behind the text and is causal: no mask is needed.
        read = decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
    taught, read = taught[real].float(), read[real].float()
    loss: Tensor = (read - taught).pow(2).sum(-1).div(taught.pow(2).sum(-1)).mean()
    if settings.depth is not None:
        return loss
    some = torch.randperm(len(read), generator=generator)[: settings.rows].to(device)
    head = Head(model)
    with wide:
        student, teacher = head(read[some]).log_softmax(-1), head(taught[some]).log_softmax(-1)
    divergence: Tensor = (teacher.exp() * (teacher - student)).sum(-1).mean()
    return loss + divergence


@contextmanager
def _first_layers(model: Any, depth: int | None) -> Iterator[Any]:
    """The decoder with its first layers and its last norm."""
    decoder = model.get_decoder()
    whole = decoder.layers
    if depth is not None:
        decoder.layers = whole[:depth]
    try:
        yield decoder
    finally:
        decoder.layers = whole
