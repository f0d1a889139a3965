"""Stored stage results: a killed compile continues, a changed input recomputes, and nothing else.

A stage's fingerprint is a sha256 over everything that its result depends on. Results are written aside and renamed, so
what is there is whole.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

import sparsec
from sparsec.errors import ArtifactError
from sparsec.export.aside import filling, shared_scratch, sync, sync_folder
from sparsec.layout import read_json
from sparsec.plugins.auto import read_tensors, write_tensors

Stored = tuple[Any, dict[str, Tensor]]  # JSON data and tensors of a stage


class Stages:
    """Results by fingerprint below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, fingerprint: str) -> Stored | None:
        """JSON data and tensors of a stage, or None where it was not stored or its files are damaged."""
        place = self.folder / fingerprint
        if not place.is_dir():
            return None
        try:
            return read_json(place / "result.json"), read_tensors(place / "tensors.safetensors")
        except ArtifactError:
            shutil.rmtree(place)  # a failing disk: it is computed again
            return None

    def kept(self, fingerprint: str, make: Callable[[], Stored]) -> Stored:
        """What is stored, or what ``make`` gives, which then is."""
        found = self.load(fingerprint)
        if found is None:
            found = make()
            self.store(fingerprint, *found)
        return found

    def scratch(self, fingerprint: str) -> AbstractContextManager[Path]:
        """A folder for what a stage wants to find again if it is stopped; a second compile of the stage waits."""
        return shared_scratch(self.place(fingerprint))

    def place(self, fingerprint: str) -> Path:
        """Where that folder is."""
        return self.folder / f"{fingerprint}.unfinished"

    def store(self, fingerprint: str, data: Any, tensors: Mapping[str, Tensor]) -> None:
        """Keep a result. Two writers of one fingerprint have the same result, so the first may win."""
        with filling(self.folder, "stage") as aside:
            (aside / "result.json").write_text(json.dumps(data), encoding="utf-8")
            write_tensors(aside / "tensors.safetensors", tensors)
            sync(aside)
            try:
                aside.rename(self.folder / fingerprint)
            except OSError:
                if not (self.folder / fingerprint).is_dir():
                    raise
            sync_folder(self.folder)


def fingerprint(**inputs: Any) -> str:
    """sha256 over named inputs (JSON data)."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def code_digest(*owners: object) -> str:
    """sha256 over the sources that decide results: passes, calibration, runtime, and what defines ``owners``."""
    root = {Path(module.__file__ or "").parent for module in _result_makers()}
    files = {file for folder in root for file in folder.rglob("*.py")}
    files |= {Path(inspect.getfile(type(owner))) for owner in owners}
    digest = hashlib.sha256(sparsec.__version__.encode())
    for file in sorted(files, key=lambda file: (file.parent.name, file.name)):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _result_makers() -> list[Any]:
    import sparsec.calibrate
    import sparsec.passes
    import sparsec.plugins

    return [sparsec.passes, sparsec.calibrate, sparsec.plugins]
