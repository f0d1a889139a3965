"""Where a model goes and in which numbers: the names that ``--device`` and ``--dtype`` take."""

from __future__ import annotations

import re

import torch

from sparsec.errors import UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    """``dtype`` is one of :data:`DTYPES`.

    Raises:
        UsageError: it is not.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES[1:])} or {DTYPES[0]}")


def device_map(device: str) -> str | dict[str, str] | None:
    """What from_pretrained takes for ``cpu``, ``cuda``, ``cuda:<n>`` or ``auto``.

    Raises:
        UsageError: no such device here.
    """
    if device in ("cpu", "auto"):
        return None if device == "cpu" else "auto"
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise UsageError(f"unknown device {device!r}: use cpu, cuda, cuda:<number> or auto")
    if not torch.cuda.is_available():
        raise UsageError(f"device {device} needs a CUDA GPU and PyTorch built for it, and there is none: use cpu")
    count = torch.cuda.device_count()
    if int(match[1] or 0) >= count:
        raise UsageError(f"device {device} is not here, the GPUs are cuda:0 to cuda:{count - 1}: name one of those")
    return {"": device}


def device_name(device: torch.device) -> str:
    """What a figure was measured on: a GPU's own name, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
