"""Runs a plan's routing: tokens that a unit's router sends away do not pass through the unit.

The forwards of routed attention and MLP modules are replaced by gather, compute, scatter over the tokens that run.
K and V, and index keys, are written for every token, else later ones would attend to holes; q_proj, attention and
o_proj run for those that run. A router reads the token's own state and nothing else, so neighbours and padding in a
batch change no path. Where all tokens of a call agree (in decode: the batch), the unit runs whole, or its weights are
not read at all. Norms stay outside: where a family has one behind a unit (gemma3), it is applied to forecasts too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec.errors import PlanError
from sparsec.plan import Plan, Routing, Unit
from sparsec.plugins.attention import sparsec_attention
from sparsec.plugins.families import family_of, unit_modules
from sparsec.plugins.routed_paths import Paths
from sparsec.plugins.routed_units import Forecaster, Router, parts_of, prefix
from sparsec.plugins.selector import rotate
from sparsec.plugins.step import Step, token_numbers


@dataclass
class UnitRuntime:
    """One routed unit, worked out once."""

    module: nn.Module
    layer: int
    unit: Unit
    forecaster: Forecaster | None
    router: Router
    threshold: float
    whole: Any  # the module's own forward
    fused: bool  # q, k and v come out of one projection
    step: Step | None = None
    kernels: bool = False  # Triton's decide, gather, forecast and scatter

    def runs(self, x: Tensor) -> Tensor:
        """bool [batch, rows]: which tokens run the unit; x: [batch, rows, width], its input."""
        step = self.step
        run: Tensor = self.router(x) >= self.threshold
        if step is not None and step.keep is not None:
            run = run | step.keep.to(run.device)
        if step is not None and step.real is not None:
            run = run & step.real.to(run.device)
        if step is not None and step.observe_paths is not None:
            step.observe_paths(self.layer, self.unit, run)
        return run

    def learns(self) -> bool:
        """Does a weight of the unit want a gradient?"""
        return any(weight.requires_grad for weight in self.module.parameters())

    def decide(self, x: Tensor) -> Paths:
        """Who of [batch, rows] runs the unit; x: [batch, rows, width]."""
        learns = torch.is_grad_enabled() and (x.requires_grad or self.learns())
        if not self.kernels or learns:
            return Paths(self.runs(x), self.forecaster)
        from sparsec.plugins.kernels.paths import ListedPaths

        found: Paths = ListedPaths(self, x)
        return found


def check_routing(model: nn.Module, plan: Plan) -> None:
    """The plan's routing fits the model.

    Raises:
        PlanError: it is for other hidden states.
        SourceError: the family's units cannot be routed.
    """
    if plan.routing is None:
        return
    unit_modules(model, "attention")
    width = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    if plan.routing.width != width:
        raise PlanError(
            f"the plan routes hidden states of {plan.routing.width}, the model's have {width}: use the checkpoint it "
            "was compiled from"
        )


def install_routing(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> list[UnitRuntime]:
    """Forecasters and routers as submodules of their units, whose forwards are replaced."""
    found: list[UnitRuntime] = []
    if plan.routing is None:
        return found
    fused = family_of(model.config).qkv == "fused"
    for layer, unit in plan.routing.units:
        module = unit_modules(model, unit)[layer]
        device = next(module.parameters()).device
        forecaster, router = parts_of(plan.routing, layer, unit, tensors)
        if forecaster is not None:
            module.forecaster = forecaster.to(device)
        module.router = router.to(device)
        place = _forward_of(module)
        whole = getattr(module, place)
        runtime = UnitRuntime(module, layer, unit, forecaster, router, plan.routing.threshold, whole, fused)
        object.__setattr__(module, "sparsec_route", runtime)
        routed = routed_attention if unit == "attention" else routed_mlp
        object.__setattr__(module, place, partial(routed, module))
        found.append(runtime)
    return found


def uninstall_routing(model: nn.Module, plan: Plan) -> None:
    """The units' own forwards again."""
    for layer, unit in plan.routing.units if plan.routing is not None else ():
        module = unit_modules(model, unit)[layer]
        place, whole = _forward_of(module), module.sparsec_route.whole  # type: ignore[union-attr]
        object.__delattr__(module, place)
        if place != "forward":
            object.__setattr__(module, place, whole)
        del module.sparsec_route, module.router
        if hasattr(module, "forecaster"):
            del module.forecaster


def routing_tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The tensors of a routed model's forecasters and routers, by their names in the artifact."""
    return {
        f"{prefix(layer, unit)}.{part}.{name}": tensor
        for layer, unit in (plan.routing.units if plan.routing is not None else ())
        for part in ("forecaster", "router")
        if (owner := getattr(unit_modules(model, unit)[layer], part, None)) is not None
        for name, tensor in owner.state_dict().items()
    }


def note_tokens(step: Step, routing: Routing, ids: Tensor | None, mask: Any, shape: tuple[int, int], past: int) -> None:
    """Before a call: which of its tokens run everything, and which are padding.

    Args:
        ids: [batch, rows], or None where the model was given embeddings.
        mask: Transformers' attention_mask; [batch, past + rows] where it is 2-D.
        shape: batch, rows.

    Raises:
        ValueError: special tokens are to be seen, and there are no ids.
    """
    batch, rows = shape
    if ids is None and routing.special:
        raise ValueError("routing must see which tokens are special: pass input_ids, not inputs_embeds")
    flat = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    device = ids.device if ids is not None else torch.device("cpu")
    pos = token_numbers(flat, batch, past + rows, device)[:, past:]
    step.keep = (pos >= 0) & (pos < routing.sinks)
    if ids is not None and routing.special:
        step.keep = step.keep | torch.isin(ids, torch.tensor(routing.special, device=ids.device))
    # A mask that masks nothing is asked about once a call, rather than looked at in every unit.
    step.real = pos >= 0 if flat is not None and not bool(flat.all()) else None


def routed_mlp(module: Any, x: Tensor) -> Tensor:
    """An MLP's forward. x: [batch, rows, width]."""
    rt: UnitRuntime = module.sparsec_route
    paths = rt.decide(x)
    if paths.everyone:
        return rt.whole(x)  # type: ignore[no-any-return]
    flat = x.flatten(0, 1)
    out = paths.forecast(flat)
    if paths.count:
        out = paths.put(out, rt.whole(flat[paths.on]))
    return out.view(x.shape)


def routed_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention module's forward. hidden_states: [batch, rows, width]; the others are Transformers'."""
    rt: UnitRuntime = module.sparsec_route
    paths = rt.decide(hidden_states)
    given = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
    if paths.known and paths.everyone:
        return rt.whole(hidden_states, position_embeddings=position_embeddings, **given)  # type: ignore[no-any-return]
    assert position_embeddings is not None  # keys, values and forecasts are under way before the host waits for a count
    batch, rows, _ = hidden_states.shape
    cos, sin = (table.expand(batch, -1, -1) for table in position_embeddings)
    k, v = keys_values(module, hidden_states, rt.fused)
    k = rotate(k, cos[:, None], sin[:, None])
    flat = hidden_states.flatten(0, 1)
    out = paths.forecast(flat)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, module.layer_idx)
    if paths.everyone:
        q = rotate(queries(module, hidden_states, rt.fused), cos[:, :, None], sin[:, :, None]).transpose(1, 2)
        found, _ = sparsec_attention(module, q, k, v, attention_mask, scaling=module.scaling)
        return module.o_proj(found.flatten(2)), None
    state, decode = module.sparsec, rt.step is not None and rt.step.decode
    q = k.new_zeros(0, state.plan.model.heads, k.shape[-1])
    if paths.count:
        on = paths.on
        q = queries(module, flat[on], rt.fused)
        q = rotate(q, cos.flatten(0, 1)[on][:, None], sin.flatten(0, 1)[on][:, None])
    places: Tensor | slice
    try:
        if paths.count and (rows == 1 or (decode and state.layer.index != "none")):
            # Choices of decode rows are made row by row, in the places that the rows have.
            block, places = paths.block(q, paths.on, batch, rows), paths.on
            state.away = ~paths.run
        else:
            numbers = partial(_numbers, rt, past_key_values, attention_mask, hidden_states)
            state.picked, block, places = paths.pick(q, numbers)
        found, _ = sparsec_attention(module, block, k, v, attention_mask, scaling=module.scaling)
    finally:
        state.picked = state.away = None
    if paths.count:
        out = paths.put(out, module.o_proj(found.flatten(2).flatten(0, 1)[places]))
    return out.view(hidden_states.shape), None


def queries(module: Any, x: Tensor, fused: bool) -> Tensor:
    """q of some tokens before the rotary embedding: [tokens, width] -> [tokens, heads, head_dim]."""
    dim = module.head_dim
    if fused:
        width = module.o_proj.in_features
        q = _rows(module.qkv_proj, x, slice(0, width))
    else:
        q = module.q_proj(x)
    q = q.view(*x.shape[:-1], -1, dim)
    norm = getattr(module, "q_norm", None)
    return norm(q) if norm is not None else q


def keys_values(module: Any, x: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """k before the rotary embedding, and v: [batch, rows, width] -> [batch, KV heads, rows, head_dim] each."""
    if fused:
        k, v = _rows(module.qkv_proj, x, slice(module.o_proj.in_features, None)).chunk(2, -1)
    else:
        k, v = module.k_proj(x), module.v_proj(x)
    k, v = (part.view(*part.shape[:-1], -1, module.head_dim) for part in (k, v))
    norm = getattr(module, "k_norm", None)
    k = norm(k) if norm is not None else k
    return k.transpose(1, 2), v.transpose(1, 2)


def _rows(linear: Any, x: Tensor, rows: slice) -> Tensor:
    """Some outputs of a linear layer; whatever wraps it for training (LoRA) runs whole."""
    if type(linear) is not nn.Linear:
        return linear(x)[..., rows]  # type: ignore[no-any-return]
    return F.linear(x, linear.weight[rows], linear.bias[rows] if linear.bias is not None else None)


def _numbers(rt: UnitRuntime, cache: Any, mask: Tensor | None, x: Tensor) -> Tensor:
    """Token numbers of the call's rows: [batch, rows]."""
    batch, rows, _ = x.shape
    past = cache.layers[rt.layer].length if cache is not None else 0
    return token_numbers(mask, batch, past + rows, x.device)[:, past:]


def _forward_of(module: nn.Module) -> str:
    """The attribute to replace; accelerate, which spreads models over devices, puts its own before ``_old_forward``."""
    return "_old_forward" if hasattr(module, "_old_forward") else "forward"
