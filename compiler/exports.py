"""``sparsec export``: which exporter writes what, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.compiler.draw import drawing

if TYPE_CHECKING:
    from sparsec.export.tensorrt import Flavour


def export(artifact: Path, targets: Sequence[str], *, dtype: str, trt: Flavour, slots: int) -> dict[str, Any]:
    """Write an artifact's exports, one after the other: the manifest of each by its target."""
    made = {}
    with drawing() as listen:
        for target in targets:
            if target == "onnx":
                from sparsec.export.onnx.artifact import export_onnx

                made[target] = export_onnx(artifact, dtype=dtype, listen=listen)
            else:
                from sparsec.export.tensorrt import export_tensorrt

                made[target] = export_tensorrt(artifact, flavour=trt, dtype=dtype, slots=slots, listen=listen)
    return made


def export_text(artifact: Path, made: dict[str, Any], seconds: float) -> str:
    """Where the exports are, and what is in them."""
    lines = []
    for target, facts in made.items():
        folder = artifact / target
        size = sum(file.stat().st_size for file in folder.iterdir())
        lines.append(f"{folder}: {size / 2**20:.0f} MiB, {facts['dtype']}, {', '.join(facts['files'])}")
    return "\n".join([*lines, f"{seconds:.0f} s"])
