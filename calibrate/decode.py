"""Quality in the deployed decode regime, teacher-forced and row-exact.

A window is a prompt (prefill rows) and the rest (decode rows): the prompt fills the cache, then all later tokens run
as one chunk of decode rows, each with its own selection. That equals as many decode steps (tests/test_contract.py) and
is not the perplexity of one mask for all rows, which runs neither prefill nor decode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sparsec.events import Listener, silent, tracked
from sparsec.plugins.attention import Selection, Step
from sparsec.plugins.runtime import kv_bytes, new_cache, rows_as, stepping


@dataclass
class SelectorStats:
    """What the selectors of retrieval heads did on decode rows, by (layer, head). Use as ``Step.observe``."""

    recall: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)  # share of true attention mass kept
    kept: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)  # tokens kept, forced ones included
    context: list[Tensor] = field(default_factory=list)

    def __call__(self, seen: Selection) -> None:
        """Add one tile of rows."""
        logits = (seen.q.float() @ seen.k.float().transpose(-1, -2)) * seen.scale
        weights = logits.masked_fill(~seen.visible, float("-inf")).softmax(-1)
        keep = seen.keep.expand_as(weights)
        recall, kept = (weights * keep).sum(-1), keep.sum(-1)
        for place, head in enumerate(seen.heads):
            self.recall.setdefault((seen.layer, head), []).append(recall[:, place].flatten().cpu())
            self.kept.setdefault((seen.layer, head), []).append(kept[:, place].flatten().cpu())
        self.context.append(seen.visible.sum(-1).flatten().cpu())

    def table(self) -> list[dict[str, float]]:
        """A row a head: recall (mean, p5) and tokens kept (mean, p95)."""
        rows = []
        for (layer, head), recalls in sorted(self.recall.items()):
            recall, kept = torch.cat(recalls), torch.cat(self.kept[layer, head]).float()
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "recall_mean": float(recall.mean()),
                    "recall_p5": float(recall.quantile(0.05)),
                    "kept_mean": float(kept.mean()),
                    "kept_p95": float(kept.quantile(0.95)),
                }
            )
        return rows

    def summary(self) -> dict[str, float]:
        """Over all retrieval heads and rows; empty where nothing was selected."""
        if not self.recall:
            return {}
        recall = torch.cat([torch.cat(r) for r in self.recall.values()])
        kept = torch.cat([torch.cat(k) for k in self.kept.values()]).float()
        return {
            "heads": len(self.recall),
            "rows": len(recall) // len(self.recall),
            "context_mean": float(torch.cat(self.context).float().mean()),
            "recall_mean": float(recall.mean()),
            "recall_p5": _quantile(recall, 0.05),
            "kept_mean": float(kept.mean()),
            "kept_p95": _quantile(kept, 0.95),
        }


def _quantile(values: Tensor, q: float) -> float:
    """torch.quantile refuses long inputs."""
    ranked = values.sort().values
    return float(ranked[min(len(ranked) - 1, round(q * (len(ranked) - 1)))])


@torch.no_grad()
def decode_rows(model: Any, tokens: Tensor, prompt: int, observe: SelectorStats | None = None) -> tuple[Tensor, int]:
    """Loss of every decode row in nats: [length - prompt - 1], row t predicting token t + 1; and the cache's bytes.

    Args:
        model: with a plan installed, or dense.
        tokens: [length] ids.
        prompt: prefill rows.
        observe: collects what the selectors do.
    """
    ids = tokens[None].to(model.device)
    planned = getattr(model, "sparsec_plan", None) is not None
    cache = new_cache(model) if planned else DynamicCache(config=model.config)
    with rows_as("prefill"):
        model.get_decoder()(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    with stepping(Step(decode=True, observe=observe)):
        logits = model(input_ids=ids[:, prompt:], past_key_values=cache, use_cache=True).logits
    return nll(logits[0], ids[0, prompt:]), kv_bytes(cache)


def nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Row t's loss on token t + 1, float32: logits [rows, vocabulary], tokens [rows] -> [rows - 1]."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none").cpu()


@dataclass(frozen=True)
class TextLoss:
    """Loss over decode rows of several windows; bits per byte compares across tokenizers, perplexity does not."""

    windows: tuple[float, ...]  # bits per byte of each window
    bits_per_byte: float
    tokens: int
    bytes: int
    kv_bytes: int  # resident in the cache at the end of the longest window

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "windows": list(self.windows),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "kv_bytes": self.kv_bytes,
        }


def text_loss(
    model: Any,
    tokenizer: Any,
    windows: Sequence[Tensor],
    prompt: int,
    *,
    observe: SelectorStats | None = None,
    listen: Listener = silent,
    stage: str = "bits per byte",
) -> TextLoss:
    """Bits per byte of the text after the prompt, in the decode regime. windows: token ids, [length] each."""
    bits: list[float] = []
    sizes: list[int] = []
    largest = 0
    for window in tracked(windows, stage, listen, len(windows)):
        losses, resident = decode_rows(model, window, prompt, observe)
        largest = max(largest, resident)
        text = tokenizer.decode(window[prompt + 1 :], clean_up_tokenization_spaces=False)
        bits.append(float(losses.double().sum()) / math.log(2))
        sizes.append(len(text.encode()))
    tokens = sum(len(window) - prompt - 1 for window in windows)
    each = tuple(b / max(1, size) for b, size in zip(bits, sizes, strict=True))
    return TextLoss(each, sum(bits) / max(1, sum(sizes)), tokens, sum(sizes), largest)
