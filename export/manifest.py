"""manifest.json as data that nobody has to trust: its fields, its seal, and names that stay inside the artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsec.errors import ArtifactError
from sparsec.layout import MANIFEST, read_json
from sparsec.plan import first_error

SEAL = "digest"
MOST_FILES = 100_000
LONGEST_NAME = 1024


class Made(BaseModel):
    """Where the artifact came from. Later releases may know more, so other keys are let through."""

    model_config = ConfigDict(frozen=True)

    spec: str
    kind: str
    revision: str | None = None
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    license: str | None = None
    base_model: str | None = None
    language: tuple[str, ...] = ()


class Manifest(BaseModel):
    """What everything that reads a manifest relies on."""

    model_config = ConfigDict(frozen=True)

    producer: str = Field(pattern=r"^sparsec ")
    source: Made
    recipe: dict[str, Any]
    calibration: str
    weights: Literal["trained", "unchanged"]
    device: str
    dtype: str
    versions: dict[str, str]
    files: dict[str, str] = Field(max_length=MOST_FILES)
    digest: str | None = None


def as_written(data: Any) -> str:
    """The text of a JSON file of ours."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """With the sha256 of all else: a manifest names no hash of itself otherwise."""
    body = {key: value for key, value in data.items() if key != SEAL}
    return {**body, SEAL: hashlib.sha256(as_written(body).encode("utf-8", "surrogatepass")).hexdigest()}


def manifest_data(path: Path) -> dict[str, Any]:
    """manifest.json as data that has every field; whether it was changed is another question.

    Raises:
        ArtifactError: it is missing, or none of ours.
    """
    data = read_json(path / MANIFEST)
    made = _model(path / MANIFEST, data)
    return {**data, "source": made.source.model_dump()}


def read_manifest(path: Path) -> Manifest:
    """An artifact's manifest, checked: fields, seal, and file names.

    Raises:
        ArtifactError: it is missing, another one than was written, or names something outside of the artifact.
    """
    file = path / MANIFEST
    if file.is_symlink():
        raise ArtifactError(f"{file} is a link: copy the artifact itself")
    data = read_json(file)
    made = _model(file, data)
    for name in made.files:
        outside = escapes(name)
        if outside is not None:
            raise ArtifactError(f"{file} names {name[:80]!r}, which {outside}: do not use this artifact")
    # The file as it was written, down to the last blank: nothing in it can change unnoticed.
    if file.read_bytes() != as_written(sealed(data)).encode("utf-8", "surrogatepass"):
        raise ArtifactError(f"{file} was changed after it was written: copy or compile the artifact again")
    return made


def _model(file: Path, data: Any) -> Manifest:
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        said = first_error(error)
        raise ArtifactError(f"{file} is no manifest ({said}): copy or compile the artifact again") from None


def escapes(name: str) -> str | None:
    """Why a name is none of a file in an artifact; None where it is one."""
    if not name or len(name) > LONGEST_NAME:
        return "is empty or too long"
    if not name.isprintable() or "\\" in name or any(0xD800 <= ord(letter) <= 0xDFFF for letter in name):
        return "has signs that no file name of ours has"
    pure = PurePosixPath(name)
    if pure.is_absolute() or ":" in name.partition("/")[0]:
        return "is no name relative to the artifact"
    if not pure.parts or ".." in pure.parts or pure.as_posix() != name:
        return "leaves the artifact or is written in an odd way"
    if name == MANIFEST:
        return "is the manifest itself"
    return None
