"""The report's needle grid: answers found by length and depth, dense beside the artifact. Of a ``sparsec eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsec.export import svg
from sparsec.export.page import figure, heading, paragraph, section, table
from sparsec.export.words import count, percent, plural

ROWS = 5  # depths
SYSTEMS = ("dense", "artifact")
Grid = dict[tuple[int, int], float]  # (length, row) -> share found


def needles(result: Mapping[str, Any], own: str) -> str:
    """Nothing where no prompt says how deep its needle is.

    Args:
        result: of ``sparsec eval``.
        own: the artifact's name in it.
    """
    grids = [_grid(result, system) for system in ("dense", own)]
    lengths = sorted({length for grid in grids for length, _ in grid[0]})
    if not lengths:
        return ""
    depths = [f"{100 * row // ROWS}–{100 * (row + 1) // ROWS}%" for row in range(ROWS)]
    parts, rows = [], []
    for name, (found, asked) in zip(SYSTEMS, grids, strict=True):
        shares = [[found.get((length, row)) for length in lengths] for row in range(ROWS)]
        label = f"Needles that {name} finds, by length and depth: {plural(asked, 'prompt')}"
        parts += [
            heading(f"{name}: {plural(asked, 'prompt')}"),
            figure(
                svg.grid(shares, [count(length) for length in lengths], depths, label), "Tokens across, depth down."
            ),
        ]
    for length in lengths:
        for row in range(ROWS):
            pair = [found.get((length, row)) for found, _ in grids]
            if any(share is not None for share in pair):
                rows.append([count(length), depths[row], *("–" if s is None else percent(s, 0) for s in pair)])
    tasks = ", ".join(dict.fromkeys(task for cell in result["cells"] for task in cell.get("tasks", {})))
    return section(
        "needles",
        "Needles found, dense beside the artifact",
        *parts,
        table(["tokens", "depth", *SYSTEMS], rows, words=0),
        paragraph(f"Tasks: {tasks}; the same prompts for both. {result['device']}, {result['dtype']}.", "quiet"),
    )


def _grid(result: Mapping[str, Any], system: str) -> tuple[Grid, int]:
    """Shares by place, and the prompts that they are of."""
    found: dict[tuple[int, int], list[float]] = {}
    for cell in result["cells"]:
        if cell["system"] == system:
            for task in cell.get("tasks", {}).values():
                for share, depth in _placed(task):
                    found.setdefault((cell["length"], min(ROWS - 1, int(depth * ROWS))), []).append(share)
    return {place: sum(shares) / len(shares) for place, shares in found.items()}, sum(map(len, found.values()))


def _placed(task: Mapping[str, Any]) -> Sequence[tuple[float, float]]:
    depths = task.get("depths") or [None] * len(task["found"])
    return [(share, depth) for share, depth in zip(task["found"], depths, strict=True) if depth is not None]
