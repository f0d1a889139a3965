"""DuoAttention's patterns: full_attention_heads.tsv, a row a layer and a column a KV head, 1 = full; and config.json.

It splits KV heads. A KV head with one retrieval head among its query heads is full for all of them: what is written
keeps more than the plan, never less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparsec.errors import ArtifactError
from sparsec.export.dialects.foreign import Foreign, number, split_of
from sparsec.plan import ModelShape, Plan

HEADS, CONFIG = "full_attention_heads.tsv", "config.json"
FULL_FROM = 0.5  # trained gates lie between 0 and 1


def encode(plan: Plan) -> dict[str, Any]:
    """Both files."""
    group, rows = plan.model.group, []
    for heads in split_of(plan, "duo"):
        rows.append([float(any(heads[at : at + group])) for at in range(0, len(heads), group)])
    assert plan.window is not None
    return {
        HEADS: "".join("\t".join(f"{value:.1f}" for value in row) + "\n" for row in rows),
        CONFIG: {"sink_size": plan.window.sinks, "recent_size": plan.window.size},
    }


def recognise(files: Mapping[str, Any]) -> bool:
    """The table is there."""
    return isinstance(files.get(HEADS), str)


def decode(files: Mapping[str, Any], shape: ModelShape | None = None) -> Foreign:
    """What it says; query heads where the model's shape is known.

    Raises:
        ArtifactError: it is damaged.
    """
    try:
        table = [[float(cell) for cell in line.split()] for line in files[HEADS].splitlines() if line.strip()]
    except ValueError:
        table = []
    if not table or len({len(row) for row in table}) != 1 or not all(math.isfinite(v) for row in table for v in row):
        raise ArtifactError(f"{HEADS} is no table of numbers: these files are damaged")
    config = files.get(CONFIG)
    config = config if isinstance(config, dict) else {}
    kv_heads = tuple(tuple(int(value >= FULL_FROM) for value in row) for row in table)
    group = shape.group if shape is not None else None
    return Foreign(
        "duo",
        f"{sum(map(sum, kv_heads))} of {sum(map(len, kv_heads))} KV heads keep every token",
        heads=tuple(tuple(v for v in row for _ in range(group)) for row in kv_heads) if group is not None else None,
        kv_heads=kv_heads,
        window=number(config, "recent_size", CONFIG, 1) if "recent_size" in config else None,
        sinks=number(config, "sink_size", CONFIG) if "sink_size" in config else None,
    )
