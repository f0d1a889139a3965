"""Tokens of long texts, kept below the cache folder: millions of characters take half a minute to read, every time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from sparsec.calibrate.splits import KeepTokens, Texts
from sparsec.compiler.stages import Stages, Stored, fingerprint

LEAST = 1 << 21  # characters, from which on they are kept


def kept_tokens(cache_dir: Path) -> KeepTokens:
    """For :class:`sparsec.calibrate.splits.Calibration`: tokens by what the tokenizer is and all that it read."""
    return partial(_kept, Stages(cache_dir / "tokens"))


def _kept(stages: Stages, tokenizer: Any, texts: Texts, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    # Of a tokenizer that is Python code there is no telling what it does.
    if sum(map(len, texts)) < LEAST or not getattr(tokenizer, "is_fast", False):
        return make()

    def read() -> Stored:
        found = make()
        return [len(ids) for ids in found], {"tokens": torch.cat(found)}

    own = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "version": tokenizers.__version__}
    lengths, found = stages.kept(fingerprint(**own, texts=list(texts)), read)
    return list(torch.split(found["tokens"], lengths))
