"""What ``sparsec eval`` measured, as tables of words: the same for the terminal, Markdown and whoever else shows it.

The JSON of ``calibrate.evaluate.evaluate`` goes in, a title with a head and rows comes out; the caller draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.calibrate.comparisons import AGREEMENT, BITS, TOGETHER
from sparsec.export.words import MINUS, change, count, percent, plural, size

Result = Mapping[str, Any]
NONE = "–"
SYSTEMS = {"window": "window only", "split": "head split, training-free", "artifact": "the artifact"}


@dataclass(frozen=True)
class Table:
    """One table; ``note`` says how to read it. The first ``left`` columns are words, the others numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    left: int = 0


def tables(result: Result) -> list[Table]:
    """Every table that the result has something for."""
    made = [overview(result), tasks(result), positions(result), long_decode(result)]
    return [table for table in made if table.rows]


def overview(result: Result) -> Table:
    """A row a length and system: text, needles together, what was read and kept; nothing where no text was read."""
    cells = [cell for cell in result["cells"] if BITS in cell]
    dense = {cell["length"]: cell for cell in cells if cell["system"] == "dense"}
    names = list(dict.fromkeys(task for cell in cells for task in cell.get("tasks", {})))
    together = any(row["measure"] == TOGETHER for row in result["comparisons"])
    measure, heading = (TOGETHER, "needles") if together else (names[0], names[0]) if len(names) == 1 else ("", "")
    head = ["tokens", "system", "bits/byte", *([heading] if measure else [])]
    head += ["attention read", "mass found", "tokens kept (p95)", "KV cache"]
    rows = []
    for cell in cells:
        selector = cell.get("selector") or {}
        row = [count(cell["length"]), named(cell["system"]), _bits(result, cell)]
        if measure:
            row.append(_task(result, cell, measure))
        row += [
            percent(cell["attention_read"]) if "attention_read" in cell else NONE,
            percent(selector["recall_mean"]) if selector else NONE,
            f"{count(selector['kept_mean'])} ({count(selector['kept_p95'])})" if selector else NONE,
            _memory(cell, dense.get(cell["length"], {})),
        ]
        rows.append(row)
    note = (
        "Bits per byte of held-out text in decode rows, and their change against dense; needles: share of answers "
        "found, and points against dense. In brackets 95 % intervals, paired over windows or prompts. Attention read: "
        "realised share of a dense model's query-key pairs. Mass found: true attention mass in what selectors keep."
    )
    return Table("", head, rows, note, 2)


def tasks(result: Result) -> Table:
    """A row a length and task, a column a system."""
    cells = [cell for cell in result["cells"] if cell.get("tasks")]
    systems = list(dict.fromkeys(cell["system"] for cell in cells))
    by_place = {(cell["length"], cell["system"]): cell for cell in cells}
    rows = []
    for length in dict.fromkeys(cell["length"] for cell in cells):
        here = [by_place[length, system] for system in systems if (length, system) in by_place]
        names = list(dict.fromkeys(task for cell in here for task in cell["tasks"]))
        found = {row["measure"] for row in result["comparisons"] if row["length"] == length}
        for task in [*names, *([TOGETHER] if TOGETHER in found else [])]:
            label = "needles together" if task == TOGETHER else task
            cases = [by_place.get((length, system)) for system in systems]
            rows.append([count(length), label, *(_task(result, cell, task) if cell else NONE for cell in cases)])
    rows += _over_lengths(result, systems)
    note = (
        "Share of the asked answers that were generated; in brackets points against dense, with paired 95 % intervals."
    )
    return Table("Tasks", ["tokens", "task", *map(named, systems)], rows, note, 2)


def _over_lengths(result: Result, systems: Sequence[str]) -> list[list[str]]:
    """The row of all lengths, where there are several that dense and another system did."""
    found = {row["system"]: row for row in result.get("over_lengths", []) if row["against"] == "dense"}
    if not found:
        return []
    cells = {name: f"{row['share']:.2f}{_points(row)}" for name, row in found.items()}
    cells["dense"] = f"{next(iter(found.values()))['against_share']:.2f}"
    return [["all", "needles together", *(cells.get(name, NONE) for name in systems)]]


def positions(result: Result) -> Table:
    """Bits per byte by place: quarters of the decode rows, and shorter prompts of the same windows."""
    cells = [cell for cell in result["cells"] if cell.get("positions")]
    dense = {cell["length"]: cell for cell in cells if cell["system"] == "dense"}
    quarters = max((len(cell["positions"]) for cell in cells), default=0)
    contexts = max((len(cell.get("contexts", [])) for cell in cells), default=0)
    rows = []
    for cell in cells:
        base = dense.get(cell["length"], {})
        row = [count(cell["length"]), named(cell["system"])]
        for key, columns in (("positions", quarters), ("contexts", contexts)):
            mine, theirs = cell.get(key, []), base.get(key, [])
            for at in range(columns):
                row.append(_placed(cell, mine, theirs, at))
        rows.append(row)
    head = ["tokens", "system", *(f"quarter {at + 1}" for at in range(quarters))]
    head += [f"at {at + 1}/{contexts} of the text" for at in range(contexts)]
    return Table(
        "Bits per byte by position",
        head,
        rows,
        "Quarters of the decode rows, the first right behind the prompt; against dense.",
        2,
    )


def long_decode(result: Result) -> Table:
    """A row a length and system: agreement with dense and repetition over a thousand tokens."""
    rows = []
    for cell in result["cells"]:
        if "decode" in cell:
            found = cell["decode"]
            rows.append(
                [
                    count(cell["length"]),
                    named(cell["system"]),
                    percent(found["agreement"]) + _points(against(result, cell, AGREEMENT, _rounded_name(result))),
                    count(found["prefix"]),
                    percent(found["followed"]),
                    percent(found["repeated"]),
                    f"{found['distinct']:.2f}",
                ]
            )
    first = next((cell["decode"] for cell in result["cells"] if "decode" in cell), None)
    note = ""
    if first is not None:
        note = (
            f"{plural(first['n'], 'prompt')} of natural text, {count(first['new_tokens'])} tokens generated greedily. "
            f"Equal: of the first {first['first']} tokens, those equal to dense's, place by place; where dense also "
            "ran in another dtype, in points against that. Prefix: tokens before the first difference. Step by step: "
            "next tokens chosen as dense does, along dense's text. Repeated: 4-grams that were there before."
        )
    head = ["tokens", "system", "equal", "prefix", "step by step", "repeated", "distinct"]
    return Table("Long decode", head, rows, note, 2)


def made_of(result: Result, text_name: str) -> list[str]:
    """What the figures were taken on, a line each. ``text_name``: the text as it is to be called."""
    windows = sorted({len(cell["windows"]) for cell in result["cells"] if "windows" in cell})
    text = result["text"]
    lines = []
    if windows:
        lines.append(
            f"{'/'.join(map(str, windows))} held-out windows of {text_name} a length, the last "
            f"{result['rows']} tokens of each scored as decode rows"
        )
    if any(cell.get("tasks") for cell in result["cells"]):
        lines.append(f"{result['prompts_each']} prompts a task and length")
    lines.append(f"seed {result['seed']}, {result['device']}, {result['dtype']}, torch {result['torch']}")
    plans = ", ".join(f"{name} {each['plan'][:16]}" for name, each in result.get("artifacts", {}).items())
    lines.append(f"plan of {plans}; text {text_name}, digest {text['digest'][:16]}")
    if "command" in result:
        lines.append(f"made by: {result['command']}")
    return [*lines, *result["notes"]]


def named(system: str) -> str:
    """A system in words."""
    return SYSTEMS.get(system, system)


def _bits(result: Result, cell: Mapping[str, Any]) -> str:
    if BITS not in cell:
        return NONE
    row = against(result, cell, BITS, "dense")
    if row is None:
        return f"{cell[BITS]:.4f}"
    return f"{cell[BITS]:.4f} ({shares(row)})"


def shares(row: Mapping[str, Any]) -> str:
    """A comparison of shares: ``+0.09% [−0.09%, +0.28%]``."""
    return f"{change(row['change'])} [{change(row['low'])}, {change(row['high'])}]"


def points(row: Mapping[str, Any]) -> str:
    """A comparison in points: ``−2.0 [−5.0, +1.0]``."""
    value, low, high = (f"{100 * row[key]:+.1f}".replace("-", MINUS) for key in ("change", "low", "high"))
    return f"{value} [{low}, {high}]"


def _task(result: Result, cell: Mapping[str, Any], task: str) -> str:
    found = cell.get("tasks", {})
    share = cell.get(TOGETHER) if task == TOGETHER else found.get(task, {}).get("share")
    if share is None:
        return NONE
    return f"{share:.2f}{_points(against(result, cell, task, 'dense'))}"


def _points(row: Mapping[str, Any] | None) -> str:
    """`` (−2.0 [−5.0, +1.0])``; nothing where there is nothing to compare with."""
    return "" if row is None else f" ({points(row)})"


def _placed(cell: Mapping[str, Any], mine: Sequence[Any], theirs: Sequence[Any], at: int) -> str:
    if at >= len(mine):
        return NONE
    bits = mine[at][BITS]
    if cell["system"] == "dense" or at >= len(theirs):
        return f"{bits:.4f}"
    return change(bits / theirs[at][BITS] - 1)


def _memory(cell: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    if "kv_bytes" not in cell:
        return NONE
    if cell["system"] == "dense" or "kv_bytes" not in dense:
        return size(cell["kv_bytes"])
    return f"{size(cell['kv_bytes'])} ({change(cell['kv_bytes'] / dense['kv_bytes'] - 1, 0)})"


def against(result: Result, cell: Mapping[str, Any], measure: str, other: str | None) -> Mapping[str, Any] | None:
    """The comparison of a cell with a system, where there is one."""
    wanted = (cell["length"], cell["system"], other, measure)
    keys = ("length", "system", "against", "measure")
    return next((row for row in result["comparisons"] if tuple(row[key] for key in keys) == wanted), None)


def _rounded_name(result: Result) -> str | None:
    """The row of dense in another dtype."""
    return next((cell["system"] for cell in result["cells"] if cell["system"].startswith("dense ")), None)
