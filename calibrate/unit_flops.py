"""What units cost, and what routing really saves: multiply-adds a token, forecasters and routers counted.

    attention, always      k_proj, v_proj
    attention, if it runs  q_proj, o_proj, and 2 x head_dim for every key that a query head sees at the token's place
    MLP, if it runs        its weights
    router                 its weights, for every token of a routed unit
    forecaster             its weights, for every token that is sent away

The total that shares refer to is that of all units of all layers of the dense model, by prefill: embedding, norms and
the output layer are no units. Local heads of a plan see their window and sinks, in the total too: what windows save
is not counted as saved by routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.plan import UNITS, Plan, Unit
from sparsec.plugins.families import unit_modules
from sparsec.plugins.routed_units import forecaster_shapes, router_shapes

Key = tuple[int, Unit]


@dataclass(frozen=True)
class UnitCosts:
    """Multiply-adds by unit and place in the sequence.

    ``removable`` [length] float64 a unit: what a token at that place saves before overheads; ``total`` [length]: what
    all units cost; ``router`` and ``forecaster``: of one unit, a token.
    """

    removable: Mapping[Key, Tensor]
    total: Tensor
    router: int
    forecaster: int

    def removed(self, away: Mapping[Key, Tensor]) -> float:
        """Share of all units' FLOPs removed, overheads paid; away: bool [batch, length] of every routed unit."""
        batch = next(iter(away.values())).shape[0]
        saved = 0.0
        for key, gone in away.items():
            length = gone.shape[1]
            saved += float((gone.sum(0).double().cpu() * (self.removable[key][:length] - self.forecaster)).sum())
            saved -= gone.numel() * self.router
        return saved / (batch * float(self.total[:length].sum()))

    @property
    def most(self) -> float:
        """Share that would be removed if every routed unit were forecast for every token."""
        saved = sum(float((cost - self.forecaster - self.router).sum()) for cost in self.removable.values())
        return saved / float(self.total.sum())


def unit_costs(
    model: Any, plan: Plan, length: int, *, rank: int, hidden: int, routed: Mapping[Unit, tuple[int, ...]]
) -> UnitCosts:
    """The costs of a model's units in sequences of ``length`` tokens under the plan's windows.

    Args:
        rank: of forecasters; 0: none.
        hidden: units of the routers' hidden layer.
        routed: layers by unit.
    """
    shape, width = plan.model, int(model.config.get_text_config().hidden_size)
    removable: dict[Key, Tensor] = {}
    total = torch.zeros(length, dtype=torch.float64)
    for unit in UNITS:
        for layer, module in enumerate(unit_modules(model, unit)):
            if unit == "attention":
                cost = 2 * width * shape.heads * shape.head_dim + _core(plan, layer, length)
                always = 2 * width * shape.kv_heads * shape.head_dim
            else:
                own = sum(weight.numel() for name, weight in module.named_parameters() if weight.dim() == 2)
                cost, always = torch.full((length,), float(own), dtype=torch.float64), 0
            total += cost + always
            if layer in routed[unit]:
                removable[layer, unit] = cost
    fake = _Sizes(rank, hidden, width)
    return UnitCosts(removable, total, fake.router, fake.forecaster)


@dataclass(frozen=True)
class _Sizes:
    """Weights of the parts, by the shapes that the runtime asks for."""

    rank: int
    hidden: int
    width: int

    @property
    def router(self) -> int:
        return _matrices(router_shapes(self.width, self.hidden))

    @property
    def forecaster(self) -> int:
        return _matrices(forecaster_shapes(self.width, self.rank))


def _matrices(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(shape[0] * shape[1] for shape in shapes.values() if len(shape) == 2)


def _core(plan: Plan, layer: int, length: int) -> Tensor:
    """Attention itself, all heads: [length] float64."""
    seen = torch.arange(1, length + 1, dtype=torch.float64)
    heads = plan.layers[layer].heads
    local = len(plan.layers[layer].local) if heads is not None else 0
    cost = (plan.model.heads - local) * seen
    if local and plan.window is not None:
        near = seen.clamp_max(plan.window.size + plan.window.sinks)
        cost = cost + local * torch.where(seen <= plan.min_context, seen, near)
    return 2 * plan.model.head_dim * cost
