"""The versions that a figure or an artifact was made with."""

from __future__ import annotations

import platform

import torch
import transformers

import sparsec


def versions() -> dict[str, str]:
    """By name: sparsec, torch, transformers, python."""
    return {
        "sparsec": sparsec.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
