"""Logits of given continuations as generating would see them, for batches of unequal length.

The prompt of a window runs as prefill rows, what follows as decode rows, each with its own selection: what generating
token by token computes, in two calls. Prompts are padded on the left and continuations on the right, so that every row
of a batch begins to decode at the same place; token numbers and positions count real tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from sparsec.plugins.runtime import new_cache, rows_as


@dataclass(frozen=True)
class Window:
    """Tokens that a model reads, and which of them are scored.

    The row of token t predicts token t + 1, so the first token cannot be scored and the last one is not read. As in
    generating, the first token behind the prompt is predicted by the prompt's last row.
    """

    tokens: tuple[int, ...]
    prompt: int  # first tokens, whose rows are prefill rows; the others are decode rows
    scored: int  # last tokens; those inside the prompt are predicted by prefill rows

    def __post_init__(self) -> None:
        if not 1 <= self.prompt < len(self.tokens):
            raise ValueError(f"a prompt of {self.prompt} of {len(self.tokens)} tokens leaves nothing to score or read")
        if not len(self.tokens) - self.prompt <= self.scored < len(self.tokens):
            raise ValueError("every token behind the prompt is scored, and the first token never is")

    @property
    def decoded(self) -> int:
        """Decode rows."""
        return len(self.tokens) - 1 - self.prompt

    @property
    def from_prompt(self) -> int:
        """Scored tokens that prefill rows predict: one at least."""
        return self.scored - self.decoded


@torch.no_grad()
def scored_logits(model: Any, windows: Sequence[Window]) -> list[Tensor]:
    """Logits of the scored tokens: [scored, vocabulary] for each window, in the model's dtype, on its device.

    Windows with the same prompt share its prefill.

    Args:
        model: with a plan installed, or dense.
        windows: one batch.
    """
    places: dict[tuple[int, ...], int] = {}
    at = [places.setdefault(window.tokens[: window.prompt], len(places)) for window in windows]
    planned = getattr(model, "sparsec_plan", None) is not None
    cache = new_cache(model, "reference") if planned else DynamicCache(config=model.config)
    prompt, mask = padded(list(places), left=True)
    most = max(window.from_prompt for window in windows)
    with rows_as("prefill"):
        first = _call(model, prompt, mask, cache, logits_to_keep=most)
    logits = [first[row, -window.from_prompt :] for row, window in zip(at, windows, strict=True)]
    more = [number for number, window in enumerate(windows) if window.decoded]
    if more:
        rows = torch.tensor([at[number] for number in more])
        cache.batch_select_indices(rows.to(model.device))
        rest, real = padded([windows[number].tokens[windows[number].prompt : -1] for number in more], left=False)
        with rows_as("decode"):
            then = _call(model, rest, torch.cat((mask[rows], real), 1), cache)
        for row, number in enumerate(more):
            logits[number] = torch.cat((logits[number], then[row, : windows[number].decoded]))
    return logits


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [rows, longest]; padding has id 0."""
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for number, row in enumerate(rows):
        here = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[number, here], mask[number, here] = torch.tensor(row), 1
    return ids, mask


def _call(model: Any, ids: Tensor, mask: Tensor, cache: Cache, **options: Any) -> Tensor:
    # Positions as generate() counts them: padding has none, whatever number stands there.
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    logits: Tensor = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=positions.to(model.device),
        past_key_values=cache,
        use_cache=True,
        **options,
    ).logits
    return logits
