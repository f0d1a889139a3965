"""The report's drawings, as inline SVG.

Places across are percentages, heights and letters are pixels: a drawing is as wide as its column, and its letters stay
readable on a phone. Colours and letter sizes are the page's (export/page.py). Layers always run from left to right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from sparsec.export.words import MINUS, change
from sparsec.plan import Plan

GUTTER = 8.0  # percent, for the labels of rows
LEFT = 11.0  # percent, for the numbers of an upright axis; its lines run under them
LETTERS_FIT = 36  # columns; with more of them letters do not fit on a phone
CLOSEST = 5.0  # percent between two labels below an axis


def drawing(height: float, label: str, parts: Sequence[str], name: str) -> str:
    """The outer element; ``label`` says what is seen to those who do not see it."""
    text = escape(label)
    return (
        f'<svg class="{name}" role="img" aria-label="{text}" width="100%" height="{_n(height)}">'
        f"<title>{text}</title>{''.join(parts)}</svg>"
    )


def head_map(plan: Plan, scores: Sequence[Sequence[float]] | None) -> str:
    """Layers across, query heads down. scores: detection score by layer and head; None shades nothing."""
    shape = plan.model
    cell = 18 if shape.heads <= 12 else 12 if shape.heads <= 40 else 7
    column, gap, group = (100 - GUTTER) / shape.layers, 7, shape.group
    most = max((s for row in scores or () for s in row), default=0.0) or 1.0
    block = group * cell

    def top(head: int) -> int:
        return head * cell + (head // group) * gap + 2

    parts = []
    every = max(1, math.ceil(13 / (block + gap)))
    for kv in range(0, shape.kv_heads, every):
        parts.append(_text(0, top(kv * group) + block / 2 + 4, f"kv {kv}"))
    for i, layer in enumerate(plan.layers):
        x = GUTTER + i * column
        if layer.heads is None:
            height = top(shape.heads - 1) + cell - 2
            parts.append(_rect(x + column * 0.1, 2, column * 0.8, height, "native", f"layer {i}: as the model made it"))
            continue
        evicted = layer.local_kv_heads(group)
        for kv in range(shape.kv_heads):
            if kv not in evicted:
                parts.append(_rect(x + column * 0.02, top(kv * group) - 2, column * 0.96, block + 4, "plate"))
        for head, kept in enumerate(layer.heads):
            shade, note = 1.0 if kept else 0.3, ""
            if scores is not None:
                level = math.sqrt(max(0.0, scores[i][head]) / most)
                shade = 0.35 + 0.65 * level if kept else 0.14 + 0.7 * level
                note = f"layer {i}, head {head}: {scores[i][head]:.3f}" if kept else ""
            place = (x + column * 0.12, top(head) + 1, column * 0.76, cell - 2)
            parts.append(_rect(*place, "kept" if kept else "local", note, shade))
    below = top(shape.heads - 1) + cell + 10
    parts += _index_row(plan, column, below)
    parts += _axis([(GUTTER + (i + 0.5) * column, str(i)) for i in range(shape.layers)], below + 32)
    parts.append(_text(0, below + 32, "layer"))
    found = sum(len(layer.retrieval) for layer in plan.layers)
    label = f"Head map: {shape.layers} layers by {shape.heads} query heads, {found} of them retrieval heads"
    return drawing(below + 38, label, parts, "headmap")


def _index_row(plan: Plan, column: float, y: float) -> list[str]:
    parts = [_text(0, y + 12, "index")] if plan.indexed() else []
    for i, layer in enumerate(plan.layers):
        if layer.index != "none":
            parts += _kind(GUTTER + i * column, y, column, layer.index, plan.model.layers)
    return parts


def _kind(x: float, y: float, column: float, index: str, columns: int) -> list[str]:
    parts = [_rect(x + column * 0.08, y, column * 0.84, 16, index)]
    if columns <= LETTERS_FIT:
        parts.append(_text(x + column / 2, y + 12, index[0].upper(), f"middle on-{index}"))
    return parts


def bars(rows: Sequence[tuple[str, float, str]], label: str) -> str:
    """Horizontal bars of shares from 0 to 1: name, share, tone of each."""
    parts = []
    for number, (name, share, tone) in enumerate(rows):
        y = number * 40
        parts += [
            _text(0, y + 12, name, "ink"),
            _text(100, y + 12, f"{share:.1%}", "end ink value"),
            _rect(0, y + 18, 100, 10, "track"),
            _rect(0, y + 18, 100 * min(1.0, max(0.0, share)), 10, tone),
        ]
    return drawing(len(rows) * 40 - 8, label, parts, "bars")


def loss_curve(losses: Sequence[float], marks: Sequence[tuple[str, float]], label: str) -> str:
    """Loss of every step, a smoothed line over it, and horizontal lines at ``marks`` (name, loss)."""
    height = 190
    smooth, level = [], losses[0]
    for loss in losses:
        level = 0.9 * level + 0.1 * loss if math.isfinite(level) else loss
        smooth.append(level)
    scale = _Scale([0.0, *losses, *(loss for _, loss in marks)], height)
    parts = scale.grid(lambda v: f"{v:g}")
    for points, tone in ((losses, "faint"), (smooth, "strong")):
        places = [
            f"{i / max(1, len(points) - 1) * 1000:.1f},{scale.y(loss):.1f}"
            for i, loss in enumerate(points)
            if math.isfinite(loss)
        ]
        parts.append(_stretched(f'<polyline class="{tone}" points="{" ".join(places)}"/>', height))
    upper = max(loss for _, loss in marks) if marks else 0.0
    for name, loss in marks:
        y = scale.y(loss)
        parts.append(_line(LEFT, y, 100, y, "mark"))
        parts.append(_text(100, y - 5 if loss == upper else y + 14, name, "end ink halo"))
    parts += [_text(LEFT, height + 16, "step 1"), _text(100, height + 16, f"step {len(losses)}", "end")]
    return drawing(height + 22, label, parts, "curve")


def scatter(points: Sequence[tuple[float, float, str]], least: float, label: str, across: str) -> str:
    """Dots at (tokens kept, recall), named; ``least`` is drawn as a line. The three lowest carry their name."""
    height = 230
    scale = _Scale([0.9, 1.0, least, *(recall for _, recall, _ in points)], height)
    most = _nice(max(kept for kept, _, _ in points) * 1.05)
    parts = [*scale.grid(lambda v: f"{v:.0%}"), _line(0, scale.y(least), 100, scale.y(least), "warn")]
    for rank, (kept, recall, name) in enumerate(sorted(points, key=lambda point: (point[1], point[2]))):
        x, y = LEFT + (100 - LEFT) * kept / most, scale.y(recall)
        note = f"{name}: {kept:.0f} tokens, recall {recall:.1%}"
        parts.append(_dot(x, y, 4.5, note))
        if rank < 3:
            left = x > 65
            parts.append(_text(x, y + 4, name, "end halo" if left else "halo", f' dx="{-8 if left else 8}"'))
    for part in range(5):
        side = ("", "middle", "middle", "middle", "end")[part]
        parts.append(_text(LEFT + (100 - LEFT) * part / 4, height + 16, f"{most * part / 4:,.0f}", side))
    parts.append(_text(LEFT + (100 - LEFT) / 2, height + 34, across, "middle"))
    return drawing(height + 40, label, parts, "scatter")


def sharing(pattern: str, layers: Sequence[int]) -> str:
    """The pattern as a row of cells; a line runs from each full layer over those that read its set."""
    column = 100 / len(layers)
    parts, start = [], 0
    for place, letter in enumerate(pattern):
        index = "full" if letter == "F" else "shared"
        parts += _kind(place * column, 4, column, index, len(layers))
        if letter == "F":
            start = place
        if place + 1 == len(pattern) or pattern[place + 1] == "F":
            parts.append(_rect(start * column + column * 0.08, 25, (place - start + 0.84) * column, 3, "span"))
    parts += _axis([((place + 0.5) * column, str(layer)) for place, layer in enumerate(layers)], 44)
    full = [str(layer) for layer, letter in zip(layers, pattern, strict=True) if letter == "F"]
    return drawing(50, f"Sharing pattern {pattern}: layers {', '.join(full)} have an indexer", parts, "sharing")


def flips(steps: Sequence[tuple[int, float]], chance: float, budget: float | None, label: str) -> str:
    """Loss against no sharing after each flip: layer, share. A band marks what is chance, a line the budget."""
    height = 190
    values = [0.0, *(loss for _, loss in steps), chance, -chance, *([budget] if budget is not None else [])]
    scale = _Scale(values, height)
    parts = scale.grid(_change)
    parts.append(_rect(0, scale.y(chance), 100, scale.y(-chance) - scale.y(chance), "band"))
    if budget is not None:
        parts.append(_line(0, scale.y(budget), 100, scale.y(budget), "warn"))
    start, width = LEFT + 2, (96 - LEFT) / max(1, len(steps))
    places = [(start, 0.0), *((start + width * n, loss) for n, (_, loss) in enumerate(steps, start=1))]
    for (x0, y0), (x1, y1) in pairwise(places):
        parts.append(_line(x0, scale.y(y0), x1, scale.y(y1), "strong"))
    parts += [_dot(x, scale.y(loss), 4) for x, loss in places]
    parts.append(_text(0, height + 16, "layer"))
    parts += _axis([(places[n][0], str(layer)) for n, (layer, _) in enumerate(steps, start=1)], height + 16)
    return drawing(height + 22, label, parts, "curve")


def sensitivity(changes: Mapping[int, float], kept: set[int], label: str) -> str:
    """Upright bars: what sharing this one layer alone does to the loss. ``kept`` layers still have an indexer."""
    height = 130
    scale = _Scale([0.0, *changes.values()], height)
    parts = scale.grid(_change)
    column = (100 - LEFT) / len(changes)
    for place, (layer, value) in enumerate(changes.items()):
        x, (top, bottom) = LEFT + place * column, sorted((scale.y(value), scale.y(0.0)))
        tone = "full" if layer in kept else "shared"
        note = f"layer {layer}: {change(value, 3)}"
        parts.append(_rect(x + column * 0.2, top, column * 0.6, max(1.0, bottom - top), tone, note))
    parts.append(_text(0, height + 16, "layer"))
    parts += _axis([(LEFT + (place + 0.5) * column, str(layer)) for place, layer in enumerate(changes)], height + 16)
    return drawing(height + 22, label, parts, "curve")


def heat(shares: Sequence[Sequence[float]], layers: Sequence[int], label: str) -> str:
    """A square of shares from 0 to 1, layers across and down."""
    cell = 18 if len(layers) <= 16 else 11
    column = (100 - GUTTER) / len(layers)
    parts = []
    for down, row in enumerate(shares):
        if down % (1 if cell == 18 else 2) == 0:
            parts.append(_text(0, down * cell + cell * 0.75, str(layers[down])))
        for across, value in enumerate(row):
            note = f"layers {layers[down]} and {layers[across]}: {value:.2f}"
            parts.append(_rect(GUTTER + across * column, down * cell, column * 0.96, cell - 1, "full", note, value))
    y = len(layers) * cell + 12
    parts += _axis([(GUTTER + (place + 0.5) * column, str(layer)) for place, layer in enumerate(layers)], y)
    return drawing(y + 6, label, parts, "heat")


def ratios(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], even: float | None, label: str) -> str:
    """How many times as fast, or as few bytes, by context: a line a measure, of (context, ratio) in order.

    even: the context where it pays, drawn upright; dense, which is 1, lies across.
    """
    height = 190
    contexts = sorted({context for _, points in lines for context, _ in points})
    scale = _Scale([0.0, 1.0, *(ratio for _, points in lines for _, ratio in points)], height)
    low, high = math.log(contexts[0]), math.log(contexts[-1])

    def place(context: float) -> float:
        """Percent, logarithmic."""
        return LEFT + 2 + (95 - LEFT) * ((math.log(context) - low) / (high - low) if high > low else 0.5)

    parts = [*scale.grid(lambda v: f"{v:g}×"), _line(LEFT, scale.y(1.0), 100, scale.y(1.0), "mark")]
    if even is not None and contexts[0] <= even <= contexts[-1]:
        side = "end" if place(even) > 85 else "middle"
        parts += [_line(place(even), 12, place(even), height, "warn"), _text(place(even), 8, "break-even", side)]
    for number, (name, points) in enumerate(lines):
        tone = "strong" if number == 0 else "other-line"
        for (x0, y0), (x1, y1) in pairwise(points):
            parts.append(_line(place(x0), scale.y(y0), place(x1), scale.y(y1), tone))
        parts += [_dot(place(x), scale.y(y), 4, f"{name}, {x:,.0f} tokens: {y:.2f} times") for x, y in points]
    kept: list[tuple[float, str]] = []
    for context in contexts:
        if not kept or place(context) - kept[-1][0] >= 12:
            kept.append((place(context), f"{context:,.0f}"))
    parts += [_text(x, height + 16, text, "middle") for x, text in kept]
    parts.append(_text(LEFT + (100 - LEFT) / 2, height + 34, "tokens of context", "middle"))
    return drawing(height + 40, label, parts, "curve")


def grid(shares: Sequence[Sequence[float | None]], lengths: Sequence[str], depths: Sequence[str], label: str) -> str:
    """Needles found: a column a length, a row a depth; a share from 0 to 1 each, None where none was hidden."""
    cell, gutter = 26, 17.0
    column = (100 - gutter) / len(lengths)
    parts = []
    for down, row in enumerate(shares):
        parts.append(_text(0, down * cell + cell * 0.65, depths[down]))
        for across, value in enumerate(row):
            x, y = gutter + across * column, down * cell
            if value is None:
                continue
            note = f"{lengths[across]} tokens, depth {depths[down]}: {value:.0%}"
            parts.append(_rect(x, y, column * 0.97, cell - 2, "track"))
            parts.append(_rect(x, y, column * 0.97, cell - 2, "kept", note, 0.9 * value))
            parts.append(_text(x + column / 2, y + cell * 0.65, f"{value:.0%}", "middle ink halo"))
    y = len(shares) * cell + 14
    parts += [_text(gutter + (n + 0.5) * column, y, name, "middle") for n, name in enumerate(lengths)]
    return drawing(y + 6, label, parts, "grid-of-needles")


class _Scale:
    """An upright axis that holds all finite ``values``, on ``height`` pixels; 18 stay free above for labels."""

    def __init__(self, values: Sequence[float], height: float) -> None:
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite), max(finite)
        span = (high - low) or abs(high) or 1.0
        self.step = _nice(span / 4)
        self.low = math.floor(low / self.step + 1e-9) * self.step
        self.high = math.ceil(high / self.step - 1e-9) * self.step
        if self.high <= self.low:
            self.high = self.low + self.step
        self.height = height

    def y(self, value: float) -> float:
        """Where a value is, in pixels from the top."""
        return self.height - (value - self.low) / (self.high - self.low) * (self.height - 18)

    def grid(self, words: Callable[[float], str]) -> list[str]:
        """A line and a label at every step."""
        parts = []
        for number in range(round((self.high - self.low) / self.step) + 1):
            value = self.low + number * self.step
            y = self.y(value)
            parts += [_line(0, y, 100, y, "grid"), _text(0, y - 4, words(round(value, 10)))]
        return parts


def paths(sample: Mapping[str, Any]) -> str:
    """Tokens across, routed units down, filled where the token runs the unit. sample: ``routing_paths.paths_of``'s."""
    units, height, labelled = sample["units"], 7.0, set()
    column, parts = (100 - GUTTER) / max(1, len(sample["tokens"])), []
    for number, row in enumerate(units):
        y = number * height
        if row["layer"] % 5 == 0 and row["layer"] not in labelled:
            labelled.add(row["layer"])
            parts.append(_text(0, y + 9, f"layer {row['layer']}"))
        name = "kept" if row["unit"] == "attention" else "local"
        parts += [
            _rect(GUTTER + at * column, y, column * 0.9, height - 1, name)
            for at, ran in enumerate(row["ran"])
            if ran == "1"
        ]
    pairs = sum(len(row["ran"]) for row in units)
    share = sum(row["ran"].count("1") for row in units) / max(1, pairs)
    label = f"Paths of {len(sample['tokens'])} tokens through {len(units)} units: {share:.0%} of the pairs run"
    return drawing(len(units) * height + 6, label, parts, "paths")


def _change(share: float) -> str:
    """A label: as many digits as it needs."""
    return f"{round(share * 100, 6):+g}%".replace("-", MINUS) if share else "0%"


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next((power * m for m in (1, 2, 2.5, 5, 10) if power * m >= value * (1 - 1e-9)), power)


def _stretched(content: str, height: int) -> str:
    """Coordinates 0 to 1000 across, right of the axis: lines of many points cannot be given in percent."""
    place = f'x="{LEFT:g}%" y="0" width="{100 - LEFT:g}%" height="{height}"'
    return f'<svg {place} viewBox="0 0 1000 {height}" preserveAspectRatio="none">{content}</svg>'


def _axis(labels: Sequence[tuple[float, str]], y: float) -> list[str]:
    """Labels below an axis, as many as have room: places in percent, in order."""
    apart = labels[1][0] - labels[0][0] if len(labels) > 1 else 100.0
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * apart >= CLOSEST or n == 1000)
    return [_text(x, y, text, "middle") for x, text in labels[::every]]


def _text(x: float, y: float, text: str, name: str = "", more: str = "") -> str:
    kind = f' class="{name}"' if name else ""
    return f'<text{kind} x="{_n(x)}%" y="{_n(y)}"{more}>{escape(text)}</text>' if _finite(x, y) else ""


def _rect(x: float, y: float, w: float, h: float, name: str, note: str = "", shade: float | None = None) -> str:
    if not _finite(x, y, w, h):
        return ""
    dim = f' fill-opacity="{shade:.2f}"' if shade is not None else ""
    inner = f"><title>{escape(note)}</title></rect>" if note else "/>"
    return f'<rect class="{name}" x="{_n(x)}%" y="{_n(y)}" width="{_n(w)}%" height="{_n(h)}"{dim}{inner}'


def _line(x0: float, y0: float, x1: float, y1: float, name: str) -> str:
    if not _finite(x0, y0, x1, y1):
        return ""
    return f'<line class="{name}" x1="{_n(x0)}%" y1="{_n(y0)}" x2="{_n(x1)}%" y2="{_n(y1)}"/>'


def _dot(x: float, y: float, radius: float, note: str = "") -> str:
    inner = f"><title>{escape(note)}</title></circle>" if note else "/>"
    return f'<circle class="dot" cx="{_n(x)}%" cy="{_n(y)}" r="{_n(radius)}"{inner}' if _finite(x, y) else ""


def _finite(*places: float) -> bool:
    """A loss that is no number has no place in a drawing; the tables show it."""
    return all(map(math.isfinite, places))


def _n(value: float) -> str:
    """A coordinate, no longer than it must be."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
