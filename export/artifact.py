"""Writes an artifact aside, pushes it to the disk and renames it into place: whole, or not at all.

config.json, generation_config.json, tokenizer files   the model's own; config.json gains "sparsec_config"
model*.safetensors                                      the base weights, unchanged
sparsec.safetensors                                     what the plan added
manifest.json                                           sha256 of every other file, and how it was made
measurements.json, report.html, README.md               what was measured
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sparsec.errors import ArtifactError
from sparsec.layout import CONFIG, MANIFEST, PLAN_KEY, TENSORS, is_artifact, read_json, sha256
from sparsec.plan import Plan

SPARE = 64 << 20  # bytes left for reports and file-system overhead


@contextmanager
def writing(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends without an error.

    An artifact of ours under that name is replaced, another folder only with ``force``, and then it is kept as
    ``<out>.before-sparsec``.

    Raises:
        ArtifactError: the name is taken, the folder cannot be written, or the disk is full.
    """
    out = out.absolute()
    check_free(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{out.name}.writing-*"):
            if not _alive(stale.name.rpartition("-")[2]):
                shutil.rmtree(stale)
        replaced = out.parent / f".{out.name}.replaced"
        if replaced.exists() and not out.exists():
            replaced.rename(out)  # a writer was killed between its two renames
        aside = out.parent / f".{out.name}.writing-{os.getpid()}"
        aside.mkdir()
    except OSError as error:
        raise ArtifactError(f"cannot write beside {out} ({error.strerror}): choose another output folder") from None
    try:
        yield aside
        _sync(aside)
        if out.exists():
            old = replaced if is_artifact(out) else _kept_name(out)
            if old == replaced and replaced.exists():
                shutil.rmtree(replaced)
            out.rename(old)
        aside.rename(out)
        if replaced.exists():
            shutil.rmtree(replaced)
    except OSError as error:
        if error.errno in (28, 122):
            raise ArtifactError(
                f"the disk with {out.parent} is full: make room and run again, finished stages stay"
            ) from None
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_free(out: Path, *, force: bool) -> None:
    """The name can be used.

    Raises:
        ArtifactError: it is a file, or a folder that sparsec did not write, and force is not given.
    """
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file: choose another output folder")
    if out.is_dir() and any(out.iterdir()) and not is_artifact(out) and not force:
        raise ArtifactError(f"{out} exists and is no artifact of ours: choose another name, or --force moves it aside")


def check_room(folder: Path, needed: int) -> None:
    """The disk holds ``needed`` bytes more.

    Raises:
        ArtifactError: it does not.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise ArtifactError(
            f"the artifact needs {(needed + SPARE) >> 20} MiB, the disk with {folder} has {free >> 20} MiB free: make room"
        )


def write_model(aside: Path, source: Path, weights: Sequence[Path], plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """The model's files with the plan: all that the runtime needs.

    Args:
        aside: the folder to fill.
        source: the dense checkpoint's folder.
        weights: its safetensors files.
        plan: goes into config.json.
        tensors: the plan's, by artifact name.
    """
    names = {file.name for file in weights}
    for file in sorted(source.iterdir()):
        if not file.is_file() or (file.suffix == ".safetensors" and file.name not in names):
            continue
        if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and file.name not in (
            CONFIG,
            MANIFEST,
        ):
            shutil.copyfile(file, aside / file.name)
    config = read_json(source / CONFIG)
    if PLAN_KEY in config:
        raise ArtifactError(f"{source} already has a plan: compile the dense checkpoint it came from")
    write_json(aside / CONFIG, {**config, PLAN_KEY: plan.to_json()})
    if tensors:
        save_file({name: t.contiguous() for name, t in tensors.items()}, aside / TENSORS, metadata={"format": "pt"})


def write_manifest(aside: Path, made: Mapping[str, Any]) -> None:
    """manifest.json over all files there are: write it last.

    Args:
        aside: the folder.
        made: how the artifact was made (source, recipe, calibration, versions).
    """
    files = {file.name: sha256(file) for file in sorted(aside.iterdir()) if file.name != MANIFEST}
    write_json(aside / MANIFEST, {**made, "files": files})


def write_json(path: Path, data: Any) -> None:
    """Readable, stable JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _kept_name(out: Path) -> Path:
    number, kept = 1, out.with_name(f"{out.name}.before-sparsec")
    while kept.exists():
        number += 1
        kept = out.with_name(f"{out.name}.before-sparsec-{number}")
    return kept


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
