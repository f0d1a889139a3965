"""The report's section on ways to make a model's own indexers (DSA) cheaper: how much of their choice is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.export.page import folded, paragraph, section, table
from sparsec.export.words import count, percent, plural

TITLES = {"hisa": "Blocks before tokens (HISA)", "misa": "Some indexer heads a query (MISA)"}


def choices(name: str, found: Mapping[str, Any]) -> str:
    """found: what the pass ``name`` measured."""
    choice = found["choice"]
    rows = [
        [str(row["layer"]), *(percent(row[figure]) for figure in ("iou", "recovered", "mass", "mass_flat"))]
        for row in choice["layers"]
    ]
    return section(
        name,
        TITLES[name],
        paragraph(
            "Of the tokens that the same indexers choose among all tokens with all heads, "
            f"{percent(choice['recovered'])} are still chosen (intersection over union {percent(choice['iou'])}). "
            f"What is chosen holds {percent(choice['mass'])} of the attention, {percent(choice['mass_flat'])} before."
        ),
        folded(
            "Layer by layer",
            table(["layer", "IoU", "recovered", "attention found", "before"], rows, words=1),
        ),
        paragraph(
            f"{plural(found['windows'], 'window')} of {count(found['context'])} tokens of the search text; "
            f"{count(choice['rows'])} rows a layer, those that see more tokens than they choose. "
            "Layers see what the cheaper way gives them.",
            "quiet",
        ),
    )
