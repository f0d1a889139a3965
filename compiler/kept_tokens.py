"""Tokens of long texts, kept below the cache folder: millions of characters take half a minute to read, every time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.splits import Keep, Texts
from sparsec.compiler.stages import Stages

LEAST = 1 << 21  # characters, from which on they are kept


def kept_tokens(cache_dir: Path) -> Keep:
    """For :class:`sparsec.calibrate.splits.Calibration`: tokens by what the tokenizer is and all that it read."""
    return partial(_kept, Stages(cache_dir / "tokens"))


def _kept(stages: Stages, tokenizer: Any, texts: Texts, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    # Of a tokenizer that is Python code there is no telling what it does.
    if sum(map(len, texts)) < LEAST or not getattr(tokenizer, "is_fast", False):
        return make()
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    key = digest.hexdigest()
    stored = stages.load(key)
    if stored is not None:
        return list(torch.split(stored[1]["tokens"], stored[0]))
    found = make()
    stages.store(key, [len(ids) for ids in found], {"tokens": torch.cat(found)})
    return found
