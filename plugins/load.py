"""Opens an artifact: a model that runs its plan, and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsec.plugins.auto  # noqa: F401  makes AutoModelForCausalLM read plans
from sparsec.errors import ArtifactError
from sparsec.layout import check_tensors, read_plan
from sparsec.plugins.device import check_dtype, device_map
from sparsec.plugins.kernels.support import Kernels
from sparsec.plugins.merged_writing import writer_of
from sparsec.plugins.quiet import silenced
from sparsec.plugins.runtime import use_kernels
from sparsec.plugins.vocabulary import set_reader


class Loaded(NamedTuple):
    """``model, tokenizer = sparsec.load(path)``."""

    model: Any
    tokenizer: Any


def load(path: str | Path, *, device: str = "cpu", dtype: str = "auto", kernels: Kernels = "auto") -> Loaded:
    """A model whose ``generate()`` runs the artifact's plan.

    Args:
        path: a local artifact; for one on the Hub, ``import sparsec`` and ``AutoModelForCausalLM.from_pretrained``.
        device: ``cpu``, ``cuda``, ``cuda:<n>`` or ``auto``.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto`` (as stored).
        kernels: ``auto``: Triton's kernels on a GPU where they can run the plan, else the reference; ``reference``;
            ``triton``.

    Raises:
        UsageError: an unknown device or dtype, a GPU that is not there, or kernels that cannot run there.
        ArtifactError: no artifact, a damaged one, or one that is too large for the device.
        PlanError: plan, tensors and model do not fit together.
    """
    path = Path(path)
    check_dtype(dtype)
    place = device_map(device)
    read_plan(path)
    check_tensors(path)
    try:
        with silenced():
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, device_map=place, local_files_only=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (torch.OutOfMemoryError, MemoryError):
        raise ArtifactError(
            f"{path} does not fit into the memory of {device}: use dtype bfloat16, or device auto"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise ArtifactError(f"{path} cannot be loaded ({reason}): copy or compile it again") from error
    if getattr(model, "sparsec_plan", None) is None:
        raise ArtifactError(f"{path} opened without its plan: install a transformers release that sparsec requires")
    lost = sorted(info["missing_keys"])
    if lost:
        raise ArtifactError(f"{path} lacks the weights {', '.join(lost[:3])}: copy or compile it again")
    use_kernels(model, kernels)
    set_reader(model, tokenizer)
    writer_of(model)  # which takes a while for many tokens, and may find that something is missing
    return Loaded(model.eval().requires_grad_(False), tokenizer)
