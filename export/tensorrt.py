"""``tensorrt/`` of an artifact: engines for prompts and decode steps, and a manifest that says where they load.

Two flavours of the library. TensorRT-RTX builds ahead of time, with no GPU, for the compute capabilities of RTX GPUs.
TensorRT for data-centre GPUs builds on the GPU that it is for. Engines have a fixed number of ``slots``: TensorRT's
cache update wants it.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from sparsec.errors import ArtifactError, PlanError, UsageError
from sparsec.events import Event, Listener, silent
from sparsec.export.artifact import check_room, write_json
from sparsec.export.aside import filling
from sparsec.export.onnx.artifact import check_packages, replace, source_of, write_graphs
from sparsec.export.onnx.features import check_exportable
from sparsec.export.onnx.files import KINDS
from sparsec.export.tensorrt_options import RTX_CAPABILITIES, Options, Profile
from sparsec.layout import read_plan, sha256
from sparsec.plugins.ahead import NAMESPACE, OPERATORS, Use, compiled
from sparsec.plugins.kernels.support import MOST_ITEMS, triton_missing
from sparsec.plugins.load import load
from sparsec.plugins.onnx_runner import MANIFEST

FOLDER = "tensorrt"
Flavour = Literal["auto", "rtx", "tensorrt"]
MODULES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
INSTALL = {
    "rtx": "pip install 'sparsec[tensorrt-rtx]'",
    "tensorrt": "pip install tensorrt on the machine with the GPU",
}
MOST_RANKED = 3840  # entries that TensorRT's TopK takes, with which the bodies rank what a selector scores


def flavour_of(asked: Flavour) -> tuple[str, ModuleType]:
    """The flavour that is built, and its library.

    Raises:
        UsageError: it is not installed, or not whole.
    """
    wanted = ("tensorrt", "rtx") if asked == "auto" else (asked,)
    for flavour in wanted:
        if importlib.util.find_spec(MODULES[flavour]) is not None:
            try:
                return flavour, importlib.import_module(MODULES[flavour])
            except (ImportError, OSError) as error:
                raise UsageError(
                    f"{MODULES[flavour]} is installed but cannot be loaded ({error}): reinstall it"
                ) from None
    raise UsageError(f"TensorRT is not installed here: {INSTALL[wanted[-1]]}")


def export_tensorrt(
    artifact: Path,
    *,
    flavour: Flavour = "auto",
    dtype: str = "float16",
    slots: int = 2048,
    capabilities: Sequence[int] | None = None,
    profile: Profile | None = None,
    plugins: bool | None = None,
    options: Options | None = None,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Write ``<artifact>/tensorrt``; one that is there is replaced when the new one is whole.

    Args:
        artifact: a folder of sparsec compile.
        flavour: which library; ``auto``: the one that is installed, data-centre before RTX.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        slots: tokens a sequence can hold.
        capabilities: compute capabilities that RTX engines are for, e.g. 89; None: all.
        profile: sizes; None: the defaults of :class:`Profile`.
        plugins: decode attention by the kernels of :mod:`sparsec.plugins.ahead` instead of built-in layers; None: for
            data-centre GPUs. With TensorRT-RTX Python and Triton then have to be where the engine runs.
        options: of the builder; None: the defaults of :class:`Options`.

    Returns:
        the manifest.

    Raises:
        UsageError: the library is missing, or a size or capability that it does not take.
        PlanError: the engines cannot mean the plan.
        ArtifactError: no artifact, no room, or the library refuses the graphs, with its reason.
    """
    plan, options = read_plan(artifact), options or Options()
    if plan.dsa is not None:
        raise PlanError("engines of models with indexers of their own are not built yet: use --to onnx")
    name, trt = flavour_of(flavour)
    check_packages()
    plugins = name == "tensorrt" if plugins is None else plugins
    if profile is not None and profile.rows[2] > slots:
        raise UsageError(
            f"a call of {profile.rows[2]} rows does not fit in {slots} slots: use fewer rows, or more --slots"
        )
    profile = profile or Profile().within(slots)
    check_exportable(plan)
    options.check(name)
    if name == "tensorrt" and capabilities is not None:
        raise UsageError("TensorRT builds for the GPU that it runs on: leave capabilities, or use --trt rtx")
    capabilities = capabilities or RTX_CAPABILITIES
    if plugins and (missing := triton_missing()) is not None:
        raise UsageError(f"plugins are Triton's kernels. {missing}")
    ranked = MOST_ITEMS if plugins else MOST_RANKED
    if plan.selector is not None and plan.selector.granularity == "token" and slots > ranked:
        by = "the plugins rank" if plugins else "TensorRT ranks"
        raise UsageError(f"{by} {ranked} tokens at most, not {slots}: use fewer --slots, or select=block")
    if name == "rtx" and (odd := sorted(set(capabilities) - set(RTX_CAPABILITIES))):
        known = ", ".join(map(str, RTX_CAPABILITIES))
        raise UsageError(
            f"TensorRT-RTX builds for compute capabilities {known}, not {odd[0]}: use --trt tensorrt there"
        )
    model, _ = load(artifact, dtype=dtype)
    check_exportable(plan, model.config)
    check_room(artifact, 4 * sum(weight.nbytes for weight in model.parameters()))
    with filling(artifact, FOLDER) as aside:
        with tempfile.TemporaryDirectory(dir=aside) as scratch:
            graphs = Path(scratch)
            made = write_graphs(
                model, graphs, source=source_of(artifact), dtype=dtype, slots=slots, plugins=plugins, listen=listen
            )
            del model
            uses = _register(trt, name) if plugins else []
            layers = {}
            for done, kind in enumerate(KINDS):
                listen(Event(f"build {kind}", done, len(KINDS)))
                layers[kind] = build(
                    trt, name, graphs / f"{kind}.onnx", aside / f"{kind}.engine", profile, capabilities, options
                )
            listen(Event("build decode", len(KINDS), len(KINDS)))
        made |= {
            "target": "tensorrt",
            "flavour": name,
            "tensorrt": trt.__version__,
            "compute_capabilities": list(capabilities) if name == "rtx" else "the GPU that it was built on",
            "profiles": {"batch": profile.batch, "rows": profile.rows, "slots": slots},
            "options": options.asked,
            # Operators that are not listed here are their bodies of built-in layers.
            "plugins": write_kernels(aside, uses, capabilities if name == "rtx" else [_here()]),
            "layers": layers,
            "files": {file.name: sha256(file) for file in sorted(aside.iterdir())},
        }
        write_json(aside / MANIFEST, made)
        replace(aside, artifact / FOLDER)
    return made


def _register(trt: ModuleType, flavour: str) -> list[Use]:
    """The plugins of a flavour; the list fills with what networks use."""
    if flavour == "rtx":
        from sparsec.plugins import tensorrt_rtx

        return tensorrt_rtx.register(trt)
    from sparsec.plugins import tensorrt

    return tensorrt.register()


def _here() -> int:
    """The compute capability of the GPU that engines are built on."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def write_kernels(folder: Path, uses: Sequence[Use], capabilities: Sequence[int]) -> list[dict[str, Any]]:
    """The PTX of every plugin's first tactic, beside the engines, for who wants to see what they hold or launch.

    Returns:
        of each use the operator, its attributes, and by compute capability file and digest.
    """
    found = []
    for number, use in enumerate(uses):
        operator, attributes = OPERATORS[use.operator], dict(use.attributes)
        one: dict[str, Any] = {
            "name": f"{NAMESPACE}::{use.operator}", "version": "1", "type": use.floats, "attributes": attributes,
            "shapes": use.shapes, "ptx": {},
        }  # fmt: skip
        for capability in capabilities:
            kernel = compiled(operator, use.floats or "float32", use.shapes, attributes, capability)
            file = f"{use.operator}-{number}.sm{capability}.ptx"
            (folder / file).write_text(kernel.ptx, encoding="utf-8")
            one["ptx"][str(capability)] = {"file": file, "sha256": kernel.digest}
        found.append(one)
    return found


def build(
    trt: ModuleType,
    flavour: str,
    graph: Path,
    engine: Path,
    profile: Profile,
    capabilities: Sequence[int],
    options: Options,
) -> dict[str, int]:
    """One engine.

    Args:
        trt: the library; ``flavour``: which one.
        graph: an ONNX file, its weights beside it.
        engine: the file to write.

    Returns:
        how many layers of each kind the network has, before the library fuses them.

    Raises:
        ArtifactError: the library refuses the graph, with its reason.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if (ahead := getattr(trt.NetworkDefinitionCreationFlag, "PREFER_AOT_PYTHON_PLUGINS", None)) is not None:
        flags |= 1 << int(ahead)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        first = parser.get_error(0)
        raise ArtifactError(
            f"TensorRT {trt.__version__} cannot read {first.node_operator()} in {graph.name} "
            f"({' '.join(first.desc().split())[:200]}): use --to onnx, or another release of it"
        )
    config = builder.create_builder_config()
    if flavour == "rtx":
        config.num_compute_capabilities = len(capabilities)
        for place, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), place)
    times = options.apply(trt, config)
    sizes = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        value = network.get_input(number)
        free = [place for place, size in enumerate(value.shape) if size == -1]
        shapes = []
        for batch, rows in zip(profile.batch, profile.rows, strict=True):
            shape = list(value.shape)
            for place in free:
                shape[place] = batch if place == 0 else rows
            shapes.append(shape)
        sizes.set_shape(value.name, *shapes)
    config.add_optimization_profile(sizes)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise ArtifactError(
            f"TensorRT {trt.__version__} cannot build {graph.name} ({log.last or 'no reason given'}): "
            "use --to onnx, or other sizes"
        )
    with engine.open("wb") as file:
        file.write(made)
    if times is not None and options.timing_cache is not None:
        options.timing_cache.write_bytes(memoryview(times.serialize()))
    kinds = (network.get_layer(number).type.name for number in range(network.num_layers))
    return dict(sorted(Counter(kinds).items()))


def _log(trt: ModuleType) -> Any:
    """A logger that prints nothing and keeps the last error."""

    class Log(trt.ILogger):  # type: ignore[name-defined]
        last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = " ".join(message.split())[:240]

    return Log()
