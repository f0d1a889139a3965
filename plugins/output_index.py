"""Finds, among the output rows of merged tokens, those with the largest logits: an index by inner product.

Logits are inner products, and a row's length carries how frequent its token is: an index by cosine would find other
tokens. Few rows are simply all multiplied, and so are any number on a GPU. Many on a CPU are held once more in 4 bits
for every four dimensions (FAISS's product quantizer with its fast scan), which finds the candidates; the rows
themselves give the candidates' logits. The quantizer keeps distances, where it is logits that matter, so rows are
turned and scaled first by what hidden states are like: with C = E[h hᵀ], the squared error of C^½ x is the expected
squared error of the logit h·x. Nothing of the index is stored: it is built at load.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from sparsec.errors import UsageError

EXACT = 65_536  # so many rows at most are all multiplied on a CPU
CANDIDATES = 2048  # found by an index, for each hidden state
SUB = 4  # dimensions that share 4 bits
TRAIN = 65_536  # rows that the quantizer is trained on
CHUNK = 65_536  # rows turned at once
RIDGE = 1e-3  # of the mean variance, on the diagonal of C


class OutputIndex:
    """Candidates for hidden states, with exact logits.

    Args:
        rows: [tokens, width], output rows, on the device and in the dtype that logits are computed in.
        states: float32 [width, width], E[h hᵀ] of the hidden states that the output layer gets.
        exact: rows up to which all are multiplied on a CPU.
        candidates: at most so many are found for each hidden state.

    Raises:
        UsageError: an index is needed and FAISS is not installed.
    """

    def __init__(self, rows: Tensor, states: Tensor, *, exact: int = EXACT, candidates: int = CANDIDATES) -> None:
        self.rows = rows
        self.all = len(rows) <= exact or rows.device.type != "cpu"
        self.candidates = len(rows) if len(rows) <= exact else min(candidates, len(rows))
        if not self.all:
            self._index, self._turn = _built(rows, states)

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[states, width] -> numbers of rows, int64 [states, candidates], and their logits, float32, in no order."""
        if self.all:
            logits = torch.nn.functional.linear(hidden.to(self.rows.dtype), self.rows).float()
            if self.candidates == len(self.rows):
                return torch.arange(len(self.rows), device=hidden.device).expand(len(hidden), -1), logits
            best = logits.topk(self.candidates, dim=-1, sorted=False)
            return best.indices, best.values
        _, found = self._index.search((hidden.float() @ self._turn).contiguous().numpy(), self.candidates)
        numbers = torch.from_numpy(found)
        states = hidden.to(self.rows.dtype)
        near = [self.rows.index_select(0, which) @ state for which, state in zip(numbers, states, strict=True)]
        return numbers, torch.stack(near).float()


def _built(rows: Tensor, states: Tensor) -> tuple[Any, Tensor]:
    """FAISS's index of the turned rows, and what turns a hidden state: float32 [width, turned]."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # what SWIG made it with is old for Python 3.12
            import faiss
    except ImportError:
        raise UsageError(
            f"{len(rows):,} merged tokens are written through an index, which needs FAISS: pip install 'sparsec[index]'"
        ) from None
    width = rows.shape[1]
    values, vectors = torch.linalg.eigh(
        states.double() + RIDGE * states.diagonal().double().mean() * torch.eye(width, dtype=torch.double)
    )
    parts = -(-width // SUB)
    parts += parts % 2  # fast scan takes two at a time
    # The directions that vary most go to different parts, one each; what is left of the last ones is zero.
    order = torch.arange(width - 1, -1, -1)
    order = torch.cat([order, order.new_full((parts * SUB - width,), -1)]).view(SUB, parts).T.flatten()
    real = (order >= 0)[None]
    turn = ((vectors * values.sqrt())[:, order] * real).float()
    back = ((vectors / values.sqrt())[:, order] * real).float()
    index = faiss.IndexPQFastScan(parts * SUB, parts, 4, faiss.METRIC_INNER_PRODUCT)
    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:TRAIN]
    index.train((rows[some].float() @ turn).numpy())
    for part in torch.split(rows, CHUNK):
        index.add((part.float() @ turn).numpy())
    return index, back
