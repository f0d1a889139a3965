"""Reads and writes the files of a dialect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsec.errors import ArtifactError
from sparsec.export.aside import filling
from sparsec.export.manifest import as_written
from sparsec.layout import read_json

LARGEST = 1 << 26  # bytes of a text
ENDINGS = (".json", ".tsv")


def read_files(path: Path) -> dict[str, Any]:
    """A folder's or one file's contents by name: JSON data, or text.

    Raises:
        ArtifactError: a file is damaged, or nothing is there.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in ENDINGS and file.is_file())
    elif path.is_file():
        files = [path]
    else:
        raise ArtifactError(f"there is no file or folder {path}: check the spelling")
    return {file.name: _read(file) for file in files if file.stat().st_size <= LARGEST}


def write_files(out: Path, files: Mapping[str, Any]) -> None:
    """A new folder with these files, whole or not at all.

    Raises:
        ArtifactError: the name is taken, or the disk is full.
    """
    out = out.absolute()
    if out.exists():
        raise ArtifactError(f"{out} exists: choose another folder")
    with filling(out.parent, out.name) as aside:
        for name, data in files.items():
            (aside / name).write_text(data if isinstance(data, str) else as_written(data), encoding="utf-8")
        aside.rename(out)


def _read(file: Path) -> Any:
    if file.suffix == ".json":
        return read_json(file)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {file} ({error}): copy it again") from None
