"""Decoder layers whose small operations torch.compile fuses; attention between them runs as it is.

Norms, rotary embeddings, activations, residual additions and casts are some thirty launches a layer. In a decode step
of a large model they wait longer than they work, and in training they move more bytes than the matrix products do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as once
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsec.plugins.families import decoder_layers

RECOMPILES = 64  # kinds of calls that a layer is compiled for: rows, with and without gradients


@contextmanager
def fused_layers(model: Any, cache: Any = None, *, backend: str = "inductor") -> Iterator[None]:
    """Inside the block each decoder layer is compiled at its first call, once for all layers of a kind.

    Values change by rounding alone: what a layer keeps in float32 between two operations is not rounded in between.
    Where PyTorch cannot compile a layer it says so and runs it as before. Routed layers stay as they are: which rows
    run is known only when they do. Layers whose activations are recomputed (gradient checkpointing) run as before, too.

    Args:
        model: a causal-LM model, with a plan or without.
        cache: the one that calls in the block get, if any; it is not traced either.
        backend: torch.compile's.
    """
    plan = getattr(model, "sparsec_plan", None)
    if plan is not None and (plan.routing is not None or plan.dsa is not None):
        yield
        return
    name = model.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS.get(name)
    layers = list(decoder_layers(model))
    if attention is not None:
        AttentionInterface.register(name, torch.compiler.disable(attention))  # type: ignore[no-untyped-call]
    if cache is not None:
        cache.update = torch.compiler.disable(cache.update)  # type: ignore[no-untyped-call]
    try:
        with compiling():
            for layer in layers:
                layer.compile(backend=backend)
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        if cache is not None:
            del cache.update
        if attention is not None:
            AttentionInterface.register(name, attention)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside the block what cannot be compiled runs as it is, with PyTorch's own warning."""
    # A layer's number must not make it another function; a failure must not end what ran before.
    with torch._dynamo.config.patch(
        allow_unspec_int_on_nn_module=True, recompile_limit=RECOMPILES, suppress_errors=True
    ):
        yield


@once
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its small operations fused, for every shape anew; called in :func:`compiling`."""
    return torch.compile(function, dynamic=False)
