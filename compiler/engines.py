"""Engines that read exports of an artifact: what runs here does the golden prompts, of the rest it is said why not.

A branch that brings a runner for another one gives it to :func:`sparsec.compiler.golden.on_runner`, as ONNX's is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from sparsec.compiler import golden
from sparsec.compiler.golden_compare import Difference, written
from sparsec.compiler.thresholds import GoldenBounds
from sparsec.errors import UsageError
from sparsec.layout import CONFIG, read_json, read_plan
from sparsec.plugins.onnx_runner import FOLDER as ONNX
from sparsec.plugins.onnx_runner import MANIFEST, OnnxModel
from sparsec.plugins.vocabulary import Reader

TENSORRT = "tensorrt"
LIBRARIES = ("tensorrt", "tensorrt_rtx")


class NotHere(Exception):
    """An engine does not run on this machine; the message says why."""


def on_onnx(artifact: Path, recorded: Mapping[str, Any], bounds: GoldenBounds, device: str) -> list[Difference]:
    """The golden prompts through ONNX Runtime.

    Raises:
        NotHere: there is no export, or ONNX Runtime is missing or has no such device.
        ArtifactError: the export or golden.json is damaged.
    """
    if not (artifact / ONNX).is_dir():
        raise NotHere("the artifact has no onnx/: sparsec export makes it")
    try:
        runner = OnnxModel(artifact / ONNX, device=device.partition(":")[0], threads=torch.get_num_threads())
    except UsageError as error:
        raise NotHere(str(error)) from None
    config = read_json(artifact / CONFIG)
    rows = int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0)
    read = _reader(artifact)
    now = [golden.on_runner(runner, tokens, read) for tokens in golden.tokens_of(recorded, rows)]
    return written(recorded, now, str(runner.manifest.get("dtype")), bounds)


def _reader(artifact: Path) -> Reader | None:
    """What merges prompts, where the plan has merged tokens."""
    own = read_plan(artifact).vocabulary
    return None if own is None else Reader(AutoTokenizer.from_pretrained(artifact, local_files_only=True), own.base)


def not_run(artifact: Path) -> Iterator[tuple[str, str]]:
    """Engine and reason, of those that ``verify`` cannot run."""
    if not (artifact / TENSORRT / MANIFEST).is_file():
        yield TENSORRT, "the artifact has no tensorrt/: sparsec export makes it"
    elif not any(importlib.util.find_spec(name) for name in LIBRARIES):
        yield TENSORRT, "TensorRT is not installed here: the engine's hash and plan were checked, it was not run"
    elif not torch.cuda.is_available():
        yield TENSORRT, "engines need a GPU: the engine's hash and plan were checked, it was not run"
    else:
        yield TENSORRT, "verify has no runner for engines yet: their hashes and plan were checked"
    if importlib.util.find_spec("vllm") is None:
        yield "vllm", "vllm is not installed here"
    else:
        yield "vllm", "verify has no runner for vllm yet"
