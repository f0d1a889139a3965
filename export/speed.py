"""The report's section on speed by context: what bytes promise, what ``sparsec bench`` measured, and where it pays.

A compile measures no time, so that it can be repeated to the byte: the second half is there where a bench is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsec.export import svg
from sparsec.export.page import figure, heading, paragraph, section, table
from sparsec.export.selectors import break_even_words
from sparsec.export.words import count, plural

Points = list[tuple[float, float]]


def speed(split: Mapping[str, Any] | None, timed: Mapping[str, Any] | None) -> str:
    """split: what the pass that fitted indexers measured; timed: of ``sparsec bench``. Neither: nothing."""
    selector = (split or {}).get("selector") or {}
    expected = _expected(selector.get("reads") or [])
    if not expected and timed is None:
        return ""
    parts = _promised(expected, selector) if expected else []
    if timed is not None:
        parts += _measured(timed)
    else:
        parts.append(
            paragraph(
                "Not measured: a compile takes no time, so that it gives the same files again. sparsec bench measures "
                "it where the artifact is to run, and sparsec report --bench shows it here.",
                "quiet",
            )
        )
    return section("speed", "Speed by context", *parts)


def _expected(reads: Sequence[Mapping[str, Any]]) -> Points:
    return sorted((float(r["context"]), r["dense"] / (r["index"] + r["kept"])) for r in reads)


def _promised(points: Points, selector: Mapping[str, Any]) -> list[str]:
    even = selector.get("break_even")
    tokens = float(even["tokens"]) if even is not None and even["bound"] == "about" else None
    label = f"Bytes of a dense decode step over ours, at {plural(len(points), 'context')}"
    return [
        heading("Expected of a decode step, by the bytes that layers with an index read"),
        figure(
            svg.ratios([("expected", points)], tokens, label),
            f"Dense bytes over ours: where memory decides, a step of these layers is as many times as fast at best. "
            f"Break-even: {break_even_words(even)}.",
            [("line", "expected"), *([("warn", "break-even")] if tokens is not None else [])],
        ),
        table(
            ["context, mean", "dense bytes over ours"],
            [[count(context), f"{ratio:.2f}"] for context, ratio in points],
            words=0,
        ),
    ]


def _measured(timed: Mapping[str, Any]) -> list[str]:
    by = {(row["system"], row["context"]): row for row in timed["rows"]}
    contexts = sorted({context for _, context in by})
    steps, prompts = (_ratios(by, contexts, key) for key in ("step_s", "prefill_s"))
    rows = [
        [
            system,
            str(row.get("runs", "")),
            count(context),
            _time(row, "prefill_s", 1, "s"),
            _time(row, "step_s", 1e3, "ms"),
        ]
        for context in contexts
        for system in ("dense", "artifact")
        if (row := by.get((system, context))) is not None
    ]
    even = timed.get("break_even")
    words = (
        f"From {count(even)} tokens on a decode step takes less time than dense's."
        if even is not None
        else "At none of these contexts does a decode step take less time than dense's."
    )
    lines = [(name, points) for name, points in (("a token", steps), ("the prompt", prompts)) if points]
    picture = ""
    if lines:
        picture = figure(
            svg.ratios(lines, float(even) if even is not None else None, "Dense time over ours by context"),
            f"Dense time over ours: above 1 the artifact is faster. {words}",
            [
                ("line", "a token"),
                ("other-line", "the prompt"),
                *([("warn", "break-even")] if even is not None else []),
            ],
        )
    about = f"{timed['device']}, {timed['dtype']}, batch {by[next(iter(by))]['batch']}; medians of one run"
    return [
        heading("Measured, wall-clock"),
        picture,
        table(["system", "runs", "context", "prompt", "a token"], rows, words=2),
        paragraph(about, "quiet"),
    ]


def _ratios(by: Mapping[tuple[str, int], Mapping[str, Any]], contexts: Sequence[int], key: str) -> Points:
    found = []
    for context in contexts:
        dense, ours = (by.get((system, context), {}).get(key) for system in ("dense", "artifact"))
        if dense and ours:
            found.append((float(context), dense / ours))
    return found


def _time(row: Mapping[str, Any], key: str, scale: float, unit: str) -> str:
    return f"{row[key] * scale:.3g} {unit}" if key in row else "–"
