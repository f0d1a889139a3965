"""What the dense model says about training windows, computed once: the k most likely next tokens of every position.

RTPurbo (arXiv 2605.16928), stage 2, caches the teacher's top-10 logits. Here their log-probabilities are cached (over
the whole vocabulary), so that the mass outside the k is known as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsec.calibrate import ranks
from sparsec.errors import TrainingError
from sparsec.events import Listener, tracked
from sparsec.plugins.fused import fused

ROWS = 2048  # rows whose logits over the whole vocabulary are held at once
FUSED = 1 << 29  # logits that are held at once where few copies of them are made


@dataclass(frozen=True)
class TopK:
    """``indices`` int32 and ``logp`` float16 (natural log-probabilities), both [windows, length, k]."""

    indices: Tensor
    logp: Tensor

    def mass(self) -> float:
        """The k tokens' share of the teacher's probability: the mean over every seventh window."""
        return float(self.logp[::7].float().exp().sum(-1).mean())


class Head:
    """A model's output layer as a function of weight and hidden states, with what the family does to logits."""

    def __init__(self, model: Any) -> None:
        self.module = model.get_output_embeddings()
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """[rows, hidden] -> float32 logits [rows, vocabulary]; ``weight`` instead of the model's own."""
        return logits_of(hidden, self.module.weight if weight is None else weight, self.module.bias, self.softcap)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """An output layer: [rows, hidden] -> float32 logits [rows, vocabulary]."""
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def fused_rows(head: Head) -> int:
    """Rows whose logits are held at once by a fused function: 8192, or fewer with a large vocabulary."""
    return min(8192, max(1, FUSED // len(head.module.weight)))


def divergence(true: Tensor, found: Tensor) -> Tensor:
    """Forward KL of each row over the whole vocabulary, the first one the teacher: logits [rows, n] -> nats [rows]."""
    logp, logq = true.log_softmax(-1), found.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


@torch.no_grad()
def top_k(model: Any, tokens: Tensor, k: int, batch: int, precision: Callable[[], Any], listen: Listener) -> TopK:
    """The dense model's k most likely next tokens at every position.

    Args:
        model: no plan installed.
        tokens: int64 [windows, length].
        k: how many.
        batch: windows a forward.
        precision: makes the context (autocast or nothing) that forwards run in.
    """
    head, found = Head(model), []
    starts = ranks.own(range(0, len(tokens), batch))
    for start in tracked(starts, "read the teacher", listen, len(starts)):
        part = tokens[start : start + batch]
        indices = torch.empty(part.numel(), k, dtype=torch.int32)
        logp = torch.empty(part.numel(), k, dtype=torch.float16)
        with precision():
            hidden = model.get_decoder()(input_ids=part.to(model.device), use_cache=False).last_hidden_state
            best, rows_held = (fused(_best), fused_rows(head)) if hidden.is_cuda else (_best, ROWS)
            for at, rows in _chunks(hidden.flatten(0, 1), rows_held):
                indices[at], logp[at] = (
                    x.cpu() for x in best(rows, head.module.weight, head.module.bias, head.softcap, k)
                )
        found.append((indices.view(*part.shape, k), logp.view(*part.shape, k)))
    both = zip(*ranks.in_order(found), strict=True)
    return TopK(*(torch.cat(parts) for parts in both))


def _best(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, k: int) -> tuple[Tensor, Tensor]:
    """Of some rows: the k most likely tokens, int32, and their log-probabilities, float16."""
    logits = logits_of(hidden, weight, bias, softcap)
    best = logits.topk(k, dim=-1)
    return best.indices.int(), (best.values - logits.logsumexp(-1, keepdim=True)).half()


def _chunks(rows: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(rows), size):
        yield slice(start, start + size), rows[start : start + size]


def weights_digest(model: Any) -> str:
    """sha256 over a model's parameters and their names."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def identity(weights: str, tokens: Tensor, k: int) -> str:
    """sha256 over what a teacher's answers depend on: the model's :func:`weights_digest`, the windows, and a number."""
    return hashlib.sha256(f"{weights}/{k}/".encode() + tokens.numpy().tobytes()).hexdigest()


def save_kept(file: Path, tensors: dict[str, Tensor], owner: str) -> None:
    """Keep what a teacher said, whole or not at all; ``owner`` is their :func:`identity`."""
    aside = file.with_suffix(".part")
    save_file(tensors, aside, metadata={"owner": owner})
    aside.rename(file)


def read_kept(file: Path, owner: str) -> dict[str, Tensor] | None:
    """What was kept, None where there is nothing.

    Raises:
        TrainingError: the file is damaged, or another model's or other windows'.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as kept:
            if (kept.metadata() or {}).get("owner") != owner:
                raise TrainingError(f"the teacher's answers in {file} are another model's or other text's: delete them")
            return {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"the teacher's answers in {file} are damaged ({error}): delete them") from None
