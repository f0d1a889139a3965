"""Forecasters and routers of a plan's units (informed routing, arXiv 2510.13831).

A unit is a layer's attention or its MLP. For a token its router sends away, the unit's output is

    forecast:  up(act(down(x))),   down [rank, width], up [width, rank], act SiLU or none; rank 0: zero

of the post-norm state x of the same token, [width]. The router's score is linear in x, and beside
that may have a hidden layer: score = out·x + b + w·relu(inner x + c).
A token runs the unit where score >= the plan's threshold. No noise: the paper's own code samples at evaluation too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec.plan import Plan, Routing, Unit

PLACES: dict[Unit, str] = {"attention": "self_attn", "mlp": "mlp"}  # in the names of tensors
Shapes = dict[str, tuple[int, ...]]


def forecaster_shapes(width: int, rank: int) -> Shapes:
    """Tensors of one forecaster; none where the rank is 0."""
    if not rank:
        return {}
    return {"down.weight": (rank, width), "down.bias": (rank,), "up.weight": (width, rank), "up.bias": (width,)}


def router_shapes(width: int, hidden: int) -> Shapes:
    """Tensors of one router."""
    shapes: Shapes = {"linear.weight": (1, width), "linear.bias": (1,)}
    if hidden:
        shapes |= {"inner.weight": (hidden, width), "inner.bias": (hidden,), "out.weight": (1, hidden)}
    return shapes


def prefix(layer: int, unit: Unit) -> str:
    """Of the names of a unit's tensors in an artifact."""
    return f"model.layers.{layer}.{PLACES[unit]}"


def routing_names(plan: Plan) -> Shapes:
    """Every tensor that a plan's routing needs, with its shape."""
    if plan.routing is None:
        return {}
    routing = plan.routing
    parts = {
        "forecaster": forecaster_shapes(routing.width, routing.rank),
        "router": router_shapes(routing.width, routing.hidden),
    }
    return {
        f"{prefix(layer, unit)}.{part}.{name}": shape
        for layer, unit in routing.units
        for part, shapes in parts.items()
        for name, shape in shapes.items()
    }


def is_added(name: str) -> bool:
    """Does a parameter's name belong to what a plan adds? Such weights never train with the model's own."""
    return any(part in name for part in (".indexer.", ".forecaster.", ".router."))


class Affine(nn.Module):
    """A weight and perhaps a bias, float32. Not ``nn.Linear``: LoRA on all linear layers leaves these alone."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        self.copies: dict[Any, tuple[Tensor, Tensor | None]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        return F.linear(x, *self.cast(x))

    def cast(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The parameters in x's dtype, cast once, and again when they have learnt."""
        if self.weight.requires_grad:
            self.copies.clear()
        if x.dtype == self.weight.dtype or self.weight.requires_grad:
            return self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        key = (x.dtype, x.device)
        if key not in self.copies:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            self.copies[key] = (self.weight.to(x.dtype), bias)
        return self.copies[key]


class Forecaster(nn.Module):
    """Predicts a unit's output from the state that it reads."""

    def __init__(self, tensors: Mapping[str, Tensor], activation: str) -> None:
        super().__init__()
        self.down = Affine(tensors["down.weight"], tensors["down.bias"])
        self.up = Affine(tensors["up.weight"], tensors["up.bias"])
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], in x's dtype."""
        inner = self.down(x)
        found: Tensor = self.up(F.silu(inner) if self.activation == "silu" else inner)
        return found


class Router(nn.Module):
    """Scores the tokens of a unit: the higher, the more is lost if the unit does not run."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.linear = Affine(tensors["linear.weight"], tensors["linear.bias"])
        self.inner = Affine(tensors["inner.weight"], tensors["inner.bias"]) if "inner.weight" in tensors else None
        self.out = Affine(tensors["out.weight"], None) if self.inner is not None else None
        self.copies: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [...], float32 whatever x is: a decision must not hang on a rounded score."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._score(x.float())
        return self._score(x.float())

    def _score(self, x: Tensor) -> Tensor:
        if self.linear.weight.requires_grad:
            self.copies.clear()
            score = self.linear(x)
            if self.inner is not None and self.out is not None:
                score = score + self.out(F.relu(self.inner(x)))
            return score[..., 0]  # type: ignore[no-any-return]
        weight, bias, factors = self.stacked()
        parts = F.linear(x, weight, bias)
        return parts[..., 0] + F.relu(parts[..., 1:]) @ factors if len(factors) else parts[..., 0]

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that reads the state as one product: weight [1 + hidden, width], bias [1 + hidden], factors [hidden].

        Put together once, and again when they have learnt.
        """
        device = self.linear.weight.device
        if device not in self.copies:
            parts = [self.linear] + ([self.inner] if self.inner is not None else [])
            weights: list[Tensor] = [part.weight for part in parts]
            biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
            factors = self.out.weight[0] if self.out is not None else self.linear.weight.new_zeros(0)
            self.copies[device] = (torch.cat(weights), torch.cat(biases), factors.contiguous())
        return self.copies[device]


def parts_of(
    routing: Routing, layer: int, unit: Unit, tensors: Mapping[str, Tensor]
) -> tuple[Forecaster | None, Router]:
    """A unit's forecaster (None where the rank is 0) and router, out of an artifact's tensors."""

    def under(part: str, shapes: Shapes) -> dict[str, Tensor]:
        return {name: tensors[f"{prefix(layer, unit)}.{part}.{name}"] for name in shapes}

    router = Router(under("router", router_shapes(routing.width, routing.hidden)))
    if not routing.rank:
        return None, router
    shapes = forecaster_shapes(routing.width, routing.rank)
    return Forecaster(under("forecaster", shapes), routing.activation), router
