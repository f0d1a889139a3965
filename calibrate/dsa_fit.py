"""Trains a model's own indexers (DSA) for all layers that read their index sets: IndexCache's multi-layer distillation.

IndexCache (arXiv 2603.12201, training-aware variant): a full layer l that serves l .. l+m minimises

    L_multi = sum_j 1/(m+1) sum_t KL(p_j[t] || q[t]),    q[t] = softmax over s <= t of I[t, s]

and DSA's own dense warm-up (DeepSeek-V3.2-Exp report) is the case m = 0: p is the main attention summed over heads,
divided by its sum. The model runs under the plan while attention is read, so every layer sees the hidden states that it
will see in use. Only indexers are trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.shared_fit import readers
from sparsec.events import Event, Listener, tracked
from sparsec.plan import Plan
from sparsec.plugins.dsa import PARTS, index_keys, index_queries
from sparsec.plugins.dsa_choice import flat
from sparsec.plugins.families import attention_modules, family_of
from sparsec.plugins.runtime import applied, stepping
from sparsec.plugins.step import Selection, Step

STAGE = "train shared indexers"
BATCH = 64  # rows a step

Weights = dict[int, dict[str, Tensor]]  # by full layer, by part


@dataclass
class Window:
    """What one window showed: by full layer what its indexer reads, by layer the attention of sampled rows."""

    rows: Tensor  # int64, ascending
    hidden: dict[int, Tensor] = field(default_factory=dict)  # [tokens, hidden]
    q_latent: dict[int, Tensor] = field(default_factory=dict)  # [rows, q_lora_rank]
    rope: tuple[Tensor, Tensor] | None = None  # cos, sin: [tokens, rotary dim]
    target: dict[int, Tensor] = field(default_factory=dict)  # [rows, tokens] float16, each row sums to 1


@torch.no_grad()
def capture(model: Any, plan: Plan, tokens: Tensor, rows: Tensor) -> Window:
    """Run one window under ``plan``.

    Args:
        tokens: int64 [length]; rows: the query rows to keep, ascending.
    """
    window, modules, hooks = Window(rows), attention_modules(model), []

    def note(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            hidden, latent, rope = args[:3]
            window.hidden[layer] = hidden[0]
            window.q_latent[layer] = latent[0, rows.to(latent.device)]
            window.rope = (rope[0][0], rope[1][0])

        return hook

    with applied(model, plan), stepping(Step(decode=True, observe=lambda seen: _targets(seen, window))):
        for layer in readers(plan):
            hooks.append(modules[layer].indexer.register_forward_pre_hook(note(layer)))  # type: ignore[union-attr]
        try:
            model.get_decoder()(input_ids=tokens[None].to(model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    return window


def _targets(seen: Selection, window: Window) -> None:
    """Main attention over all causal tokens, summed over heads, of the rows that this tile has."""
    first, last = int(seen.q_pos[0, 0]), int(seen.q_pos[0, -1])
    places = (window.rows >= first) & (window.rows <= last)
    at = (window.rows[places] - first).to(seen.q.device)
    weights = seen.weights(at)[0].mean(0)
    length = int(window.rows[-1]) + 1
    kept = window.target.setdefault(seen.layer, torch.zeros(len(window.rows), length, dtype=torch.float16))
    kept[places, : weights.shape[-1]] = weights[:, :length].half().cpu()


def loss(
    window: Window, weights: Mapping[str, Tensor], layers: Sequence[int], part: Tensor, interleaved: bool
) -> Tensor:
    """L_multi of some rows of a window, the mean over rows, in nats.

    Args:
        weights: the full layer's indexer; layers: those it serves, itself first.
        part: which of the window's rows, indices into them.
    """
    device, full = weights["wk.weight"].device, layers[0]
    assert window.rope is not None
    length = window.target[full].shape[1]
    at = window.rows[part].to(device)
    cos, sin = (table[None].to(device) for table in window.rope)
    hidden = window.hidden[full][None].to(device)
    latent = window.q_latent[full][None, part].to(device)
    q, w = index_queries(weights, hidden[:, at], latent, (cos[:, at], sin[:, at]), interleaved)
    k = index_keys(weights, hidden[:, :length], (cos[:, :length], sin[:, :length]), interleaved)
    visible = (torch.arange(length, device=device) <= at[:, None])[None]
    logq = flat(q, k, w, visible).log_softmax(-1)[0].masked_fill(~visible[0], 0.0)
    total = logq.new_zeros(())
    for layer in layers:
        p = window.target[layer][part].to(device).float()
        total = total + (torch.special.xlogy(p, p) - p * logq).sum(-1).mean()
    return total / len(layers)


@torch.no_grad()
def mean_loss(windows: Sequence[Window], weights: Weights, plan: Plan, interleaved: bool) -> float:
    """L_multi over all rows, mean over full layers."""
    total, served = 0.0, readers(plan)
    for window in windows:
        for full, layers in served.items():
            every = torch.arange(len(window.rows))
            found = [loss(window, weights[full], layers, part, interleaved) for part in torch.split(every, BATCH)]
            total += float(torch.stack(found).mean())
    return total / max(1, len(windows) * len(served))


def own_weights(model: Any, plan: Plan) -> Weights:
    """The indexers of full layers, copies in float32."""
    modules = attention_modules(model)
    found: Weights = {}
    for layer in readers(plan):
        named = dict(modules[layer].indexer.named_parameters())  # type: ignore[union-attr]
        found[layer] = {part: named[part].detach().float().clone() for part in PARTS}
    return found


def train_dsa(
    model: Any,
    plan: Plan,
    windows: Sequence[Tensor],
    held: Sequence[Tensor],
    *,
    rows: int,
    steps: int,
    lr: float,
    seed: int,
    listen: Listener,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Indexers of full layers, trained for all layers they serve.

    Args:
        plan: the pattern.
        windows: token ids to train on, [length] each; held: to choose by.
        rows: query rows sampled from each.

    Returns:
        Trained weights by their name in the checkpoint, none where training improved nothing; and what was measured.
    """
    generator = torch.Generator().manual_seed(seed)
    interleaved = family_of(model.config).dsa == "interleaved"
    texts = [*windows, *held]
    seen = []
    for tokens in tracked(texts, "capture for shared indexers", listen, len(texts)):
        sampled = torch.randperm(len(tokens), generator=generator)[:rows].sort().values
        seen.append(capture(model, plan, tokens, sampled))
    train, other = seen[: len(windows)], seen[len(windows) :]
    before = own_weights(model, plan)
    weights = {layer: {part: x.clone().requires_grad_() for part, x in own.items()} for layer, own in before.items()}
    optimizer = torch.optim.Adam([x for own in weights.values() for x in own.values()], lr=lr)
    served, losses = readers(plan), []
    listen(Event(STAGE, 0, steps))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / max(1, steps // 20))
        window = train[int(torch.randint(len(train), (), generator=generator))]
        part = torch.randperm(len(window.rows), generator=generator)[:BATCH].sort().values
        total = torch.stack([loss(window, weights[full], layers, part, interleaved) for full, layers in served.items()])
        optimizer.zero_grad()
        total.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(total.detach().mean()))
        listen(Event(STAGE, step + 1, steps))
    measured: dict[str, Any] = {
        "kl_before": mean_loss(other, before, plan, interleaved),
        "kl_trained": mean_loss(other, weights, plan, interleaved),
        "losses": [round(value, 5) for value in losses],
        "own": True,
        "windows": len(windows),
        "rows": rows,
        "serves": {str(full): [layer for layer in layers if layer != full] for full, layers in served.items()},
    }
    if not measured["kl_trained"] < measured["kl_before"]:
        listen(Event(STAGE, note="training improved nothing: the indexers stay as they were"))
        return {}, measured
    trained = {
        f"model.layers.{layer}.self_attn.indexer.{part}": x.detach().cpu()
        for layer, own in weights.items()
        for part, x in own.items()
    }
    return trained, measured
