"""Every two systems of an evaluation against each other, on the same prompts and windows, with intervals.

Measures: each task's share of answers found, all needle tasks together (each weighing the same), bits per byte, and the
agreement of the long decode's first tokens with dense. Against dense there is also the recovery: the share of dense's
score that the system reaches. Needle tasks of all lengths together tell more than those of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from sparsec.calibrate.statistics import Interval, Paired, change, difference, recovery
from sparsec.calibrate.tasks import NEEDLES

TOGETHER = "needles"  # all needle tasks, as one measure
BITS = "bits_per_byte"
AGREEMENT = "decode_agreement"

Cell = Mapping[str, Any]


def comparisons(cells: Sequence[Cell], *, seed: int) -> list[dict[str, Any]]:
    """Each pair of systems at each length, the later one ``system``, the earlier one ``against``.

    ``change`` is relative for bits per byte, else a difference of shares (0.02: two points); ``low`` and ``high`` bound
    it; ``certain`` says that zero is outside of them.
    """
    found = []
    for length in dict.fromkeys(cell["length"] for cell in cells):
        here = [cell for cell in cells if cell["length"] == length]
        for against, system in combinations(here, 2):
            names = {"length": length, "system": system["system"], "against": against["system"]}
            found += [names | row for row in _rows(system, against, seed)]
    return found


def over_lengths(cells: Sequence[Cell], *, seed: int) -> list[dict[str, Any]]:
    """Each pair of systems on all needle tasks of all lengths, each weighing the same; none where it is one length.

    Rows are those of :func:`comparisons`, with both systems' shares, ``share`` and ``against_share``, for the length.
    """
    by_system: dict[str, dict[tuple[int, str], Sequence[float]]] = {}
    for cell in cells:
        needles = {
            (cell["length"], task): one["found"] for task, one in cell.get("tasks", {}).items() if task in NEEDLES
        }
        by_system.setdefault(cell["system"], {}).update(needles)
    found = []
    for (against, others), (system, own) in combinations(by_system.items(), 2):
        if own.keys() == others.keys() and len({length for length, _ in own}) > 1:
            pairs = [Paired(own[place], others[place]) for place in own]
            row = _row(TOGETHER, difference(pairs, seed=seed), sum(len(pair.system) for pair in pairs))
            both = {"share": _mean(own), "against_share": _mean(others)}
            found.append({"system": system, "against": against, **both, **row})
    return found


def _mean(found: Mapping[Any, Sequence[float]]) -> float:
    return sum(sum(one) / len(one) for one in found.values()) / len(found)


def _rows(system: Cell, against: Cell, seed: int) -> Iterator[dict[str, Any]]:
    if "windows" in system and "windows" in against:
        made = change(system["windows"], against["windows"], against["window_bytes"], seed=seed)
        yield _row(BITS, made, len(against["windows"]))
    tasks, others = system.get("tasks", {}), against.get("tasks", {})
    both = {task: Paired(tasks[task]["found"], others[task]["found"]) for task in tasks if task in others}
    groups = {task: [pair] for task, pair in both.items()}
    needles = [pair for task, pair in both.items() if task in NEEDLES]
    if len(needles) > 1:
        groups[TOGETHER] = needles
    for measure, pairs in groups.items():
        n = sum(len(pair.system) for pair in pairs)
        row = _row(measure, difference(pairs, seed=seed), n)
        ratio = recovery(pairs, seed=seed) if against["system"] == "dense" else None
        if ratio is not None:
            row["recovery"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
        yield row
    # Dense agrees with itself by definition: nothing to compare.
    if "decode" in system and "decode" in against and against["system"] != "dense":
        mine, theirs = (cell["decode"]["each"]["agreement"] for cell in (system, against))
        yield _row(AGREEMENT, difference([Paired(mine, theirs)], seed=seed), len(mine))


def _row(measure: str, interval: Interval, n: int) -> dict[str, Any]:
    return {
        "measure": measure,
        "change": interval.value,
        "low": interval.low,
        "high": interval.high,
        "certain": interval.certain,
        "n": n,
    }
