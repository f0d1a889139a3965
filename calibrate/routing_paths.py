"""What routing does to text: execution rates of prefill and decode by layer, and the paths of a sample's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.unit_flops import Key, UnitCosts
from sparsec.plan import UNITS, Plan
from sparsec.plugins.runtime import applied, stepping
from sparsec.plugins.step import Step


@torch.no_grad()
def runs_of(model: Any, window: Tensor, prompt: int | None = None) -> dict[Key, Tensor]:
    """Which tokens run which routed unit under the installed plan: bool [1, length] by unit.

    prompt: rows from here on are decode rows; None: all are prefill rows.
    """
    found: dict[Key, Tensor] = {}

    def note(layer: int, unit: Any, run: Tensor) -> None:
        found[layer, unit] = run.cpu()

    step = Step(decode=prompt is not None, prompt=prompt or 0, observe_paths=note)
    with stepping(step):
        model.get_decoder()(input_ids=window[None].to(model.device), use_cache=False)
    return found


def paths_of(
    model: Any, plan: Plan, tensors: Mapping[str, Tensor], windows: Tensor, costs: UnitCosts, tokenizer: Any, shown: int
) -> dict[str, Any]:
    """Realised rates as JSON data.

    Returns:
        ``removed``: share of all units' FLOPs; ``prefill`` and ``decode``: execution rates by unit and layer (null:
        not routed), decode over the second halves of the windows; ``by_unit``: the removed share that attention and MLP
        gave; ``sample``: some tokens and for each the units it ran, as a string of 0 and 1 a unit.
    """
    assert plan.routing is not None
    prefill: dict[Key, list[Tensor]] = {key: [] for key in plan.routing.units}
    decode: dict[Key, list[Tensor]] = {key: [] for key in plan.routing.units}
    half = windows.shape[1] // 2
    with applied(model, plan, tensors):
        for window in windows:
            for key, run in runs_of(model, window).items():
                prefill[key].append(run)
            for key, run in runs_of(model, window, half).items():
                decode[key].append(run[:, half:])
    runs = {key: torch.cat(found) for key, found in prefill.items()}
    away = {key: ~run for key, run in runs.items()}
    layers = range(plan.model.layers)

    def rates(found: Mapping[Key, Any]) -> dict[str, list[float | None]]:
        return {
            unit: [
                float(torch.cat(list(found[i, unit])).float().mean()) if (i, unit) in found else None for i in layers
            ]
            for unit in UNITS
        }

    by_unit = {}
    for unit in UNITS:
        some = {key: gone for key, gone in away.items() if key[1] == unit}
        by_unit[unit] = costs.removed(some) if some else 0.0
    start = min(64, windows.shape[1] // 2)
    ids = windows[0, start : start + shown].tolist()
    return {
        "removed": costs.removed(away),
        "by_unit": by_unit,
        "prefill": rates(prefill),
        "decode": rates(decode),
        "sample": {
            "tokens": [tokenizer.decode([token]) for token in ids],
            "first": start,
            "units": [
                {"layer": i, "unit": unit, "ran": "".join("01"[int(r)] for r in run[0, start : start + shown])}
                for (i, unit), run in runs.items()
            ],
        },
    }
