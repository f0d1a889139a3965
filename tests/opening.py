"""Opening checkpoints in tests: what is refused with which words, and what a model says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from sparsec.compiler.source import Source
from sparsec.errors import SourceError, SparsecError

Opened = Callable[..., Source]


def tiny_config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **more,
    )


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None drops one."""
    data = json.loads(file.read_text()) if file.is_file() else {}
    data = {key: value for key, value in {**data, **changes}.items() if value is not None}
    file.write_text(json.dumps(data))


def refusal(call: Callable[[], object], kind: type[SparsecError] = SourceError) -> str:
    """The message of the error that ``call`` raises: one line that says what to do after its last colon."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.rpartition(": ")[2].split()) >= 2
    return message


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(torch.arange(20)[None]).logits
    return output
