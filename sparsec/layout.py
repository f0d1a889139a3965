"""The artifact's files and how to read what is in them. Reading needs no compiler, no click and no calibration code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sparsec.errors import ArtifactError, PlanError
from sparsec.plan import Plan

CONFIG = "config.json"
PLAN_KEY = "sparsec_config"  # in config.json; 'sparse_attention_config' means four other things elsewhere
TENSORS = "sparsec.safetensors"
MANIFEST = "manifest.json"
MEASUREMENTS = "measurements.json"
GOLDEN = "golden.json"
REPORT = "report.html"
CARD = "README.md"
LARGEST_JSON = 1 << 28  # bytes


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ArtifactError: missing, not JSON, or larger than any of an artifact's.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ArtifactError(f"{path} has more than {LARGEST_JSON >> 20} MiB: copy or compile it again")
        data = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(data, ensure_ascii=False).encode()  # lone surrogates cannot be shown
        return data
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: is {path.parent} an artifact of sparsec compile?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"cannot read {path} ({error}): copy or compile it again") from None


def is_artifact(path: Path) -> bool:
    """Did sparsec write this folder? Its manifest says so; a half-written one has none."""
    try:
        return str(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["producer"]).startswith("sparsec ")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read_plan(path: Path) -> Plan:
    """The plan in an artifact's config.json.

    Raises:
        ArtifactError: no such folder, no config, or a plain model's config.
        PlanError: the plan is not valid.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path} is no folder: name an artifact that sparsec compile wrote")
    config = read_json(path / CONFIG)
    if not isinstance(config, dict) or PLAN_KEY not in config:
        raise ArtifactError(f"{path} holds a plain model without a plan: compile it first")
    try:
        return Plan.parse(config[PLAN_KEY])
    except PlanError as error:
        raise PlanError(f"{path / CONFIG}: {error}; copy or compile the artifact again") from None


def check_tensors(path: Path) -> None:
    """The plan's tensors are those that the manifest names; a folder without a manifest says nothing about them.

    Raises:
        ArtifactError: the manifest cannot be read, or the file is missing or another one.
    """
    if not (path / MANIFEST).is_file():
        return
    made = read_json(path / MANIFEST)
    files = made.get("files") if isinstance(made, dict) else None
    if not isinstance(files, dict) or TENSORS not in files:
        return
    if not (path / TENSORS).is_file():
        raise ArtifactError(f"{path} has a plan with indexers, but no {TENSORS}: copy the whole artifact")
    if sha256(path / TENSORS) != files[TENSORS]:
        raise ArtifactError(f"{path / TENSORS} is not what {MANIFEST} says, it is damaged: copy or compile it again")


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
