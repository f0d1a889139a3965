"""``onnx/`` of an artifact: traced, checked, written aside and put in place."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sparsec
from sparsec.errors import ArtifactError, UsageError
from sparsec.events import Event, Listener, silent
from sparsec.export.artifact import check_room, write_json
from sparsec.export.aside import filling, locked, sync, sync_folder
from sparsec.export.onnx.features import check_exportable
from sparsec.export.onnx.files import KINDS, Kind
from sparsec.export.onnx.routing import MASKED
from sparsec.layout import MANIFEST, read_json, read_plan, sha256
from sparsec.plugins.load import load
from sparsec.plugins.onnx_runner import FOLDER
from sparsec.plugins.onnx_runner import MANIFEST as EXPORT

DTYPES = ("float32", "float16", "bfloat16")
PACKAGES = ("onnx", "onnxscript")


def check_packages() -> None:
    """What exporting needs is installed.

    Raises:
        UsageError: something is missing.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"exporting to ONNX needs the package {name}: pip install 'sparsec[onnx]'")


def export_onnx(artifact: Path, *, dtype: str = "float32", listen: Listener = silent) -> dict[str, Any]:
    """Write ``<artifact>/onnx``; one that is there is replaced when the new one is whole.

    Args:
        artifact: a folder of sparsec compile.
        dtype: of weights and stores: ``float32``, ``float16``, or ``bfloat16``, which ONNX Runtime does not run on a
            CPU.

    Returns:
        what ``export.json`` says.

    Raises:
        UsageError: an unknown dtype, or a package is missing.
        PlanError: the graphs cannot mean the plan.
        ArtifactError: no artifact, a model that cannot be traced, or no room.
    """
    if dtype not in DTYPES:
        raise UsageError(f"ONNX graphs are exported in {', '.join(DTYPES)}, not {dtype!r}: choose one")
    check_packages()
    plan = read_plan(artifact)
    check_exportable(plan)
    model, _ = load(artifact, dtype=dtype)
    check_exportable(plan, model.config)
    check_room(artifact, sum(weight.nbytes for weight in model.parameters()))
    with filling(artifact, FOLDER) as aside:
        made = write_graphs(model, aside, source=source_of(artifact), dtype=dtype, listen=listen)
        replace(aside, artifact / FOLDER)
    return made


def write_graphs(
    model: Any,
    folder: Path,
    *,
    source: Mapping[str, Any],
    dtype: str,
    slots: int | None = None,
    plugins: bool = False,
    kinds: Sequence[Kind] = KINDS,
    listen: Listener = silent,
) -> dict[str, Any]:
    """The graphs, their weights and ``export.json`` of a model that runs a plan, into an empty folder.

    ``slots``: as in :func:`~sparsec.export.onnx.graph.trace`; ``plugins``, where there are slots: decode attention is
    divided into the operators that are plugins of TensorRT; without, a decode row reads all keys under masks.
    """
    from sparsec.export.onnx import dsa, files, graph
    from sparsec.export.onnx.functions import DOMAIN, IR, OPSET, VERSION

    plan = model.sparsec_plan
    facts = {
        "producer": f"sparsec {sparsec.__version__}",
        "plan_digest": plan.digest,
        "base_model": str(source.get("base_model") or source.get("spec") or ""),
        "base_revision": str(source.get("revision") or ""),
        "operators": f"{DOMAIN} {VERSION}",
    }
    signature: dict[str, Any] = {}
    operators: dict[str, list[str]] = {}
    aliased: dict[str, dict[str, str]] = {}
    with (folder / files.WEIGHTS).open("wb") as file, quiet():
        weights = files.Weights(file)
        for done, kind in enumerate(kinds):
            listen(Event(f"trace {kind}", done, len(kinds)))
            try:
                program = graph.trace(model, kind, slots, masked=slots is not None and not plugins)
            except Exception as error:  # whatever torch.export has to say
                reason = " ".join(str(error.__cause__ or error).split())[:200]
                raise ArtifactError(
                    f"{plan.model.model_type} cannot be traced with torch {torch.__version__} ({reason}): "
                    "run it in PyTorch"
                ) from error
            proto = files.write_graph(
                program,
                folder / f"{kind}.onnx",
                weights,
                {**facts, "graph": kind},
                slots if plugins and kind == "decode" else None,
            )
            signature[kind] = {side: _values(getattr(proto.graph, side)) for side in ("input", "output")}
            aliased[kind] = files.aliased(proto)
            operators[kind] = sorted(function.name for function in proto.functions)
            del program, proto
            files.check(folder / f"{kind}.onnx")
    listen(Event(f"trace {kinds[-1]}", len(kinds), len(kinds)))
    eos = model.generation_config.eos_token_id
    made = {
        **facts,
        "target": "onnx",
        "opset": OPSET,
        "ir_version": IR,
        "dtype": dtype,
        "eos": [] if eos is None else [eos] if isinstance(eos, int) else list(eos),
        "suppress": _ranges(model.generation_config.suppress_tokens or ()),
        **({"routing": MASKED} if plan.routing is not None else {}),
        **({"choice": note} if plan.dsa is not None and (note := dsa.masked(plan.dsa)) else {}),
        "operators_used": operators,
        "signature": signature,
        "aliased": aliased,
        "versions": {name: version(name) for name in ("torch", "transformers", *PACKAGES)},
        "files": {file.name: sha256(file) for file in sorted(folder.iterdir())},
    }
    write_json(folder / EXPORT, made)
    return made


def replace(aside: Path, place: Path) -> None:
    """Push an export to the disk and put it in place of an older one.

    Raises:
        ArtifactError: what is there is no export of ours.
    """
    if place.exists() and not (place / EXPORT).is_file():
        raise ArtifactError(f"{place} is no export of sparsec: move it away")
    sync(aside)
    with locked(place.parent):
        if place.exists():
            old = aside.with_name(f"{aside.name}-old")
            place.rename(old)
            aside.rename(place)
            shutil.rmtree(old)
        else:
            aside.rename(place)
        sync_folder(place.parent)


def _ranges(tokens: Iterable[int]) -> list[list[int]]:
    """Token ids as [first, behind the last] of each run."""
    found: list[list[int]] = []
    for token in sorted(set(tokens)):
        if found and found[-1][1] == token:
            found[-1][1] += 1
        else:
            found.append([token, token + 1])
    return found


def _values(values: Any) -> list[dict[str, Any]]:
    """Names, shapes and ONNX element types of a graph's inputs or outputs."""
    from onnx import TensorProto

    return [
        {
            "name": value.name,
            "shape": [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            "type": TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
        }
        for value in values
    ]


def source_of(artifact: Path) -> Mapping[str, Any]:
    """Where the base weights came from, as the compile wrote it down."""
    made = read_json(artifact / MANIFEST) if (artifact / MANIFEST).is_file() else {}
    source: Mapping[str, Any] = made.get("source") or {}
    return source


@contextmanager
def quiet() -> Iterator[None]:
    """PyTorch's exporter prints and warns; whatever matters is raised."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
