"""``sparsec export``: which exporter writes what, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsec.export.tensorrt import Flavour
    from sparsec.export.tensorrt_options import Build


RUNTIMES = ["onnx", "tensorrt"]


def check(targets: Sequence[str], trt: Flavour = "auto") -> None:
    """What the targets need is installed: asked before a compile, not behind it.

    Raises:
        UsageError: something is missing.
    """
    if targets:
        from sparsec.export.onnx.artifact import check_packages

        check_packages()
    if "tensorrt" in targets:
        from sparsec.export.tensorrt import flavour_of

        flavour_of(trt)


def export(
    artifact: Path,
    targets: Sequence[str],
    *,
    dtype: str = "float32",
    trt: Flavour = "auto",
    slots: int = 2048,
    plugins: bool | None = None,
    build: Build | None = None,
) -> dict[str, Any]:
    """Write an artifact's exports, one after the other: the manifest of each by its target.

    ``build``: how TensorRT builds, as ``--trt-option`` says it; None: as it does by default.
    """
    from sparsec.compiler.draw import drawing

    made: dict[str, Any] = {}
    if not targets:
        return made
    with drawing() as listen:
        for target in targets:
            if target == "onnx":
                from sparsec.export.onnx.artifact import export_onnx

                made[target] = export_onnx(artifact, dtype=dtype, listen=listen)
            else:
                from sparsec.export.tensorrt import export_tensorrt
                from sparsec.export.tensorrt_options import Build

                how = build or Build()
                made[target] = export_tensorrt(
                    artifact,
                    flavour=trt,
                    dtype=dtype,
                    slots=slots,
                    capabilities=how.capabilities,
                    profile=how.profile,
                    plugins=plugins,
                    options=how.options,
                    listen=listen,
                )
    return made


def export_text(artifact: Path, made: dict[str, Any], seconds: float) -> str:
    """Where the exports are, what is in them, and how long they took."""
    return "\n".join([*export_lines(artifact, made), f"{seconds:.0f} s"])


def export_lines(artifact: Path, made: dict[str, Any]) -> list[str]:
    """Where the exports are, and what is in them."""
    lines = []
    for target, facts in made.items():
        folder = artifact / target
        size = sum(file.stat().st_size for file in folder.iterdir())
        lines.append(f"{folder}: {size / 2**20:.0f} MiB, {facts['dtype']}, {', '.join(facts['files'])}")
        lines += [f"{name} is {facts[name]}" for name in ("routing", "choice") if name in facts]
    return lines
