"""Draws quality against realised FLOPs, a line a system: docs/passes/informed-routing.svg from what routing.py found.

python benchmarks/routing_curves.py    (make docs runs it)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "routing-demo.json"
DRAWING = ROOT / "docs" / "passes" / "informed-routing.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 640, 340, 60, 190, 16, 46
COLOURS = ("#1a6b8f", "#5aa3c0", "#c2702a", "#7a4fa3", "#8a8a8a")
Point = tuple[float, float]


def lines_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """By system: realised share of FLOPs removed and loss in bits per byte against dense, means over seeds, from 0."""
    found: dict[str, dict[float, list[Point]]] = {}
    for row in runs:
        if row["system"] != "dense":
            point = (row["removed"], row["against_dense"])
            found.setdefault(row["system"], {}).setdefault(row["target"], []).append(point)
    return {
        system: [(0.0, 0.0), *(_mean(points) for _, points in sorted(targets.items()))]
        for system, targets in found.items()
    }


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def drawn(lines: Mapping[str, Sequence[Point]]) -> str:
    """The drawing, SVG."""
    right = math.ceil(10 * max(x for points in lines.values() for x, _ in points)) / 10
    top = math.ceil(2 * max(y for points in lines.values() for _, y in points)) / 2

    def at(point: Point) -> Point:
        across, up = point[0] / right, point[1] / top
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BELOW - up * (HEIGHT - TOP - BELOW)

    def text(x: float, y: float, words: str, anchor: str = "start") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'

    parts = []
    for step in range(round(2 * top) + 1):
        _, y = at((0.0, step / 2))
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(LEFT - 6, y + 4, f"+{step / 2:.0%}", "end"))
    for step in range(round(10 * right) + 1):
        parts.append(text(at((step / 10, 0.0))[0], HEIGHT - BELOW + 18, f"{step / 10:.0%}", "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "of all units' FLOPs removed, overheads paid", "middle"))
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        for one, other in pairwise(points):
            (x1, y1), (x2, y2) = at(one), at(other)
            parts.append(
                f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="2"/>'
            )
        for point in points[1:]:
            x, y = at(point)
            said = f"{name}: {point[1]:+.1%} bits per byte at {point[0]:.1%} removed"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{said}</title></circle>')
        x, y = at(points[-1])
        parts.append(f'<g fill="{colour}">{text(x + 10, y + 4, name)}</g>')
    label = "Loss in bits per byte against dense, by realised share of FLOPs removed"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'font-family="sans-serif" font-size="12" fill="#333"><title>{label}</title>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    DRAWING.write_text(drawn(lines_of(json.loads(RESULT.read_text(encoding="utf-8"))["runs"])), encoding="utf-8")
