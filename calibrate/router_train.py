"""Stage 2 of informed routing (arXiv 2510.13831): routers, and forecasters with them, learn from the LM loss.

Training computes both branches and mixes them with straight-through Gumbel gates: in the forward pass a token runs a
unit or gets the forecast, the gradient is that of the relaxed gate, whose temperature anneals. With one logit a unit,
the difference of two Gumbel variables is a logistic one. The loss is

    L = LM loss + 8 |target - removed FLOPs| + recover x mean over forecast tokens of |y - ŷ|²/|y|²

The budget is in FLOPs, overheads counted, where the paper counts units; the paper's recoverability term is the cosine
of the residual before and after the unit, ours the error of what stands in for it. Nothing of the backbone changes.
Noise ends with training: the deployed decision is a threshold, calibrated afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec.calibrate.distillation import batch_of, precision
from sparsec.calibrate.forecast_fit import Forecasters, Tensors
from sparsec.calibrate.unit_flops import Key, UnitCosts
from sparsec.calibrate.unit_states import routable, watching
from sparsec.errors import TrainingError
from sparsec.events import Event, Listener
from sparsec.plan import Routing
from sparsec.plugins.routed_units import Forecaster, Router

SHARPNESS = 4.0  # logits a unit of score: scores are logarithms, and untrained ones must outweigh the noise


@dataclass(frozen=True)
class RouterSettings:
    """How a run goes. ``temperature``: of the relaxed gate, first and last."""

    steps: int
    batch: int  # windows a step
    lr: float
    target: float  # share of the units' FLOPs to remove
    threshold: float  # of the untrained scores
    budget_weight: float = 8.0
    recover: float = 0.1
    temperature: tuple[float, float] = (5.0, 1.0)
    forecasters: bool = True  # they learn too
    seed: int = 0


@dataclass
class Trained:
    """What training gave."""

    routers: dict[Key, Tensors]
    forecasters: Forecasters
    losses: list[float]  # LM loss a step, nats a token
    removed: list[float]  # share of the FLOPs, as sampled


@dataclass
class _Mixer:
    """Mixes both branches of every unit in a forward, and remembers what the budget needs."""

    parts: Mapping[Key, tuple[Forecaster | None, Router]]
    free: Tensor
    temperature: float
    threshold: float
    rng: torch.Generator
    gates: dict[Key, Tensor] = field(default_factory=dict)
    missed: list[Tensor] = field(default_factory=list)

    def __call__(self, key: Key, x: Tensor, y: Tensor) -> Tensor:
        forecaster, router = self.parts[key]
        logit = SHARPNESS * (router(x) - self.threshold)
        u = torch.rand(logit.shape, generator=self.rng).to(logit.device).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((logit + u.log() - (1 - u).log()) / self.temperature)
        gate = (soft > 0.5).float() + soft - soft.detach()
        gate = torch.where(self.free, gate, torch.ones_like(gate))
        stand_in = forecaster(x).to(y.dtype) if forecaster is not None else torch.zeros_like(y)
        error = (y - stand_in).detach().float().square().sum(-1) / y.detach().float().square().sum(-1).clamp_min(1e-9)
        self.missed.append(((1 - gate) * error.clamp_max(4)).sum() / (1 - gate).detach().sum().clamp_min(1))
        self.gates[key] = gate
        wide = gate[..., None].to(y.dtype)
        return wide * y + (1 - wide) * stand_in

    def removed(self, costs: UnitCosts) -> Tensor:
        """Share of the units' FLOPs, differentiable."""
        total = next(iter(self.gates.values())).new_zeros(())
        for key, gate in self.gates.items():
            saved = costs.removable[key][: gate.shape[1]].to(gate) - costs.forecaster
            total = total + ((1 - gate) * saved).sum() / gate.shape[0] - gate.shape[1] * costs.router
            length = gate.shape[1]
        return total / float(costs.total[:length].sum())


def train_routers(
    model: Any,
    routing: Routing,
    routers: Mapping[Key, Tensors],
    forecasters: Forecasters,
    windows: Tensor,
    costs: UnitCosts,
    settings: RouterSettings,
    listen: Listener,
) -> Trained:
    """Train on [count, length] windows under whatever plan without routing is installed.

    Raises:
        TrainingError: out of memory, with what to lower.
    """
    device = model.device
    parts = {
        key: (
            Forecaster(forecasters[key], routing.activation).to(device) if forecasters[key] else None,
            Router(router).to(device),
        )
        for key, router in routers.items()
    }
    routers_of = [weight for _, router in parts.values() for weight in router.parameters()]
    others = [w for forecaster, _ in parts.values() if forecaster is not None for w in forecaster.parameters()]
    trained = routers_of + (others if settings.forecasters else [])
    for weight in trained:
        weight.requires_grad_()
    # A rate for every forecaster weight by its size: theirs span orders of magnitude between units.
    groups = [{"params": routers_of, "lr": settings.lr}]
    if settings.forecasters:
        groups += [{"params": [w], "lr": settings.lr * float(w.detach().abs().mean().clamp_min(1e-4))} for w in others]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    rng, losses, shares = torch.Generator().manual_seed(settings.seed), [], []
    first, last = settings.temperature
    try:
        for step in range(settings.steps):
            chosen = batch_of(step, settings.batch, len(windows), settings.seed)
            ids = windows[chosen].to(device)
            temperature = first + (last - first) * step / max(1, settings.steps - 1)
            free = routable(ids, routing.sinks, routing.special)
            mixer = _Mixer(parts, free, temperature, settings.threshold, rng)
            with torch.enable_grad(), watching(model, list(parts), mixer), precision(device)():
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            removed = mixer.removed(costs)
            whole = loss + settings.budget_weight * (settings.target - removed).abs()
            whole = whole + settings.recover * torch.stack(mixer.missed).mean()
            optimizer.zero_grad()
            whole.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            shares.append(float(removed.detach()))
            listen(Event("routers", step + 1, settings.steps))
    except torch.OutOfMemoryError:
        raise TrainingError(
            "router training ran out of memory: lower informed-routing.batch or informed-routing.train_context"
        ) from None
    return Trained(
        {key: _plain(router) for key, (_, router) in parts.items()},
        {key: _plain(forecaster) if forecaster is not None else {} for key, (forecaster, _) in parts.items()},
        losses,
        shares,
    )


def _plain(module: nn.Module) -> Tensors:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
