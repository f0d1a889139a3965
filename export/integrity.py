"""Is an artifact whole, and does all of it fit together? Hashes, names, plan against tensors and foreign keys.

Nothing of the model is loaded, and nothing is run: files are hashed, headers and JSON are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsec.errors import ArtifactError, PlanError, SparsecError
from sparsec.export import dsa
from sparsec.export.headers import read_header
from sparsec.export.manifest import Manifest, read_manifest
from sparsec.layout import CONFIG, MANIFEST, MEASUREMENTS, PLAN_KEY, TENSORS, read_json, read_plan, sha256
from sparsec.plan import Plan
from sparsec.plugins.merged_writing import MERGES
from sparsec.plugins.onnx_runner import MANIFEST as EXPORT
from sparsec.plugins.runtime import tensor_names

FOREIGN = (".gitattributes",)  # the Hub's own
DOWNLOADS = ".cache/huggingface/"  # of its client, beside what it downloaded
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CODE = (".py", ".so", ".pyc")
EXPORTS = ("onnx", "tensorrt")  # folders of sparsec export
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    good: bool
    said: str


def check(path: Path) -> list[Finding]:
    """Everything, in order. What cannot be looked at because something before it is broken is left out.

    Raises:
        ArtifactError: there is no such folder.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path} is no folder: name an artifact that sparsec compile wrote")
    found: list[Finding] = []
    made = _looked(found, "manifest", lambda: read_manifest(path), lambda m: f"{len(m.files)} files, sealed")
    if made is not None:
        _looked(found, "files", lambda: check_files(path, made), lambda n: f"{n:,} bytes have the hashes they had")
    plan = _looked(found, "plan", lambda: _plan(path), lambda p: f"{p.digest[:16]}, of format {p.format}")
    if plan is not None:
        _looked(found, "tensors", lambda: _tensors(path, plan), lambda n: f"{n} tensors as the plan needs them")
        _looked(found, "other engines' keys", lambda: _keys(path, plan), lambda words: words)
        _looked(found, "exports", lambda: _exports(path, plan), lambda words: words)
        _looked(found, "measurements", lambda: _measurements(path, plan), lambda words: words)
    return found


def require(path: Path) -> None:
    """The artifact is whole.

    Raises:
        ArtifactError: naming the first thing that is not.
    """
    for finding in check(path):
        if not finding.good:
            raise ArtifactError(finding.said)


def _looked(found: list[Finding], name: str, look: Callable[[], Any], words: Callable[[Any], str]) -> Any:
    try:
        result = look()
    except SparsecError as error:
        found.append(Finding(name, False, str(error)))
        return None
    found.append(Finding(name, True, words(result)))
    return result


def check_files(path: Path, made: Manifest) -> int:
    """Every file is the one that was written, and there is no other; the bytes of all of them.

    Raises:
        ArtifactError: the first that is missing, another one, a link, or not named.
    """
    total, there = 0, set()
    exported = [path / name for name in EXPORTS if (path / name / EXPORT).is_file()]
    expected = {**made.files}
    for folder in exported:  # made later, so each has its own list
        for name, digest in _exported(folder).items():
            expected[(folder / name).relative_to(path).as_posix()] = digest
    for file in _below(path):
        name = file.relative_to(path).as_posix()
        if file.is_symlink():
            raise ArtifactError(f"{file} is a link, an artifact has none: copy the file itself")
        if name in (MANIFEST, *FOREIGN) or name.startswith(DOWNLOADS):
            continue
        if file.parent in exported and file.name == EXPORT:
            continue
        if name not in expected:
            raise ArtifactError(f"{file} is not in {MANIFEST}: take it out, or compile the artifact again")
        if not file.is_file():
            raise ArtifactError(f"{file} is no file: copy the artifact again")
        if file.suffix.lower() in (*PICKLES, *CODE):
            raise ArtifactError(f"{file} can hold code, an artifact is data: do not use it")
        there.add(name)
    for name, digest in expected.items():
        if name not in there:
            raise ArtifactError(f"{path / name} is missing: copy the whole artifact")
        try:
            if sha256(path / name) != digest:
                raise ArtifactError(f"{path / name} is not what {MANIFEST} says: copy or compile it again")
        except OSError as error:
            raise ArtifactError(f"{path / name} cannot be read ({error.strerror}): check its permissions") from None
        total += (path / name).stat().st_size
    return total


def _exported(folder: Path) -> dict[str, str]:
    """Hashes by name, as ``sparsec export`` wrote them.

    Raises:
        ArtifactError: its list cannot be read.
    """
    made = read_json(folder / EXPORT)
    files = made.get("files") if isinstance(made, dict) else None
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise ArtifactError(f"{folder / EXPORT} names no files: export again")
    return {str(name): str(digest) for name, digest in files.items()}


def _below(path: Path) -> Iterator[Path]:
    """Files and links, links not followed, sorted."""
    for folder, folders, files in os.walk(path, followlinks=False):
        here = Path(folder)
        yield from sorted(here / name for name in [*files, *(n for n in folders if (here / n).is_symlink())])
        folders[:] = sorted(n for n in folders if not (here / n).is_symlink())


def _plan(path: Path) -> Plan:
    """The plan, of the model that config.json describes."""
    plan = read_plan(path)
    config = read_json(path / CONFIG)
    shape = {"num_hidden_layers": plan.model.layers, "num_attention_heads": plan.model.heads}
    shape["num_key_value_heads"] = plan.model.kv_heads
    for key, value in shape.items():
        if config.get(key, value) not in (value, None):
            raise PlanError(f"{path / CONFIG} has {key} {config[key]!r}, its plan is for {value}: compile again")
    if config.get("model_type") != plan.model.model_type:
        raise PlanError(f"{path / CONFIG} is a {config.get('model_type')!r}, its plan is for {plan.model.model_type!r}")
    return plan


def _tensors(path: Path, plan: Plan) -> int:
    """The plan's tensors and no others, of the right shapes; base weights whose headers are whole."""
    needed = tensor_names(plan)
    if not needed and (path / TENSORS).exists():
        raise PlanError(f"{path / TENSORS} is there, but the plan needs no tensors: compile again")
    found = read_header(path / TENSORS) if needed else {}
    for name, shape in needed.items():
        if name not in found:
            raise PlanError(f"{path / TENSORS} lacks {name}, which the plan needs: compile again")
        if found[name].shape != shape:
            raise PlanError(f"{path / TENSORS}: {name} has shape {found[name].shape}, the plan needs {shape}")
        if name != MERGES and not found[name].dtype.startswith(("F", "BF")):
            raise PlanError(f"{path / TENSORS}: {name} is of type {found[name].dtype}, not floating point")
    for name in found:
        if name not in needed:
            raise PlanError(f"{path / TENSORS} has {name[:80]!r}, for which the plan has no place: compile again")
    for file in sorted(path.glob("model*.safetensors")):
        read_header(file)
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        shards = index.get("weight_map", {}).values() if isinstance(index, dict) else ()
        for shard in {str(name) for name in shards}:
            if Path(shard).name != shard or not (path / shard).is_file():
                raise ArtifactError(f"{path / INDEX} names {shard[:80]!r}, which is no file beside it: copy it again")
    return len(needed)


def _keys(path: Path, plan: Plan) -> str:
    """What other engines read says the same as the plan."""
    config = {key: value for key, value in read_json(path / CONFIG).items() if key != PLAN_KEY}
    expected = dsa.settings(plan, config)
    for key in sorted(expected.keys() | config.keys()):
        if config.get(key) != expected.get(key):
            raise PlanError(
                f"{path / CONFIG} has {key} {str(config.get(key))[:80]}, the plan says {str(expected.get(key))[:80]}: "
                "compile again"
            )
    return "the same as the plan" if plan.dsa is not None else "none are needed"


def _exports(path: Path, plan: Plan) -> str:
    """Graphs and engines are of this plan."""
    there = [name for name in EXPORTS if (path / name / EXPORT).is_file()]
    for name in there:
        made = read_json(path / name / EXPORT)
        digest = made.get("plan_digest") if isinstance(made, dict) else None
        if digest != plan.digest:
            raise PlanError(f"{path / name} was exported from another plan ({str(digest)[:16]}): export it again")
    return f"{', '.join(there)}: of the plan" if there else "none were made"


def _measurements(path: Path, plan: Plan) -> str:
    """The passes that were measured are those of the plan, and the gate passed."""
    data = read_json(path / MEASUREMENTS)
    try:
        names = [each["name"] for each in data["passes"]]
        passed, failures = data["gate"]["passed"], data["gate"]["failures"]
    except (KeyError, TypeError):
        raise ArtifactError(f"{path / MEASUREMENTS} is not what sparsec compile writes: compile again") from None
    if names != [each.name for each in plan.passes]:
        raise ArtifactError(f"{path / MEASUREMENTS} is about other passes than the plan's: compile again")
    if passed is not True:
        said = "; ".join(map(str, failures))[:200]
        raise ArtifactError(f"the artifact failed its gate when it was compiled ({said}): do not deploy it")
    return "of the plan's passes, the gate passed"
