"""JSON that ``sparsec eval`` and ``sparsec bench`` wrote, read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from sparsec.errors import ArtifactError
from sparsec.layout import read_json
from sparsec.plan import Plan

COMMANDS = {"cells": "eval", "rows": "bench"}


def read_result(path: Path, key: Literal["cells", "rows"], plan: Plan) -> dict[str, Any]:
    """A result about this plan; ``key`` is what its figures stand under.

    Raises:
        ArtifactError: it cannot be read, is none of that command, or is about another plan.
    """
    command, data = COMMANDS[key], read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get(key), list) or not data[key]:
        raise ArtifactError(f"{path} is no result of sparsec {command}: write one with sparsec {command} -o")
    plans = {data.get("plan"), *(each.get("plan") for each in (data.get("artifacts") or {}).values())}
    if plan.digest not in plans:
        raise ArtifactError(f"{path} is about another plan: run sparsec {command} on this artifact")
    return data
