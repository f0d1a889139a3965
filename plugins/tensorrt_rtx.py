"""The operators as plugins of TensorRT-RTX, which has no quickly deployable ones: ``IPluginV3`` over the same kernels.

An engine with them is built with no GPU. Where it runs, Python and Triton have to be there, and these plugins
registered (:func:`register`), before the engine is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sparsec.errors import UsageError
from sparsec.plugins.ahead import NAMESPACE, OPERATORS, Operator, Use, compiled
from sparsec.plugins.driver import launch


def register(trt: ModuleType) -> list[Use]:
    """Register a creator of each operator; what networks use is added to the list as they are built."""
    whole(trt)
    uses: list[Use] = []
    registry = trt.get_plugin_registry()
    for operator in OPERATORS.values():
        if (old := registry.get_creator(operator.name, "1", NAMESPACE)) is not None:
            registry.deregister_creator(old)
        registry.register_creator(_creator(trt, operator, uses), NAMESPACE)
    return uses


def whole(trt: ModuleType) -> None:
    """The parser opens its library by a name without version, which wheels do not bring: a link beside it.

    Raises:
        UsageError: the link cannot be made.
    """
    try:
        import tensorrt_rtx_libs
    except ImportError:  # not from a wheel
        return
    for folder in map(Path, tensorrt_rtx_libs.__path__):
        plain, real = folder / "libtensorrt_rtx.so", folder / "libtensorrt_rtx.so.1"
        if real.is_file() and not plain.exists():
            try:
                plain.symlink_to(real.name)
            except OSError as error:
                raise UsageError(
                    f"TensorRT-RTX {trt.__version__} reads plugins through {plain}, which is missing ({error}): "
                    f"ln -s {real.name} {plain}"
                ) from None


def _creator(trt: ModuleType, operator: Operator, uses: list[Use]) -> Any:
    kinds = {"int": trt.PluginFieldType.INT32, "ints": trt.PluginFieldType.INT32, "float": trt.PluginFieldType.FLOAT32}
    types = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}
    types |= {trt.DataType.INT32: "int32", trt.DataType.INT64: "int64", trt.DataType.BOOL: "bool"}
    names = {name: kind for kind, name in types.items()}

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[name-defined]
        def __init__(self, attributes: dict[str, Any]) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = operator.name, NAMESPACE, "1"
            self.num_outputs = len(operator.outputs)
            self.attributes, self.tactic = attributes, 0

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def get_output_data_types(self, found: Sequence[Any]) -> list[Any]:
            return [names[each] for each in operator.types(_floats(found))[1]]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            sizes = [[each[place] for place in range(len(each))] for each in inputs]
            return [
                trt.DimsExprs([builder.constant(size) if isinstance(size, int) else size for size in shape])
                for shape in operator.shapes(sizes, self.attributes)
            ]

        def supports_format_combination(self, pos: int, descs: Sequence[Any], num_inputs: int) -> bool:
            found = descs[pos].desc
            wanted = [*operator.inputs.values(), *operator.outputs.values()]
            kind = types.get(found.type)
            firsts = [descs[at].desc.type for at in range(pos) if wanted[at] == "T"]
            if wanted[pos] == "T":
                fits = kind in ("float32", "float16", "bfloat16") and all(each == found.type for each in firsts)
            else:
                fits = kind == wanted[pos]
            return bool(fits and found.format == trt.TensorFormat.LINEAR)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            floats = _floats([each.desc.type for each in inputs])
            shapes = tuple(tuple(each.desc.dims) for each in inputs)
            attributes = tuple(
                (name, tuple(value) if isinstance(value, list) else value) for name, value in self.attributes.items()
            )
            use = Use(operator.name, floats, shapes, attributes)
            if use not in uses:
                uses.append(use)

        def get_valid_tactics(self) -> list[int]:
            return list(operator.tactics)

        def set_tactic(self, tactic: int) -> None:
            self.tactic = tactic

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            return None

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def clone(self) -> Any:
            other = Plugin(self.attributes)
            other.tactic = self.tactic
            return other

        def get_fields_to_serialize(self) -> Any:
            return _fields(self.attributes)

        def enqueue(
            self, inputs: Any, outputs: Any, read: Sequence[int], written: Sequence[int], workspace: int, stream: int
        ) -> None:
            import torch

            major, minor = torch.cuda.get_device_capability()
            shapes = [tuple(each.dims) for each in inputs]
            floats = _floats([each.type for each in inputs])
            kernel = compiled(operator, floats, shapes, self.attributes, 10 * major + minor, self.tactic)
            how = operator.launch(shapes, self.attributes)
            launch(kernel, read, how.integers, written, how.grid, stream)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = operator.name, NAMESPACE, "1"
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(name, np.array([]), kinds[kind]) for name, kind in operator.attributes.items()]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            given = {field.name: field.data for field in fields}
            return Plugin({each: _value(given[each], kind) for each, kind in operator.attributes.items()})

    def _floats(found: Sequence[Any]) -> str:
        """The type of what is T among the inputs; ListKept has none."""
        return next(
            (types[each] for each, kind in zip(found, operator.inputs.values(), strict=True) if kind == "T"), ""
        )

    def _fields(attributes: dict[str, Any]) -> Any:
        listed = []
        for name, kind in operator.attributes.items():
            array = np.atleast_1d(np.array(attributes[name], np.float32 if kind == "float" else np.int32))
            listed.append(trt.PluginField(name, array, kinds[kind]))
        return trt.PluginFieldCollection(listed)

    return Creator()


def _value(data: Any, kind: str) -> Any:
    values = np.atleast_1d(data)
    if kind == "ints":
        return tuple(int(each) for each in values)
    return float(values[0]) if kind == "float" else int(values[0])
