"""The operators as quickly deployable plugins of TensorRT (``tensorrt.plugin``), compiled ahead of time.

Engines built with them hold PTX and need neither Python nor this package. Everything is in
:mod:`sparsec.plugins.ahead`; here its table is told to TensorRT: ``register`` with shapes and types, ``autotune`` with
tactics, ``aot_impl`` with PTX and launch, ``impl`` for who prefers Python. ``plugins_of`` takes the library as an
argument, so that signatures are checked against the ``plugin`` package alone, without a GPU.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsec.plugins.ahead import NAMESPACE, OPERATORS, Operator, Use, compiled
from sparsec.plugins.driver import launch

KINDS: dict[str, Any] = {"int": int, "float": float, "ints": npt.NDArray[np.int64]}
NAMES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
FIELDS = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int32": "int32"}
_done: list[list[Use]] = []


def register() -> list[Use]:
    """Register all operators with the TensorRT that is installed, once; what is compiled is added to the list."""
    if not _done:
        trt = importlib.import_module("tensorrt")
        _done.append(plugins_of(trt, importlib.import_module("tensorrt.plugin"), capability_here))
    return _done[0]


def capability_here() -> int:
    """Compute capability of the GPU that engines are built on, and for."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def plugins_of(trt: ModuleType, trtp: ModuleType, capability: Callable[[], int]) -> list[Use]:
    """Declare every operator to ``trtp``, the library's ``plugin`` package; what is compiled is added to the list."""
    uses: list[Use] = []
    for operator in OPERATORS.values():
        _declare(trt, trtp, operator, capability, uses)
    return uses


def _declare(
    trt: ModuleType, trtp: ModuleType, operator: Operator, capability: Callable[[], int], uses: list[Use]
) -> None:
    name = f"{NAMESPACE}::{operator.name}"
    count = len(operator.inputs)
    types = {getattr(trt, own): kind for kind, own in FIELDS.items()}

    def attributes_of(values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(operator.attributes, values, strict=True))

    def floats_of(descs: Sequence[Any]) -> str:
        kinds = zip(descs, operator.inputs.values(), strict=True)
        return next((types[each.dtype] for each, kind in kinds if kind == "T"), "")

    def declared(*args: Any) -> Any:
        descs, attributes = args[:count], attributes_of(args[count:])
        shapes = operator.shapes([list(each.shape_expr) for each in descs], attributes)
        found = []
        like = next((each for each, kind in zip(descs, operator.inputs.values(), strict=True) if kind == "T"), None)
        for shape, kind in zip(shapes, operator.outputs.values(), strict=True):
            dtype = like.dtype if kind == "T" and like is not None else getattr(trt, kind)
            found.append(trtp.from_shape_expr(shape, dtype))
        return tuple(found)

    def tuned(*args: Any) -> Any:
        floats = ("float32", "float16", "bfloat16")
        kinds = [*operator.inputs.values(), *operator.outputs.values()]
        listed = ["|".join(NAMES[each] for each in floats) if kind == "T" else NAMES[kind] for kind in kinds]
        return [trtp.AutoTuneCombination(", ".join(listed), "LINEAR", list(operator.tactics))]

    def ahead(*args: Any) -> Any:
        descs, attributes, tactic = args[:count], attributes_of(args[count:-2]), args[-1]
        symbols = [list(each.shape_expr) for each in descs]
        sizes = tuple(tuple(_number(size) for size in shape) for shape in symbols)
        floats = floats_of(descs)
        kernel = compiled(operator, floats or "float32", sizes, attributes, capability(), tactic)
        how = operator.launch([_known(*pair) for pair in zip(symbols, sizes, strict=True)], attributes)
        uses.append(Use(operator.name, floats, sizes, tuple(attributes.items())))
        params = trtp.KernelLaunchParams(*how.grid, kernel.threads, 1, 1, kernel.shared)
        extra = trtp.SymIntExprs.from_tuple([trtp.SymInt32(each) for each in how.integers])
        return kernel.name, kernel.ptx, params, extra

    def here(*args: Any) -> None:
        tensors, attributes, (outputs, stream, tactic) = args[:count], attributes_of(args[count:-3]), args[-3:]
        shapes = [tuple(each.shape) for each in tensors]
        kernel = compiled(operator, floats_of(tensors) or "float32", shapes, attributes, capability(), tactic)
        how = operator.launch(shapes, attributes)
        read, written = ([each.data_ptr for each in side] for side in (tensors, outputs))
        launch(kernel, read, how.integers, written, how.grid, stream)

    desc, tensor = trtp.TensorDesc, trtp.Tensor
    described = tuple[(desc,) * len(operator.outputs)]  # type: ignore[misc,valid-type]
    made = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]  # type: ignore[name-defined]
    trtp.register(name)(_signed(declared, operator, desc, [], described))
    trtp.autotune(name)(_signed(tuned, operator, desc, ["outputs"], list[trtp.AutoTuneCombination]))  # type: ignore[name-defined]
    trtp.aot_impl(name)(_signed(ahead, operator, desc, ["outputs", "tactic"], made))
    trtp.impl(name)(_signed(here, operator, tensor, ["outputs", "stream", "tactic"], None))


def _signed(function: Callable[..., Any], operator: Operator, tensor: Any, more: Sequence[str], returns: Any) -> Any:
    """The function under the signature that TensorRT reads: tensors, attributes, what the kind of call adds."""
    parameter, kind = inspect.Parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [parameter(each, kind, annotation=tensor) for each in operator.inputs]
    listed += [parameter(each, kind, annotation=KINDS[what]) for each, what in operator.attributes.items()]
    listed += [parameter(each, kind) for each in more]

    def signed(*args: Any, **named: Any) -> Any:
        # TensorRT calls by position, but for the stream of an implementation.
        return function(*args, *named.values())

    signed.__signature__ = inspect.Signature(listed, return_annotation=returns)  # type: ignore[attr-defined]
    return signed


def _number(size: Any) -> int:
    """A size that is known when the engine is built, or -1."""
    if isinstance(size, int):
        return size
    return int(size.constant_value()) if size.is_constant else -1


def _known(symbols: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    """Numbers where there are numbers, symbols elsewhere."""
    return [symbol if size < 0 else size for symbol, size in zip(symbols, sizes, strict=True)]
