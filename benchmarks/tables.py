"""Fills the ``<!-- table: NAME -->`` blocks of README.md and docs/ from benchmarks/results/*.json.

python benchmarks/tables.py            write them anew
python benchmarks/tables.py --check    exit with 1 if one is stale

eval    eval-demo.json, what ``sparsec eval -o`` wrote: systems side by side, tasks, positions, long decode
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsec.export.evaluation import made_of, tables

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from blocks import documents, main  # noqa: E402  a script's folder, not a package

RESULTS = ROOT / "benchmarks" / "results"


def render(name: str) -> str:
    """One table.

    Raises:
        ValueError: no such table.
    """
    if name != "eval":
        raise ValueError(f"there is no table {name!r}: see benchmarks/tables.py")
    file = RESULTS / "eval-demo.json"
    if not file.is_file():
        return "Not measured yet: `make bench` measures it and fills this in."
    return evaluation(json.loads(file.read_text(encoding="utf-8")))


def evaluation(result: Mapping[str, Any]) -> str:
    """The result of ``sparsec eval`` as Markdown."""
    parts = []
    for table in tables(result):
        rule = ["---"] * table.left + ["---:"] * (len(table.head) - table.left)
        parts += [f"**{table.title}**", ""] if table.title else []
        parts += [f"| {' | '.join(line)} |" for line in (table.head, rule, *table.rows)]
        parts += ["", table.note, ""]
    return "\n".join([*parts, "; ".join(made_of(result, Path(result["text"]["spec"]).name)) + "."])


if __name__ == "__main__":
    sys.exit(main("Fill the tables of the documents from the results.", "table", render, documents()))
