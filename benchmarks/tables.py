"""Fills the ``<!-- table: NAME -->`` blocks of README.md and docs/ from benchmarks/results/*.json.

python benchmarks/tables.py            write them anew
python benchmarks/tables.py --check    exit with 1 if one is stale

eval    eval-demo.json, what ``sparsec eval -o`` wrote: a row a length and system
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsec.export.words import change, count, percent, size

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from blocks import documents, main  # noqa: E402  a script's folder, not a package

RESULTS = ROOT / "benchmarks" / "results"
SYSTEMS = {
    "dense": "dense",
    "window": "window only",
    "split": "head split, training-free",
    "artifact": "the artifact",
}


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
    """The result of ``calibrate.evaluate.evaluate`` as Markdown; changes are relative to dense at that length."""
    cells = result["cells"]
    tasks = list(dict.fromkeys(task for cell in cells for task in cell.get("tasks", {})))
    dense = {cell["length"]: cell for cell in cells if cell["system"] == "dense"}
    head = ["tokens", "system", "bits/byte", *tasks, "attention mass found", "tokens kept (p95)", "KV cache"]
    rows = [_row(cell, dense.get(cell["length"], {}), tasks) for cell in cells]
    rule = ["---:", "---", *["---:"] * (len(head) - 2)]
    lines = [f"| {' | '.join(line)} |" for line in (head, rule, *rows)]
    return "\n".join([*lines, "", _made(result)])


def _row(cell: Mapping[str, Any], dense: Mapping[str, Any], tasks: list[str]) -> list[str]:
    selector = cell.get("selector") or {}
    return [
        count(cell["length"]),
        SYSTEMS[cell["system"]],
        _beside(cell, dense, "bits_per_byte", lambda bits: f"{bits:.4f}", 2),
        *(f"{cell['tasks'][task]['exact']:.2f}" if task in cell.get("tasks", {}) else "–" for task in tasks),
        percent(selector["recall_mean"]) if selector else "–",
        f"{count(selector['kept_mean'])} ({count(selector['kept_p95'])})" if selector else "–",
        _beside(cell, dense, "kv_bytes", size, 0),
    ]


def _beside(cell: Mapping[str, Any], dense: Mapping[str, Any], key: str, words: Any, digits: int) -> str:
    """A figure, and its change against dense."""
    if key not in cell:
        return "–"
    if cell["system"] == "dense" or key not in dense:
        return str(words(cell[key]))
    return f"{words(cell[key])} ({change(cell[key] / dense[key] - 1, digits)})"


def _made(result: Mapping[str, Any]) -> str:
    """What the figures were taken on."""
    windows = sorted({len(cell["windows"]) for cell in result["cells"] if "windows" in cell})
    text = result["text"]
    named = Path(text["spec"]).name
    parts = [
        f"{'/'.join(map(str, windows))} held-out windows of {named} a length, the last {result['rows']} tokens of each "
        "scored as decode rows",
        f"{result['prompts_each']} prompts a task and length, exact match",
        f"seed {result['seed']}, {result['device']}, {result['dtype']}, torch {result['torch']}",
        f"plan {result['artifact']['plan'][:16]}, text {text['digest'][:16]}",
    ]
    return "; ".join([*parts, *result["notes"]]) + "."


if __name__ == "__main__":
    sys.exit(main("Fill the tables of the documents from the results.", "table", render, documents()))
