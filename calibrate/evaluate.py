"""The evaluation table: an artifact beside its baselines, by decode semantics, at several lengths.

    dense       the base model
    window      every head local: sinks and window only
    split       the artifact's head split, retrieval heads dense in decode too: training-free, no selector
    artifact    the plan

One harness, the same windows and prompts for all. A selector that keeps more looks better, so tokens kept
and true-attention mass recall stand beside the quality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.decode import SelectorStats, text_loss
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import prompts, score
from sparsec.errors import UsageError
from sparsec.events import Event, Listener, silent
from sparsec.plan import Plan
from sparsec.plugins.runtime import applied

SYSTEMS = ("dense", "window", "split", "artifact")


def system_plan(name: str, plan: Plan) -> Plan | None:
    """The plan that a system runs; None is the dense model.

    Raises:
        UsageError: no such system.
    """
    if name == "dense":
        return None
    if name == "artifact":
        return plan
    if name not in SYSTEMS:
        raise UsageError(f"there is no system {name!r}: choose from {', '.join(SYSTEMS)}")
    layers = []
    for layer in plan.layers:
        heads = layer.heads if name == "split" or layer.heads is None else (0,) * len(layer.heads)
        layers.append({"heads": heads, "index": "none"})
    return plan.edit(layers=layers, selector=None)


def running(model: Any, plan: Plan | None, tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """The model under a system's plan inside the block."""
    if plan is None:
        return nullcontext()
    return applied(model, plan, tensors if plan.indexed() else {})


def evaluate(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    calibration: Calibration,
    *,
    lengths: Sequence[int],
    systems: Sequence[str] = SYSTEMS,
    tasks: Sequence[str] = ("kv", "multikey", "passkey"),
    prompts_each: int = 50,
    windows_each: int = 8,
    rows: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Measure every system at every length on held-out text.

    Args:
        model: dense, no plan installed.
        lengths: tokens of a window or prompt; at least one should be twice the plan's window.
        prompts_each: prompts a task and length; 0 leaves tasks out.
        windows_each: text windows a length; 0 leaves bits per byte out.
        rows: decode rows at the end of each window.

    Returns:
        JSON data: ``cells`` by length and system, seeds, counts and notes.
    """
    cells: list[dict[str, Any]] = []
    notes = []
    if plan.window is not None:
        reach = 2 * plan.window.size
        notes += [f"{n} tokens is less than twice the window: local heads see most of it" for n in lengths if n < reach]
    for length in lengths:
        windows: Sequence[Tensor] = ()
        if windows_each:
            count = min(windows_each, calibration.available("heldout", length))
            if count < windows_each:
                notes.append(f"only {count} held-out windows of {length} tokens, {windows_each} were asked for")
            windows = list(calibration.windows("heldout", length, max(1, count), seed=seed))
        asked = {
            task: prompts(task, calibration, length=length, count=prompts_each, seed=seed)
            for task in tasks
            if prompts_each
        }
        for system in systems:
            cell: dict[str, Any] = {"length": length, "system": system}
            with running(model, system_plan(system, plan), tensors):
                if windows:
                    stats = SelectorStats()
                    stage = f"{system} {length}: bits per byte"
                    prompt = length - min(rows, length // 2)
                    loss = text_loss(model, tokenizer, windows, prompt, observe=stats, listen=listen, stage=stage)
                    cell |= loss.to_json() | {"selector": stats.summary()}
                for task, batch in asked.items():
                    stage = f"{system} {length}: {task}"
                    listen(Event(stage, 0, len(batch)))
                    result = score(
                        model,
                        tokenizer,
                        batch,
                        batch_size=batch_size,
                        progress=lambda done, total, stage=stage: listen(Event(stage, done, total)),  # type: ignore[misc]
                    )
                    cell.setdefault("tasks", {})[task] = {
                        "exact": result.exact,
                        "digits": result.digits,
                        "n": result.n,
                        "right": [int(r) for r in result.right],
                    }
            cells.append(cell)
    return {
        "cells": cells,
        "notes": notes,
        "seed": seed,
        "rows": rows,
        "prompts_each": prompts_each,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "text": calibration.describe(),
    }
