"""A small hypernetwork: the embeddings of a merged token's pieces in, the merged token's input embedding out.

ZeTT (arXiv 2405.07883) trains a transformer over the pieces' (input, output) embeddings for every tokenizer at once, in
days. This one serves one base model and merges of its own tokens only. It corrects the mean of the pieces.
How it is trained: calibrate/hypernetwork.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

LONGEST = 8  # pieces that are looked at, the last ones


def padded(constituents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pieces as int64 [tokens, longest], padded with 0 behind, and which are real: bool, the same shape."""
    longest = max(map(len, constituents))
    ids = torch.zeros(len(constituents), longest, dtype=torch.long)
    real = torch.zeros(len(constituents), longest, dtype=torch.bool)
    for row, pieces in enumerate(constituents):
        ids[row, : len(pieces)] = torch.tensor(pieces)
        real[row, : len(pieces)] = True
    return ids, real


class Hypernetwork(nn.Module):
    """[tokens, pieces, inputs] -> [tokens, width].

    Args:
        width: dimensions of an embedding.
        inputs: of a piece: ``width`` where the model's embeddings are tied, else twice that, input and output.
        scale: root mean square of the base model's embedding.
        inner: dimensions inside.
        layers: of the transformer over the pieces.
    """

    scale: Tensor

    def __init__(self, width: int, inputs: int, scale: float, inner: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
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


def embeddings(model: object) -> tuple[Tensor, Tensor, bool]:
    """A model's embedding, its output layer's weight, and whether they are one."""
    table = model.get_input_embeddings().weight.detach()  # type: ignore[attr-defined]
    head = model.get_output_embeddings().weight.detach()  # type: ignore[attr-defined]
    return table, head, table.data_ptr() == head.data_ptr()


def rows_of(network: Hypernetwork, pieces: Pieces, which: Tensor) -> Tensor:
    """The network's rows for tokens numbered ``which``: float32 [tokens, width]."""
    out: Tensor = network(*pieces.of(which))
    return out
