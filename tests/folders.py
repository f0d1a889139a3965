"""What is in a folder, for tests that look whether anything was lost or left; and folders of text."""

from __future__ import annotations

import hashlib
from pathlib import Path


def contents(folder: Path) -> dict[str, str]:
    """sha256 by name of every file."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def write_texts(folder: Path, *texts: str | bytes) -> Path:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder
