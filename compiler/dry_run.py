"""What a compile would do: stages and their order, expected time, memory and files. Nothing is computed or written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sparsec.compiler.checkpoint import load_config
from sparsec.compiler.registry import check_needs
from sparsec.compiler.start import Start
from sparsec.export.artifact import INDEX, model_files
from sparsec.layout import CARD, CONFIG, GOLDEN, MANIFEST, MEASUREMENTS, REPORT, TENSORS
from sparsec.passes.base import Pass
from sparsec.plugins.device import device_map
from sparsec.plugins.families import base_plan


@dataclass(frozen=True)
class Expected:
    """One stage: seconds and bytes are estimates from the model's size and a short measurement of this machine."""

    stage: str
    tier: str
    seconds: float
    resident: int


def expect(
    path: Path,
    weights: Sequence[Path],
    passes: Sequence[Pass],
    device: str,
    producer: str,
    start: Start | None = None,
) -> dict[str, Any]:
    """Estimates as JSON data.

    Args:
        path: the dense checkpoint's folder.
        weights: its safetensors files.
        passes: in the order they run.
        device: where they would run.
        start: a head split that they go on from; None is the dense model.
    """
    config = load_config(path)
    plan = base_plan(config, producer)
    if start is not None:
        plan = start.plan(plan)
    check_needs(passes, plan)
    numbers, stored = _sizes(weights)
    speed = _flops(device)
    stages = []
    for each in passes:
        cost = each.cost(plan, config.max_position_embeddings)
        # Two operations a weight and token; attention and everything else roughly double it on long windows.
        seconds = cost.tokens * 2 * numbers * 2 / speed
        stages.append(Expected(each.name, each.tier_of_run(), seconds, cost.resident + cost.copies * numbers * 4))
    # Two windows of four local windows each, dense and as compiled, and the files' hashes.
    judged = 2 * min(config.max_position_embeddings // 4, 32768)
    stages.append(Expected("gate", "training-free", judged * 2 * numbers * 2 / speed + stored / 2e8, 0))
    return {
        "stages": [vars(stage) for stage in stages],
        "seconds": sum(stage.seconds for stage in stages),
        "memory": numbers * 4 + max(stage.resident for stage in stages) + (600 << 20),
        "disk": stored,
        "files": sorted(
            {file.relative_to(path).as_posix() for file in model_files(path, weights)}
            | {CARD, CONFIG, GOLDEN, MANIFEST, MEASUREMENTS, REPORT}
            | ({TENSORS, INDEX} if plan.dsa is None and any(each.adds_tensors() for each in passes) else set())
        ),
    }


def _sizes(weights: Sequence[Path]) -> tuple[int, int]:
    """Parameters and bytes."""
    numbers = 0
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                size = 1
                for dim in tensors.get_slice(key).get_shape():
                    size *= dim
                numbers += size
    return numbers, sum(file.stat().st_size for file in weights)


def _flops(device: str) -> float:
    """Matrix products a second on this machine, measured for a moment."""
    device_map(device)
    kind = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    a = torch.randn(1024, 1024, device=kind)
    _ = (a @ a).sum().item()
    began, rounds = time.perf_counter(), 4
    for _round in range(rounds):
        b = a @ a
    _ = b.sum().item()
    return rounds * 2 * 1024**3 / (time.perf_counter() - began)
