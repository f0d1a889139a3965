"""A small hypernetwork: the embeddings of a merged token's pieces in, the merged token's input embedding out.

ZeTT (arXiv 2405.07883) trains a transformer over the pieces' (input, output) embeddings for every tokenizer at once, in
days. This one serves one base model and merges of its own tokens only. It corrects the mean of the pieces, and starts
by imitating tokens that the vocabulary has: almost each is merged from two others, and the model knows its row (ZeTT's
first phase; MIMICK, arXiv 1707.06961). What follows is in merged_distillation.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsec.calibrate.merged_embeddings import padded
from sparsec.events import Event, Listener, silent
from sparsec.plugins.byte_level import ByteLevel

LONGEST = 8  # pieces that are looked at, the last ones
HELD = 16  # every so many-th token of the vocabulary is not imitated, but judged by


class Hypernetwork(nn.Module):
    """[tokens, pieces, inputs] -> [tokens, width].

    Args:
        width: dimensions of an embedding.
        inputs: of a piece: ``width`` where the model's embeddings are tied, else twice that, input and output.
        scale: root mean square of the base model's embedding.
        inner: dimensions inside.
        layers: of the transformer over the pieces.
    """

    def __init__(self, width: int, inputs: int, scale: float, inner: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.enter = nn.Linear(inputs, inner)
        self.place = nn.Parameter(torch.randn(LONGEST, inner) * 0.02)
        layer = nn.TransformerEncoderLayer(
            inner, inner // 64, 2 * inner, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.mix = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(inner), enable_nested_tensor=False)
        self.leave = nn.Linear(inner, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, pieces: Tensor, real: Tensor) -> Tensor:
        """pieces: [tokens, pieces, inputs], the input embedding first; real: bool [tokens, pieces]."""
        width = self.leave.out_features
        weights = real / real.sum(1, keepdim=True)
        mean = (pieces[..., :width] * weights[..., None]).sum(1)
        inner = self.enter(pieces / self.scale) + self.place[: pieces.shape[1]]
        inner = self.mix(inner, src_key_padding_mask=~real)
        out: Tensor = mean + self.scale * self.leave((inner * weights[..., None]).sum(1))
        return out


class Pieces:
    """What the hypernetwork reads of tokens: their last pieces' embeddings, looked up when asked for."""

    def __init__(self, constituents: Sequence[Sequence[int]], embedding: Tensor, head: Tensor, tied: bool) -> None:
        self.ids, self.real = (part.to(embedding.device) for part in padded([c[-LONGEST:] for c in constituents]))
        self._tables = [embedding] if tied else [embedding, head]

    def of(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens numbered ``which``: [tokens, pieces, inputs] in float32, and which are real."""
        ids = self.ids[which]
        return torch.cat([table[ids].float() for table in self._tables], dim=-1), self.real[which]


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A tenth of the steps up, the rest down to nothing in half a cosine."""
    warm = max(1, steps // 10)

    def share(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / max(1, steps))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def embeddings(model: object) -> tuple[Tensor, Tensor, bool]:
    """A model's embedding, its output layer's weight, and whether they are one."""
    table = model.get_input_embeddings().weight.detach()  # type: ignore[attr-defined]
    head = model.get_output_embeddings().weight.detach()  # type: ignore[attr-defined]
    return table, head, table.data_ptr() == head.data_ptr()


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
        loss = (network(*pieces.of(which)) - table[targets[which]].float()).pow(2).mean() / network.scale**2
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
    for part in which.tensor_split(range(1024, len(which), 1024)):
        wrong += float((network(*pieces.of(part)) - rows[part].float()).pow(2).sum())
    spread = float((rows[which].float() - rows.float().mean(0)).pow(2).sum())
    return wrong / spread


def rows_of(network: Hypernetwork, pieces: Pieces, which: Tensor) -> Tensor:
    """The network's rows for tokens numbered ``which``: float32 [tokens, width]."""
    out: Tensor = network(*pieces.of(which))
    return out
