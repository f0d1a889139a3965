"""Opens an artifact: a model that runs its plan, and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsec.plugins.auto  # noqa: F401  makes AutoModelForCausalLM read plans
from sparsec.errors import ArtifactError
from sparsec.layout import read_plan


class Loaded(NamedTuple):
    """``model, tokenizer = sparsec.load(path)``."""

    model: Any
    tokenizer: Any


def load(path: str | Path, *, device: str = "cpu", dtype: str = "auto") -> Loaded:
    """A model whose ``generate()`` runs the artifact's plan.

    Args:
        path: a local artifact; for one on the Hub, ``import sparsec`` and ``AutoModelForCausalLM.from_pretrained``.
        device: ``cpu``, ``cuda``, ``cuda:<n>`` or ``auto``.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (as stored).

    Raises:
        ArtifactError: no artifact, or a damaged one.
        PlanError: plan, tensors and model do not fit together.
    """
    path = Path(path)
    read_plan(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be loaded ({str(error).splitlines()[0]}): compile it again") from None
    return Loaded(model.eval().requires_grad_(False), tokenizer)
