"""Launches PTX by the CUDA driver, as an engine of TensorRT does: no Triton, no PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from sparsec.errors import UsageError
from sparsec.plugins.ahead import Compiled

DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PLAIN_SHARED = 48 << 10  # bytes a launch gets without asking


@cache
def cuda() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        UsageError: there is none.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UsageError("there is no CUDA driver here: run it on a machine with a GPU") from None
    _check(library.cuInit(0), "cuInit")
    return library


def launch(
    kernel: Compiled,
    inputs: Sequence[int],
    integers: Sequence[int],
    outputs: Sequence[int],
    grid: Sequence[int],
    stream: int = 0,
) -> None:
    """Launch on the current context.

    Args:
        kernel: for the GPU that is current, or an older one.
        inputs, outputs: addresses on the device; integers: between them.
        grid: programs along x, y and z.
        stream: a CUDA stream's handle.

    Raises:
        RuntimeError: the driver refuses, with its number.
    """
    function = _function(kernel)
    values: list[Any] = [
        *(ctypes.c_uint64(at) for at in inputs),
        *(ctypes.c_int32(number) for number in integers),
        *(ctypes.c_uint64(at) for at in outputs),
    ]
    listed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    where = ctypes.c_void_p(stream)
    done = cuda().cuLaunchKernel(function, *map(int, grid), kernel.threads, 1, 1, kernel.shared, where, listed, None)
    _check(done, f"launching {kernel.name}")


@cache
def _function(kernel: Compiled) -> ctypes.c_void_p:
    """The kernel in the current context; modules stay loaded."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(cuda().cuModuleLoadData(ctypes.byref(module), kernel.ptx.encode() + b"\0"), f"loading {kernel.name}")
    _check(cuda().cuModuleGetFunction(ctypes.byref(function), module, kernel.name.encode()), kernel.name)
    if kernel.shared > PLAIN_SHARED:
        _check(cuda().cuFuncSetAttribute(function, DYNAMIC_SHARED, kernel.shared), kernel.name)
    return function


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver refuses {what}: error {status}")
