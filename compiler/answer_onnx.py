"""Answers one prompt with an artifact's ONNX export, greedily, tokens as they come."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from sparsec.errors import ArtifactError
from sparsec.plugins.onnx_runner import FOLDER, OnnxModel
from sparsec.plugins.quiet import silenced


def answer_onnx(
    artifact: Path, text: str, *, max_new_tokens: int, chat: bool, device: str, stream: bool
) -> dict[str, Any]:
    """As :func:`sparsec.compiler.answer.answer`, on ONNX Runtime."""
    model = OnnxModel(artifact / FOLDER, device=device)
    tokenizer = _tokenizer(artifact)
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    began = time.monotonic()
    new: list[int] = []
    shown = ""
    for (token,) in model.stream([ids], max_new_tokens=max_new_tokens):
        assert token is not None
        new.append(token)
        whole = tokenizer.decode(new, skip_special_tokens=True)
        if stream and not whole.endswith("�"):  # a character's bytes may be several tokens
            click.echo(whole[len(shown) :], nl=False)
            shown = whole
    if stream:
        click.echo(whole[len(shown) :])
    return {
        "text": whole,
        "prompt_tokens": len(ids),
        "new_tokens": len(new),
        "kv_bytes": model.kv_bytes,
        "seconds": time.monotonic() - began,
        "dense": False,
    }


def _tokenizer(artifact: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with silenced():
            return AutoTokenizer.from_pretrained(artifact, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"the tokenizer of {artifact} cannot be read ({reason}): copy the whole artifact") from None
