"""Merges decided on the batch at hand, as in Dynamic tokenization (Feher, Vulić, Minixhofer, arXiv 2411.18553).

The most frequent neighbours in a batch of prompts become tokens for this batch: their embeddings are predicted and put
into rows behind the model's own, and the prompts are read in them. The next batch fills the rows anew; what is in a KV
cache stays what it was. So a prompt may be read otherwise in other company, and caches keyed by token ids cannot be
shared between batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsec.plan import Vocabulary
from sparsec.plugins.byte_level import ByteLevel
from sparsec.plugins.byte_level import Pieces as Places
from sparsec.plugins.hypernetwork import Hypernetwork, Pieces
from sparsec.plugins.merging import Merger, Rules, constituents, mine

NETWORK = "vocabulary.hypernetwork."


def network_shapes(width: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """The stored hypernetwork's tensors by name, with their shapes."""
    with torch.device("meta"):
        network = Hypernetwork(width, inputs, 1.0)
    return {NETWORK + name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


class Stored(Protocol):
    """The base model's embedding and output layer, and the tensors in the artifact."""

    @property
    def embedding(self) -> Tensor: ...
    @property
    def head(self) -> Tensor: ...
    @property
    def tied(self) -> bool: ...
    @property
    def stored(self) -> Mapping[str, Tensor]: ...


class BatchReader:
    """Reads prompts of the base vocabulary in tokens that this batch is merged into.

    Args:
        tokenizer: the base model's.
        model: whose rows behind the base vocabulary are filled.
        vocabulary: the plan's, dynamic.
        base: what the model was like before it got those rows.
    """

    def __init__(self, tokenizer: Any, model: Any, vocabulary: Vocabulary, base: Stored) -> None:
        self._own, self._plan = ByteLevel.of(tokenizer), vocabulary
        self._places = Places(self._own, vocabulary.boundary)
        self._model, self._base = model, base
        self._network: Hypernetwork | None = None
        if vocabulary.inputs is not None:
            self._network = Hypernetwork(vocabulary.width, vocabulary.inputs, 1.0)
            self._network.load_state_dict(
                {name.removeprefix(NETWORK): base.stored[name] for name in base.stored if name.startswith(NETWORK)}
            )
            self._network.to(base.embedding.device).requires_grad_(False)

    def batch(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """The merged ids of the prompts; the model's rows hold their embeddings until the next batch."""
        plan = self._plan
        sequences = [(row, self._places(row)) for row in rows]
        rules = Rules(self._own, across=plan.boundary == "phrase")
        found = mine(sequences, plan.merged, plan.base, rules, least=plan.least or 2)
        merges = [(each.left, each.right, each.token) for each in found]
        if merges:
            self._fill(constituents(merges, plan.base))
        merger = Merger(merges)
        return [merger(row, places)[0] for row, places in sequences]

    @torch.no_grad()
    def _fill(self, parts: Sequence[tuple[int, ...]]) -> None:
        table, first = self._model.get_input_embeddings().weight, self._plan.base
        if self._network is None:
            new = torch.stack([self._base.embedding[list(each)].float().mean(0) for each in parts])
        else:
            pieces = Pieces(parts, self._base.embedding, self._base.head, self._base.tied)
            new = self._network(*pieces.of(torch.arange(len(parts), device=table.device)))
        table[first : first + len(parts)] = new.to(table)
