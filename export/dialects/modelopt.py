"""Model Optimizer's ``sparse_attention_config``: ``{config_groups, producer}``. Three others use the same key.

Its thresholds decide while they run what a kernel skips: no head split and no sharing is in it, so it is only named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.export.dialects.foreign import Foreign
from sparsec.plan import ModelShape

KEY = "sparse_attention_config"


def recognise(files: Mapping[str, Any]) -> bool:
    """In config.json, or a file of its own; with groups, which the others do not have."""
    return _data(files) is not None


def decode(files: Mapping[str, Any], shape: ModelShape | None = None) -> Foreign:
    """What it says, in a line."""
    data = _data(files) or {}
    groups = [group for group in data["config_groups"].values() if isinstance(group, dict)]
    said = "; ".join(
        f"{group.get('algorithm', 'unknown')} on {', '.join(map(str, group.get('targets') or ['all']))}"[:120]
        for group in groups
    )
    made = data.get("producer")
    by = f", by {made.get('name')} {made.get('version')}"[:80] if isinstance(made, dict) else ""
    return Foreign("modelopt", f"{said or 'no groups'}{by}")


def _data(files: Mapping[str, Any]) -> dict[str, Any] | None:
    for data in files.values():
        inner = data.get(KEY, data) if isinstance(data, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get("config_groups"), dict):
            return inner
    return None
