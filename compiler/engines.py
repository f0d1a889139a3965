"""Engines that read exports of an artifact: what of them is there, and whether it can run here.

A branch that brings a runner for one takes its row out of here and gives its logits to the golden comparison.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

FOLDERS = {"onnx": "onnx", "tensorrt": "tensorrt"}


def not_here(artifact: Path) -> Iterator[tuple[str, str]]:
    """Engine and reason, of each that is not run."""
    for engine, folder in FOLDERS.items():
        if not (artifact / folder).is_dir():
            yield engine, f"the artifact has no {folder}/: sparsec export makes it"
        else:
            yield engine, f"verify has no runner for {folder}/ yet"
    if importlib.util.find_spec("vllm") is None:
        yield "vllm", "vllm is not installed here"
    else:
        yield "vllm", "verify has no runner for vllm yet"
