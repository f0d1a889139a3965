"""The picture of a ``sparsec bench``: time to first token and time per token by context, both axes logarithmic.

One SVG file that needs no style sheet, for a README or a wiki.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

PANELS = (("prefill_s", "time to first token", 1.0, "s"), ("step_s", "time per token", 1e3, "ms"))
TONES = {"dense": "#8a8f98", "artifact": "#0b6e4f"}
WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 220, 56, 34, 40


def times_svg(result: Mapping[str, Any]) -> str:
    """The file's text. result: of ``compiler.bench.bench``; rows that did not fit into memory are left out."""
    parts = [_panel(result["rows"], number, *panel) for number, panel in enumerate(PANELS)]
    width, height = 2 * (LEFT + WIDTH) + GAP + 16, TOP + HEIGHT + 66
    said = f"{result['device']}, {result['dtype']}, batch {result['rows'][0]['batch']}; dense grey, sparse green"
    note = f'<text x="{LEFT}" y="{height - 10}" font-size="11" fill="#555">{escape(said)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">'
        f'<title>{escape(said)}</title><rect width="100%" height="100%" fill="white"/>{"".join(parts)}{note}</svg>\n'
    )


def _panel(rows: Sequence[Mapping[str, Any]], number: int, key: str, title: str, scale: float, unit: str) -> str:
    left = LEFT + number * (LEFT + WIDTH + GAP)
    points = [(row["system"], row["context"], row[key] * scale) for row in rows if key in row]
    if not points:
        return ""
    contexts = sorted({context for _, context, _ in points})
    across = _Axis([float(context) for context in contexts], left, left + WIDTH)
    up = _Axis([value for *_, value in points], TOP + HEIGHT, TOP)
    parts = [f'<text x="{left}" y="{TOP - 12}" font-size="13" fill="#222">{title}, {unit}</text>']
    for context in contexts:
        x = across(context)
        parts.append(_line(x, TOP, x, TOP + HEIGHT) + _label(x, TOP + HEIGHT + 16, _short(context), "middle"))
    low, high = (math.floor(math.log10(min(v for *_, v in points))), math.ceil(math.log10(max(v for *_, v in points))))
    for power in range(low, high + 1):
        y = up(10.0**power)
        if TOP - 1 <= y <= TOP + HEIGHT + 1:
            parts.append(_line(left, y, left + WIDTH, y) + _label(left - 6, y + 4, f"{10.0**power:g}", "end"))
    for system, tone in TONES.items():
        own = sorted((context, value) for name, context, value in points if name == system)
        places = " ".join(f"{across(context):.1f},{up(value):.1f}" for context, value in own)
        parts.append(f'<polyline points="{places}" fill="none" stroke="{tone}" stroke-width="2"/>')
        for context, value in own:
            note = f"{system}, {context:,} tokens: {value:.3g} {unit}"
            dot = f'<circle cx="{across(context):.1f}" cy="{up(value):.1f}" r="3.5" fill="{tone}">'
            parts.append(f"{dot}<title>{note}</title></circle>")
    return "".join(parts)


class _Axis:
    """Places of values on a logarithmic axis from pixel ``first`` to pixel ``last``, with a margin at both ends."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        logs = [math.log(value) for value in values]
        margin = 0.08 * (max(logs) - min(logs)) or 1.0
        self.low, self.high = min(logs) - margin, max(logs) + margin
        self.first, self.last = first, last

    def __call__(self, value: float) -> float:
        share = (math.log(value) - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)


def _short(context: int) -> str:
    return f"{context // 1024}K" if context % 1024 == 0 else f"{context:,}"


def _line(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#e3e5e8"/>'


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" fill="#555" text-anchor="{anchor}">{text}</text>'
