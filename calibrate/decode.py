"""Quality in the deployed decode regime, teacher-forced and row-exact.

A window is a prompt (prefill rows) and the rest (decode rows): the prompt fills the cache, then all later tokens run
as one chunk of decode rows, each with its own selection. That equals as many decode steps (tests/test_contract.py) and
is not the perplexity of one mask for all rows, which runs neither prefill nor decode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sparsec.events import Event, Listener, silent
from sparsec.plugins.runtime import kv_bytes, new_cache, rows_as, stepping
from sparsec.plugins.step import Selection, Step
from sparsec.plugins.vocabulary import read, reads_merged

LOGITS = 2**28  # numbers that the logits of a batch of windows may be


@torch.no_grad()
def decode_logits(
    model: Any,
    tokens: Tensor,
    prompt: int,
    observe: Callable[[Selection], None] | None = None,
    cache: Any = None,
) -> tuple[Tensor, int]:
    """Logits of every decode row: [batch, length - prompt, vocabulary], row t for token t + 1; and the cache's bytes.

    A plan with merged tokens reads the prompt in them; decode rows are tokens of the base vocabulary, as it writes.

    Args:
        model: with a plan installed, or dense.
        tokens: [batch, length] ids, no padding.
        prompt: prefill rows.
        observe: sees what the selectors do.
        cache: an empty one, for who goes on from there; None is one of its own.
    """
    ids = tokens.to(model.device)
    if len(ids) > 1 and reads_merged(model):  # prompts of one length become prompts of several
        rows = [decode_logits(model, row[None], prompt, observe) for row in tokens]
        return torch.cat([logits for logits, _ in rows]), sum(resident for _, resident in rows)
    planned = getattr(model, "sparsec_plan", None) is not None
    if cache is None:
        cache = new_cache(model, "reference") if planned else DynamicCache(config=model.config)
    with rows_as("prefill"):
        model.get_decoder()(input_ids=read(model, ids[:, :prompt])[0], past_key_values=cache, use_cache=True)
    with stepping(Step(decode=True, observe=observe)):
        logits: Tensor = model(input_ids=ids[:, prompt:], past_key_values=cache, use_cache=True).logits
    return logits, kv_bytes(cache)


def decode_rows(
    model: Any, tokens: Tensor, prompt: int, observe: Callable[[Selection], None] | None = None
) -> tuple[Tensor, int]:
    """Loss of every decode row in nats, row t predicting token t + 1; and the cache's bytes for one window.

    Args:
        tokens: ids, [length] of one window or [batch, length].

    Returns:
        float32 [length - prompt - 1] or [batch, length - prompt - 1], on the CPU. Others: see :func:`decode_logits`.
    """
    batch = tokens if tokens.ndim == 2 else tokens[None]
    logits, resident = decode_logits(model, batch, prompt, observe)
    ids = batch.to(logits.device)
    losses = torch.stack([nll(rows, row[prompt:]) for rows, row in zip(logits, ids, strict=True)])
    return losses if tokens.ndim == 2 else losses[0], resident // len(batch)


def nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Row t's loss on token t + 1, float32: logits [rows, vocabulary], tokens [rows] -> [rows - 1]."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none").cpu()


@dataclass(frozen=True)
class Bucket:
    """Bits and bytes of the tokens ``first`` to ``last`` of all windows; the first token of a window is 0."""

    first: int
    last: int
    bits: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"first": self.first, "last": self.last, "bits_per_byte": self.bits / max(1, self.bytes)}


@dataclass(frozen=True)
class TextLoss:
    """Loss over decode rows of several windows; bits per byte compares across tokenizers, perplexity does not."""

    windows: tuple[float, ...]  # bits per byte of each window
    window_bytes: tuple[int, ...]
    bits_per_byte: float
    tokens: int
    bytes: int
    kv_bytes: int  # resident in the cache at the end of the longest window
    positions: tuple[Bucket, ...]  # quarters of the decode rows
    rows: Tensor = field(compare=False, repr=False)  # bits of every decode row, float64 [windows, rows - 1]

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the single rows."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "windows": list(self.windows),
            "window_bytes": list(self.window_bytes),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "kv_bytes": self.kv_bytes,
            "positions": [bucket.to_json() for bucket in self.positions],
        }


def text_loss(
    model: Any,
    tokenizer: Any,
    windows: Sequence[Tensor],
    prompt: int,
    *,
    batch_size: int = 1,
    observe: Callable[[Selection], None] | None = None,
    listen: Listener = silent,
    stage: str = "bits per byte",
) -> TextLoss:
    """Bits per byte of the text after the prompt, in the decode regime.

    Args:
        windows: token ids, [length] each, all of one length.
        prompt: prefill rows of each window.
        batch_size: windows at a time; fewer are run where their logits would take more than a gigabyte.
    """
    length = len(windows[0])
    most = max(1, LOGITS // ((length - prompt) * int(model.config.get_text_config().vocab_size)))
    batches = torch.split(torch.stack(list(windows)), max(1, min(batch_size, most)))
    parts: list[Tensor] = []
    largest = 0
    listen(Event(stage, 0, len(windows)))
    for batch in batches:
        losses, resident = decode_rows(model, batch, prompt, observe)
        largest = max(largest, resident)
        parts.append(losses.double() / math.log(2))
        listen(Event(stage, sum(map(len, parts)), len(windows)))
    bits = torch.cat(parts)
    edges = sorted({prompt + 1 + round((length - prompt - 1) * quarter / 4) for quarter in range(5)})
    sizes = _byte_sizes(tokenizer, torch.stack(list(windows)), edges)
    positions = tuple(
        Bucket(low, high - 1, float(bits[:, low - prompt - 1 : high - prompt - 1].sum()), sum(column))
        for low, high, column in zip(edges, edges[1:], zip(*sizes, strict=True), strict=False)
    )
    whole = tuple(sum(row) for row in sizes)
    each = tuple(b / max(1, size) for b, size in zip(bits.sum(1).tolist(), whole, strict=True))
    total = float(bits.sum()) / max(1, sum(whole))
    return TextLoss(each, whole, total, bits.numel(), sum(whole), largest, positions, bits)


def _byte_sizes(tokenizer: Any, windows: Tensor, edges: Sequence[int]) -> list[list[int]]:
    """UTF-8 bytes of each window's tokens between consecutive edges: [windows][edges - 1]."""
    # Differences of growing prefixes: parts of one character on both sides of an edge are not counted twice.
    pieces = [window[edges[0] : edge].tolist() for window in windows for edge in edges[1:]]
    texts = tokenizer.batch_decode(pieces, clean_up_tokenization_spaces=False)
    ends = torch.tensor([len(text.encode()) for text in texts]).view(len(windows), -1)
    found: list[list[int]] = ends.diff(prepend=torch.zeros(len(windows), 1, dtype=ends.dtype)).clamp_min(0).tolist()
    return found
