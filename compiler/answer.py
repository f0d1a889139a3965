"""Answers one prompt with an artifact, greedily, and says what it cost in memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer
from transformers.cache_utils import DynamicCache

from sparsec.plugins.kernels.support import Kernels
from sparsec.plugins.load import load
from sparsec.plugins.runtime import kv_bytes, uninstall
from sparsec.plugins.vocabulary import merges_by_batch, read


def answer(
    artifact: Path,
    text: str,
    *,
    max_new_tokens: int,
    dense: bool,
    chat: bool,
    device: str,
    dtype: str,
    kernels: Kernels = "auto",
    stream: bool,
) -> dict[str, Any]:
    """Generate; with ``stream`` the text is printed as it comes.

    Args:
        artifact: its folder.
        text: the prompt, or what the user says where the tokenizer has a chat template and ``chat`` is set.
        dense: the base weights without the plan.
        kernels: what the plan runs on, as in :func:`sparsec.load`.

    Returns:
        text, prompt and new tokens, bytes in the cache at the end, seconds.
    """
    model, tokenizer = load(artifact, device=device, dtype=dtype, kernels="reference" if dense else kernels)
    return respond(model, tokenizer, text, max_new_tokens=max_new_tokens, dense=dense, chat=chat, stream=stream)


def respond(
    model: Any, tokenizer: Any, text: str, *, max_new_tokens: int, dense: bool, chat: bool, stream: bool
) -> dict[str, Any]:
    """The same on a loaded model; ``dense`` takes the plan off for good."""
    if dense:
        uninstall(model)
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    if merges_by_batch(model):  # the tokenizer is the base model's
        ids, mask = read(model, inputs["input_ids"])
        inputs |= {"input_ids": ids, "attention_mask": mask}
    cache = DynamicCache(config=model.config)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    began = time.monotonic()
    with torch.no_grad():
        out = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    prompt = inputs["input_ids"].shape[1]
    return {
        "text": tokenizer.decode(out[0, prompt:], skip_special_tokens=True),
        "prompt_tokens": prompt,
        "new_tokens": out.shape[1] - prompt,
        "kv_bytes": kv_bytes(cache),
        "seconds": time.monotonic() - began,
        "dense": dense,
    }
