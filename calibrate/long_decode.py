"""Long decode: a thousand tokens and more, generated greedily after natural text, beside what the dense model writes.

Short answers after a dense prefill hide damage to decode; here every token after the prompt is a decode step on the
cache that the plan keeps. One token chosen otherwise changes all after it, so besides the agreement of the two
free-running texts there is the agreement along the dense text, where each step starts from the same past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.decode import LOGITS, decode_logits
from sparsec.calibrate.tasks import greedy
from sparsec.events import Event, Listener, silent
from sparsec.plugins.vocabulary import read

FIRST = 256  # tokens at the beginning whose agreement is reported on its own
GRAM = 4


@dataclass(frozen=True)
class LongDecode:
    """Texts of one system against the reference's, prompt by prompt."""

    prompt_tokens: int
    new_tokens: int
    prefix: tuple[int, ...]  # tokens before the first difference
    agreement: tuple[float, ...]  # share of the first 256 tokens that are equal, place by place
    followed: tuple[float, ...]  # share of the reference's tokens that the system would have chosen too, step by step
    repeated: tuple[float, ...]  # share of 4-grams that were there before in the same text
    distinct: tuple[float, ...]  # different tokens over tokens

    def to_json(self) -> dict[str, Any]:
        """Plain data: means, and every prompt."""
        each = {
            "prefix": self.prefix,
            "agreement": self.agreement,
            "followed": self.followed,
            "repeated": self.repeated,
            "distinct": self.distinct,
        }
        means = {name: sum(values) / len(values) for name, values in each.items()}
        return {
            "n": len(self.prefix),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "first": min(FIRST, self.new_tokens),
            **means,
            "each": {name: list(values) for name, values in each.items()},
        }


def continued(
    model: Any,
    tokenizer: Any,
    prompts: Tensor,
    new_tokens: int,
    *,
    batch_size: int = 4,
    listen: Listener = silent,
    stage: str = "long decode",
) -> Tensor:
    """Greedy continuations, not stopped at an end token: int64 [prompts, new_tokens] on the CPU.

    Args:
        model: ready to generate, with a plan or dense.
        prompts: int64 [prompts, length].
    """
    parts: list[Tensor] = []
    listen(Event(stage, 0, len(prompts)))
    for batch in torch.split(prompts, batch_size):
        ids, mask = read(model, batch.to(model.device))
        with greedy(model, tokenizer, new_tokens, stop=False), torch.no_grad():
            out = model.generate(ids, attention_mask=mask)
        parts.append(out[:, ids.shape[1] :].cpu())
        listen(Event(stage, sum(map(len, parts)), len(prompts)))
    return torch.cat(parts)


def followed(model: Any, prompts: Tensor, texts: Tensor, *, batch_size: int = 4) -> Tensor:
    """Would the model have written the same next token, given ``texts`` so far? bool [prompts, new tokens - 1].

    All tokens behind the prompt are decode rows. The first token, which the prompt's last row predicts, is left out.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    size = max(1, min(batch_size, LOGITS // (texts.shape[1] * vocabulary)))
    same = []
    for before, text in zip(torch.split(prompts, size), torch.split(texts, size), strict=True):
        logits, _ = decode_logits(model, torch.cat([before, text], dim=1), before.shape[1])
        same.append(logits[:, :-1].argmax(-1).cpu() == text[:, 1:])
    return torch.cat(same)


def compared(texts: Tensor, reference: Tensor, same_steps: Tensor, prompt_tokens: int) -> LongDecode:
    """A system's texts against the reference's.

    Args:
        texts, reference: int64 [prompts, new tokens].
        same_steps: from :func:`followed`.
    """
    same = texts == reference
    prefix = same.long().cumprod(1).sum(1)
    agreement = same[:, :FIRST].double().mean(1)
    return LongDecode(
        prompt_tokens=prompt_tokens,
        new_tokens=texts.shape[1],
        prefix=tuple(prefix.tolist()),
        agreement=tuple(agreement.tolist()),
        followed=tuple(same_steps.double().mean(1).tolist()),
        repeated=tuple(repeated_grams(text) for text in texts.tolist()),
        distinct=tuple(len(set(text)) / len(text) for text in texts.tolist()),
    )


def repeated_grams(text: Sequence[int], size: int = GRAM) -> float:
    """Share of a text's n-grams that stood in it before; 0 where it is shorter than one."""
    grams = list(zip(*(text[start:] for start in range(size)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
