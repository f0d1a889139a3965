"""Is an export still the artifact? The same prompts and steps through PyTorch's reference and through a runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from sparsec.plugins.runtime import new_cache


class Runner(Protocol):
    """What runs an export, as :class:`sparsec.plugins.onnx_runner.OnnxModel` does."""

    def reset(self, batch: int = 1) -> None:
        """Forget everything; so many sequences begin."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Read prompts: logits behind each one's last token, [batch, vocabulary]."""

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """One decode row of every sequence: logits, [batch, vocabulary]."""


@torch.no_grad()
def compare(model: Any, runner: Runner, prompts: Sequence[Sequence[int]], steps: int) -> dict[str, Any]:
    """Both read the prompts, PyTorch with padding on the left; then PyTorch's greedy tokens go through both.

    Args:
        model: runs the artifact's plan in PyTorch.
        runner: runs the export.
        prompts: token ids of several lengths.
        steps: decode rows a sequence.

    Returns:
        ``prefill`` and ``decode``: the largest difference of logits, relative to the row's largest logit; ``same``:
        share of rows whose greedy token is the same.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache = new_cache(model, "reference")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits[:, -1]
    runner.reset(len(prompts))
    errors, same = [], []
    found = runner.prefill(prompts)
    for step in range(steps + 1):
        wanted = expected.float().numpy()
        errors.append(float((np.abs(found - wanted).max(1) / np.abs(wanted).max(1)).max()))
        same.append(float((found.argmax(1) == wanted.argmax(1)).mean()))
        if step == steps:
            break
        tokens = expected.argmax(-1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        expected = model(
            tokens[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        found = runner.step(tokens.tolist())
    return {"prefill": errors[0], "decode": max(errors[1:], default=0.0), "same": float(np.mean(same))}
