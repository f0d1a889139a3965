"""The table of benchmarks/tables.py that is about patterns on the demo model: what benchmarks/sharing.py found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merged_tables import markdown

LOSS, POINTS = 0.005, 0.02  # bars: bits per byte and needles against no sharing
Row = Mapping[str, Any]


def patterns(result: Mapping[str, Any]) -> str:
    """A table an artifact, then how much search text it takes, what searches cost and what held the bars."""
    lines: list[str] = []
    for artifact in dict.fromkeys(row["artifact"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["artifact"] == artifact]
        layers = len(rows[0]["pattern"])
        lines += [f"**`{artifact}`: {layers} layers with an index**", "", *_systems(rows), "", *_amounts(rows), ""]
        lines += [*_searches([one for one in result["searches"] if one["artifact"] == artifact]), ""]
    return "\n".join([*lines, _made(result)])


def _systems(rows: Sequence[Row]) -> list[str]:
    """What was judged wholly: on text and needles. The main search's patterns, which others may have found too."""
    most = max((row["windows"] for row in rows if "keep" in row), default=0)
    cells = [_line(row) for row in rows if "points" in row and ("keep" not in row or row["windows"] == most)]
    measures = ["bits per byte", "above searched", "needles", "mass found", "far mass found", "tokens kept"]
    head = ["share", "pattern", "indexers", *measures]
    return markdown(head, cells, 3)


def _line(row: Row) -> list[str]:
    kind = ["trained" if row["trained"] else "as they were"] if "keep" in row else [""]
    above = _difference(row["bits_above_searched"], 2) if "bits_above_searched" in row else ""
    whole = "keep" not in row
    return [
        "" if whole else f"{row['keep']:.0%}",
        row["way"] if whole else f"{row['way']} `{row['pattern']}`",
        *kind,
        f"{row['bits_per_byte']:.4f}" if row["way"] == "no sharing" else _difference(row["bits"], 2),
        above,
        f"{row['needles']:.1%}" if row["way"] == "no sharing" else _difference(row["points"], 1),
        f"{row['recall_mean']:.1%}",
        f"{row['far_mean']:.1%}",
        f"{row['kept_mean']:,.0f}",
    ]


def _amounts(rows: Sequence[Row]) -> list[str]:
    """The smallest keep, untrained, by how much text the search read: what others lose beside the searched one."""
    least = min((row["keep"] for row in rows if "keep" in row), default=None)
    chosen = [row for row in rows if row.get("keep") == least and not row["trained"] and row["way"] != "lazy"]
    ways = [way for way in dict.fromkeys(row["way"] for row in chosen) if way != "searched"]
    cells = []
    for windows, seed in sorted({(row["windows"], row["seed"]) for row in chosen}):
        found = {row["way"]: row for row in chosen if (row["windows"], row["seed"]) == (windows, seed)}
        if "searched" in found:
            above = [_difference(found[way]["bits_above_searched"], 2) if way in found else "" for way in ways]
            cells.append([str(windows), _difference(found["searched"]["bits"], 2), *above])
    head = ["search windows", "searched: bits per byte", *(f"{way}: above searched" for way in ways)]
    return markdown(head, cells, 1) if cells else []


def _searches(searches: Sequence[Row]) -> Iterator[str]:
    """What each cost beside the plain search, and the lazy one's agreement with the exact one."""
    for one in searches:
        windows, tokens = (one[f"layer_{unit}"] / one[f"layer_{unit}_plain"] for unit in ("evaluations", "tokens"))
        of = f"{one['layer_evaluations']:,} of {one['layer_evaluations_plain']:,} layer evaluations"
        said = f"{one['order']}, {one['windows']} windows: {one['candidates']} candidates, {of} ({windows:.0%}"
        said += f"; {tokens:.1%} by tokens), loss of its own text {one['rise']:+.2%}"
        alike = ", ".join(f"{share:.0%} at {float(keep):.0%} kept" for keep, share in one.get("agreement", {}).items())
        yield f"- {said}" + (f"; of the indexers that it or the exact one keeps, both keep {alike}" if alike else "")


def _made(result: Mapping[str, Any]) -> str:
    held = dict.fromkeys(
        f"`{row['artifact']}` {row['way']} {'trained' if row['trained'] else 'as they were'}"
        for row in result["rows"]
        if "points" in row and row.get("keep") == 0.25 and within(row)
    )
    options, names = result["options"], [name for text in result["texts"] for name in text["documents"]]
    asked = options["prompts"] * len(result["texts"])
    return (
        f"A quarter kept within {LOSS:.1%} bits per byte and {POINTS * 100:.0f} points of no sharing: "
        f"{', '.join(held) or 'none'}. Differences are paired, ± one standard error over {result['segments']} held-out "
        f"windows of {options['length']:,} tokens ({options['rows']} decode rows each) out of {len(names)} texts, and "
        f"over {asked} prompts a task ({options['tasks']}); a set a layer everywhere but where it says a set a head. "
        f"Kept indexers were trained for {options['steps']} steps. {result['device']}, torch "
        f"{result['versions']['torch']}: `{result['command']}`."
    )


def within(row: Row) -> bool:
    """Whether it holds the bars; what differences may be, not what they may be by chance."""
    return bool(row["bits"][0] <= LOSS and row["points"][0] >= -POINTS)


def _difference(pair: Sequence[float], digits: int) -> str:
    return f"{pair[0]:+.{digits}%} ± {pair[1]:.{digits}%}"
