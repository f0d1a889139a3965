"""Which weights a training run may change: all of them, or low-rank additions (LoRA, peft) that are merged later."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor

from sparsec.errors import TrainingError
from sparsec.plugins.routed_units import is_added

Kind = Literal["lora", "all"]
LARGE = 10**9  # weights above which activations are recomputed rather than held


@contextmanager
def trainable(model: Any, kind: Kind, rank: int, checkpointing: bool | None, seed: int = 0) -> Iterator[None]:
    """Inside the block the chosen weights require a gradient; afterwards the model is plain again, additions merged.

    Where all train they are float32 inside the block, in their own dtype again behind it. Additions are float32.

    Selectors never train: a selector that moves with the weights would have nothing fixed to be judged by.

    Args:
        kind: ``all``, or ``lora`` on all linear layers but the output layer.
        rank: of the additions.
        seed: of the additions' first values.
        checkpointing: recompute activations in the backward pass; None: where the model has over a billion weights.

    Raises:
        TrainingError: peft is not installed.
    """
    wrapped, held = None, {}
    if kind == "lora":
        wrapped = _with_lora(model, rank, seed)
    else:
        # Steps of a usual rate are less than a bfloat16 weight's last digit: they would be lost one by one.
        held = {name: w.dtype for name, w in model.named_parameters() if w.is_floating_point()}
        for name, weight in model.named_parameters():
            if name in held:
                weight.data = weight.data.float()
            weight.requires_grad_(not is_added(name) and name in held)
    try:
        with recomputing(model, checkpointing):
            yield
    finally:
        if wrapped is not None:
            wrapped.merge_and_unload()
            model.__dict__.pop("peft_config", None)
        model.requires_grad_(False).eval()
        for name, weight in model.named_parameters():
            if name in held:
                weight.data = weight.data.to(held[name])


def recomputes(model: Any, wanted: bool | None) -> bool:
    """Would :func:`recomputing` do anything?"""
    return bool(sum(w.numel() for w in model.parameters()) > LARGE if wanted is None else wanted)


@contextmanager
def recomputing(model: Any, wanted: bool | None = None) -> Iterator[None]:
    """Inside the block activations are recomputed in the backward pass; None: with over a billion weights."""
    wanted = recomputes(model, wanted)
    if wanted:
        _checkpoint(model)
    try:
        yield
    finally:
        if wanted:
            _stop_checkpointing(model)
            model.eval()


def changed_weights(model: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that differ from ``before``, by name, on the CPU in their own dtype."""
    return {
        name: weight.detach().cpu().clone()
        for name, weight in model.named_parameters()
        if not is_added(name) and not torch.equal(weight.detach().cpu(), before[name])
    }


def copied_weights(model: Any) -> dict[str, Tensor]:
    """All weights, copied to the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in model.named_parameters()}


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Weights of that dtype; tables such as the rotary embedding's stay float32, as in a checkpoint opened so."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


@torch.no_grad()
def put_weights(model: Any, weights: dict[str, Tensor]) -> None:
    """Overwrite the named weights in place."""
    own = dict(model.named_parameters())
    for name, weight in weights.items():
        own[name].copy_(weight)


def _with_lora(model: Any, rank: int, seed: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise TrainingError("LoRA needs peft: pip install 'sparsec[train]', or set distill.weights=all") from None
    # alpha = 2 rank: the usual scale, so that the learning rate means the same at every rank.
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", bias="none")
    with warnings.catch_warnings():
        # peft asks Transformers by a name that is on its way out there: nothing that a user could act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(model, config)


def _checkpoint(model: Any) -> None:
    model.train()  # Transformers recomputes in training mode only; there is no dropout in the supported families' plans
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _stop_checkpointing(model: Any) -> None:
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    with suppress(AttributeError):  # some releases make inputs require a gradient when they enable it
        model.disable_input_require_grads()
