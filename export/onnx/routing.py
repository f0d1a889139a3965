"""Routed units as they are traced: the unit and its forecast are both computed, and a choice by row takes one.

That means what the plan means and saves nothing: a graph has no other path that would not need rows to be gathered and
put back. Keys and values are written for every token, as the plan has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsec.plugins.families import unit_modules

MASKED = "masked: both branches of every routed unit are computed, no time is saved"


@contextmanager
def routed(model: Any) -> Iterator[None]:
    """Inside the block the routed units of a model that runs a plan are traced so."""
    routing, own = model.sparsec_plan.routing, []
    for layer, unit in routing.units if routing is not None else ():
        module = unit_modules(model, unit)[layer]
        own.append((module, module.forward))
        object.__setattr__(module, "forward", partial(_routed_attention if unit == "attention" else _masked, module))
    try:
        yield
    finally:
        for module, forward in own:
            object.__setattr__(module, "forward", forward)
            _forget_casts(module)


def keep(model: Any, ids: Tensor, positions: Tensor) -> None:
    """Tell the units which tokens run everything; ids, positions: int64 [batch, rows]."""
    routing = model.sparsec_plan.routing
    if routing is None:
        return
    kept = positions < routing.sinks
    for token in routing.special:  # a handful
        kept = kept | (ids == token)
    for layer, unit in routing.units:
        unit_modules(model, unit)[layer].sparsec_kept = kept


def _routed_attention(module: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    return _masked(module, hidden_states, **kwargs), None


def _masked(module: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """The unit's output where its router lets a token pass, else the forecast; x: [batch, rows, width]."""
    rt = module.sparsec_route
    whole = rt.whole(x, **kwargs)
    out: Tensor = whole[0] if isinstance(whole, tuple) else whole
    run = (rt.router(x) >= rt.threshold) | module.sparsec_kept
    forecast = torch.zeros_like(out) if rt.forecaster is None else rt.forecaster(x).to(out.dtype)
    return torch.where(run[..., None], out, forecast)


def _forget_casts(module: Any) -> None:
    """What was cast while tracing is no tensor that could be computed with."""
    rt = module.sparsec_route
    for part in (rt.router, rt.forecaster):
        for affine in part.children() if part is not None else ():
            affine.copies.clear()
    object.__delattr__(module, "sparsec_kept")
