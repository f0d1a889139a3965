"""Key-value lookup: a long list of pairs that look alike, one of them asked for.

RULER's hardest single-answer needle (arXiv 2404.06654: multi-key NIAH whose haystack is needles only) and the task of
"Lost in the Middle" (arXiv 2307.03172): every line is a distractor, no natural text sets the right one apart.
"""

from __future__ import annotations

from sparsec.calibrate.tasks_frame import Draw, Listing

HEADING = "\nA JSON object with a number for each name:\n{\n"
QUESTION = '}}\n "{name}":'
LINE = 10  # tokens of a line, about


def lookup(draw: Draw) -> Listing:
    """The number of one name among as many as the length holds; names are words, or two words where those run out."""
    room = draw.room(HEADING, QUESTION.format(name="example-example"))
    count = max(2, room // LINE)
    names = draw.words(max(2, min(count, draw.supply())))
    if len(names) < count:
        names = [f"{first}-{second}" for first in names[:100] for second in names[:100] if first != second]
        draw.rng.shuffle(names)
    values = draw.numbers(len(names[:count]))
    rows = [f' "{name}": {value},\n' for name, value in zip(names, values, strict=False)]
    lines, [at] = draw.lines_between(rows[:1], rows[1:], room)
    return Listing(HEADING, lines, QUESTION.format(name=names[0]), values[:1], f" {values[0]},", asked=at)
