"""Routers without training: what a forecast would cost the model, predicted from the token's own state.

The damage of forecasting token t in unit u is taken as s_u e, with e = |y - ŷ|² and s_u the loss that a squared error
of one causes there. s_u comes from the model's Fisher information: with g the gradient of the log-likelihood of sampled
tokens by the unit's output, E[(g·(y - ŷ))²]/2 is the KL divergence that the error causes, to second order; s_u is that
over the mean of e. log e is regressed on x (ridge), and the score is the predicted log damage per multiply-add saved,

    score(x) = w_u·x + b_u + log s_u - log(saved by u)

so one threshold for all units spends the budget where a FLOP costs the least. The paper trains its routers from
nothing; here this is the training-free tier and where training starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.forecast_fit import Forecasters, Tensors, predicted
from sparsec.calibrate.unit_flops import Key, UnitCosts
from sparsec.calibrate.unit_states import States, routable, watching
from sparsec.errors import UsageError
from sparsec.events import Listener, tracked
from sparsec.plan import Plan
from sparsec.plugins.families import unit_modules
from sparsec.plugins.runtime import applied

LEAST = 1e-12
ROUNDS = 4  # thresholds and the states that they make are brought to agree


def sensitivity(
    model: Any,
    windows: Tensor,
    forecasters: Forecasters,
    activation: str,
    *,
    sinks: int,
    special: Sequence[int],
    seed: int,
    listen: Listener,
) -> dict[Key, float]:
    """KL in nats that a squared error of one causes in each unit: half the Fisher information along the error."""
    rng = torch.Generator().manual_seed(seed)
    damage, error = dict.fromkeys(forecasters, 0.0), dict.fromkeys(forecasters, 0.0)
    for window in tracked(windows, "sensitivity of units", listen, len(windows)):
        ids = window[None].to(model.device)
        free = routable(ids, sinks, special)[0]
        taken: dict[Key, tuple[Tensor, Tensor]] = {}

        def see(key: Key, x: Tensor, y: Tensor, taken: dict[Key, tuple[Tensor, Tensor]] = taken) -> Tensor:
            moved = torch.zeros_like(y, requires_grad=True)
            taken[key] = (moved, (y - predicted(forecasters[key], activation, x)).detach())
            return y + moved

        with torch.enable_grad(), watching(model, list(forecasters), see):
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=rng)
            logp = logits.log_softmax(-1).gather(-1, drawn.to(logits.device)).sum()
            gradients = torch.autograd.grad(logp, [moved for moved, _ in taken.values()])
        for (key, (_, missed)), gradient in zip(taken.items(), gradients, strict=True):
            along = (gradient.float() * missed.float()).sum(-1)[0, free]
            damage[key] += 0.5 * float(along.square().sum())
            error[key] += float(missed.float().square().sum(-1)[0, free].sum())
    return {key: damage[key] / max(error[key], LEAST) for key in forecasters}


@torch.no_grad()
def closed_form_routers(
    states: States,
    forecasters: Forecasters,
    activation: str,
    sensitive: Mapping[Key, float],
    costs: UnitCosts,
    ridge: float,
) -> dict[Key, Tensors]:
    """The linear part of every router, and how well it ranks tokens."""
    found: dict[Key, Tensors] = {}
    for key, parts in forecasters.items():
        x, y = states.x[key].float(), states.y[key].float()
        target = (y - predicted(parts, activation, x)).square().sum(-1).clamp_min(LEAST).log().double()
        mean, middle = x.double().mean(0), target.mean()
        centred = x.double() - mean
        second = centred.T @ centred / len(x)
        second += torch.eye(len(second), dtype=second.dtype) * (ridge * second.diagonal().mean() + 1e-12)
        weight = torch.linalg.solve(second, centred.T @ (target - middle) / len(x))
        saved = float(costs.removable[key].mean()) - costs.forecaster
        bias = middle - weight @ mean + math.log(max(sensitive[key], LEAST)) - math.log(max(saved, 1.0))
        found[key] = {"linear.weight": weight[None].float(), "linear.bias": bias[None].float()}
    return found


def with_hidden(router: Tensors, hidden: int, rng: torch.Generator) -> Tensors:
    """The same scores with a hidden layer beside the linear part, which training may use."""
    if not hidden:
        return dict(router)
    width = router["linear.weight"].shape[1]
    inner = torch.randn(hidden, width, generator=rng) * (2 / width) ** 0.5
    return {**router, "inner.weight": inner, "inner.bias": torch.zeros(hidden), "out.weight": torch.zeros(1, hidden)}


@contextmanager
def scoring(model: Any, units: Sequence[Key]) -> Iterator[dict[Key, Tensor]]:
    """Inside the block, the scores that the last call of a routed model gave: [batch, rows] by unit."""
    found: dict[Key, Tensor] = {}
    with ExitStack() as stack:
        for layer, unit in units:
            router: Any = unit_modules(model, unit)[layer].router

            def hook(module: Any, args: Any, output: Tensor, key: Key = (layer, unit)) -> None:
                found[key] = output.detach()

            stack.callback(router.register_forward_hook(hook).remove)
        yield found


@torch.no_grad()
def calibrated(
    model: Any,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    windows: Tensor,
    costs: UnitCosts,
    target: float,
    listen: Listener,
) -> tuple[Plan, list[float]]:
    """The plan with the threshold at which the share ``target`` of the units' FLOPs is removed, and each round's share.

    A threshold changes the states, and so the scores: the plan is run with it, and the next one is taken from what
    its routers said.

    Raises:
        UsageError: so much cannot be removed.
    """
    routing = plan.routing
    assert routing is not None
    if target >= costs.most:
        raise UsageError(
            f"informed-routing.remove={target:g} cannot be met: with every token sent away {costs.most:.1%} of the "
            "units' FLOPs are removed, forecasters and routers paid; lower remove or rank"
        )
    units, shares = routing.units, []
    low = -1e30
    for number in tracked(range(ROUNDS), "threshold", listen, ROUNDS):
        trial = plan.edit(routing={**routing.model_dump(), "threshold": low})
        with applied(model, trial, tensors):
            parts: dict[Key, list[Tensor]] = {key: [] for key in units}
            for window in windows:
                with scoring(model, units) as scores:
                    model.get_decoder()(input_ids=window[None].to(model.device), use_cache=False)
                for key in units:
                    parts[key].append(scores[key].cpu())
        scores = {key: torch.cat(found) for key, found in parts.items()}
        free = routable(windows, routing.sinks, routing.special)
        if number:
            shares.append(costs.removed({key: (s < low) & free for key, s in scores.items()}))
        plan, low = trial, threshold_for(scores, free, costs, target)
    return plan.edit(routing={**routing.model_dump(), "threshold": low}), shares


def threshold_for(scores: Mapping[Key, Tensor], free: Tensor, costs: UnitCosts, target: float) -> float:
    """The threshold at which these scores remove the share ``target``; scores: [windows, length] by unit."""
    every = torch.cat([s[free] for s in scores.values()]).double()
    low, high = float(every.min()) - 1, float(every.max()) + 1
    for _ in range(50):
        middle = (low + high) / 2
        removed = costs.removed({key: (s < middle) & free for key, s in scores.items()})
        low, high = (middle, high) if removed < target else (low, middle)
    return high
