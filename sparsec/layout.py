"""The artifact's files and how to read what is in them. Reading needs no compiler, no click and no calibration code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sparsec.errors import ArtifactError
from sparsec.plan import Plan

CONFIG = "config.json"
PLAN_KEY = "sparsec_config"  # in config.json; 'sparse_attention_config' means four other things elsewhere
TENSORS = "sparsec.safetensors"
MANIFEST = "manifest.json"
MEASUREMENTS = "measurements.json"
REPORT = "report.html"
CARD = "README.md"


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ArtifactError: missing, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: is {path.parent} an artifact of sparsec compile?") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from None


def is_artifact(path: Path) -> bool:
    """Did sparsec write this folder? Its manifest says so; a half-written one has none."""
    try:
        return str(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["producer"]).startswith("sparsec ")
    except (OSError, ValueError, KeyError, TypeError):
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
    return Plan.parse(config[PLAN_KEY])


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
