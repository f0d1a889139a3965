"""Heads chosen by training: gates that mix each head's full attention with its windowed one, under a budget.

DuoAttention (arXiv 2410.10819) trains one gate a KV head, ``gate · full + (1 - gate) · windowed``, weights frozen, on
the final hidden states of answers to passkeys, with an L1 penalty, and keeps a quantile of the gates. Here the gates
add up to the number of heads that will be kept, and a falling temperature drives them to 0 and 1, so that what is
trained in the end is what will run. The loss is the KL of next-token distributions against the dense model, on natural
text and on the decode rows of windows that end with questions about hidden facts alike: heads that copy show in the
one, heads that carry a topic in the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from sparsec.calibrate.distillation import precision
from sparsec.calibrate.questions import Windows
from sparsec.calibrate.teacher import ROWS, Head, divergence
from sparsec.calibrate.trainable import recomputing
from sparsec.errors import TrainingError
from sparsec.events import Event, Listener
from sparsec.plan import Plan
from sparsec.plugins.attention import check_call, native
from sparsec.plugins.families import attention_modules
from sparsec.plugins.masked import dense, windowed
from sparsec.plugins.runtime import plain_mask
from sparsec.plugins.step import token_numbers

NAME = "sparsec_gates"
RATE = 0.05  # Adam's, on gates before their sigmoid
HOT, COLD = 1.0, 0.05  # temperatures of the first and the last step
TEXT_ROWS = 1024  # of a natural window, drawn anew for every step


@dataclass(frozen=True)
class Gates:
    """What a run gave."""

    scores: Tensor  # float32 [layers, units] on the CPU; -inf where a layer was not to be split
    text: list[float]  # KL a step on natural text, nats a row
    questions: list[float]  # and on the decode rows of windows with questions


@dataclass
class _Mixing:
    """What the layers of one forward call do."""

    plan: Plan  # every head local
    values: Tensor | None  # [layers, units]; None: the dense model
    masks: dict[Any, Tensor] = field(default_factory=dict)  # that layers share


def gated_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface for whole windows without padding; shapes as in ``sparsec_attention``."""
    mixing: _Mixing = module.sparsec_mixing
    layer = int(module.layer_idx)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what was rotated in float32
    if mixing.plan.layers[layer].heads is None:
        return native(query, key, value, attention_mask, scale), None
    check_call(attention_mask, dropout, kwargs)
    pos = token_numbers(None, key.shape[0], key.shape[2], query.device)
    full = dense(query, key, value, pos, pos, scale, False)
    if mixing.values is None:
        return full.transpose(1, 2), None
    heads = torch.arange(query.shape[1], device=query.device) // (query.shape[1] // key.shape[1])
    near = windowed(query, key, value, heads, pos, pos, mixing.plan, scale, False, mixing.masks)
    gate = mixing.values[layer].to(full)
    gate = gate.repeat_interleave(query.shape[1] // len(gate))[None, :, None, None]
    return (near + gate * (full - near)).transpose(1, 2), None


AttentionInterface.register(NAME, gated_attention)
AttentionMaskInterface.register(NAME, plain_mask)


def learn_gates(
    model: Any,
    windows: Windows,
    local: Plan,
    *,
    count: int,
    unit: int,
    rows: int,
    seed: int,
    listen: Listener,
) -> Gates:
    """One step a pair of windows, a natural one and one with questions.

    Args:
        model: no plan installed; its weights are not changed.
        local: the plan with every head local, its window and ``min_context``; layers without heads stay as they are.
        count: units that will be kept.
        unit: heads that one gate decides for: 1, or a GQA group.
        rows: the last so many tokens of a window are decode rows.

    Raises:
        TrainingError: out of memory, with what to lower; or a loss that is not finite.
    """
    shape, device = local.model, model.device
    split = [i for i, layer in enumerate(local.layers) if layer.heads is not None]
    raw = torch.zeros(len(split), shape.heads // unit, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=RATE, betas=(0.9, 0.95))
    asked, length = windows.asked, windows.tokens.shape[1]
    text, questions = (windows.tokens[asked == kind] for kind in (False, True))
    steps = min(len(text), len(questions))
    generator = torch.Generator().manual_seed(seed)
    gates = Gates(torch.full((shape.layers, raw.shape[1]), -math.inf), [], [])
    last = torch.arange(max(0, length - rows), length)
    try:
        with _gated(model), recomputing(model):
            for step in range(steps):
                temperature = HOT * (COLD / HOT) ** (step / max(1, steps - 1))
                values = budgeted(raw, count, temperature)
                leaf = torch.zeros(shape.layers, raw.shape[1], device=device)
                leaf[split] = values.detach()
                mixing = _Mixing(local, leaf.requires_grad_())
                drawn = torch.randperm(length, generator=generator)[:TEXT_ROWS]
                gates.text.append(_backward(model, text[step], drawn, mixing))
                gates.questions.append(_backward(model, questions[step], last, mixing))
                if not math.isfinite(gates.text[-1] + gates.questions[-1]):
                    raise TrainingError("choosing heads gave a loss that is not finite: use rtpurbo.choose=needles")
                optimizer.zero_grad(set_to_none=True)
                assert leaf.grad is not None
                values.backward(leaf.grad[split])  # type: ignore[no-untyped-call]
                optimizer.step()
                listen(Event("choose heads", step + 1, steps))
    except torch.OutOfMemoryError:
        raise TrainingError(
            "choosing heads ran out of memory: lower rtpurbo.gate_context, or use rtpurbo.choose=needles"
        ) from None
    gates.scores[split] = raw.detach().cpu()
    return gates


def budgeted(raw: Tensor, count: int, temperature: float) -> Tensor:
    """Gates ``sigmoid((raw + b) / temperature)`` with the one b that makes them add up to ``count``."""
    low, high = (float(x) for x in (-raw.detach().max() - 50 * temperature, -raw.detach().min() + 50 * temperature))
    for _ in range(60):
        middle = (low + high) / 2
        few = float(torch.sigmoid((raw.detach() + middle) / temperature).sum()) < count
        low, high = (middle, high) if few else (low, middle)
    # One Newton step on top: its derivative is that of b, which falls where any gate rises.
    gates = torch.sigmoid((raw + low) / temperature)
    slope = (gates * (1 - gates)).sum().detach().clamp_min(1e-3) / temperature
    return torch.sigmoid((raw + low - (gates.sum() - count) / slope) / temperature)


def _backward(model: Any, window: Tensor, rows: Tensor, mixing: _Mixing) -> float:
    """The KL of these rows against the dense model, in nats a row; its gradient is added to the gates'."""
    head, window, rows = Head(model), window[None].to(model.device), rows.to(model.device)
    with precision(window.device)():
        with torch.no_grad():
            true = _hidden(model, window, rows, _Mixing(mixing.plan, None))
        hidden = _hidden(model, window, rows, mixing)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            total = total + checkpoint(_kl, head, hidden[part], true[part], use_reentrant=False)
        loss = total / len(rows)
    if bool(torch.isfinite(loss)):
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _hidden(model: Any, window: Tensor, rows: Tensor, mixing: _Mixing) -> Tensor:
    for module in attention_modules(model):  # and not for the call alone: a backward pass may run it again
        object.__setattr__(module, "sparsec_mixing", mixing)
    found: Tensor = model.get_decoder()(input_ids=window, use_cache=False).last_hidden_state[0]
    return found[rows.to(found.device)]


def _kl(head: Head, hidden: Tensor, true: Tensor) -> Tensor:
    return divergence(head(true), head(hidden)).sum()


@contextmanager
def _gated(model: Any) -> Iterator[None]:
    """Weights frozen, attention by the gates."""
    before = model.config._attn_implementation
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for module in attention_modules(model):
            module.__dict__.pop("sparsec_mixing", None)
        for weight in trained:
            weight.requires_grad_(True)
