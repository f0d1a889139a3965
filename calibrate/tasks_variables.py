"""Variable tracking (RULER, arXiv 2404.06654, section 3.2): which variables hold a value, by a chain of assignments.

One chain, spread over the text in its order: ``VAR A = 12345``, ``VAR B = VAR A``, ... All its variables are asked for.
As in RULER a short solved example comes before the text.
"""

from __future__ import annotations

from string import ascii_uppercase

from sparsec.calibrate.tasks_frame import Draw, Hidden

SIZE = 3  # letters of a name; RULER's five are five tokens in many vocabularies
EXAMPLE = 3  # variables of the solved example
QUESTION = "\nThe variables with the value {value} are VAR"


def variables(draw: Draw) -> Hidden:
    """The variables of a chain, as many as ``pairs``."""
    count = max(2, draw.pairs)
    names = draw.codes(count + EXAMPLE, SIZE, ascii_uppercase)
    value, shown = draw.numbers(2)
    chain, solved = names[:count], names[count:]
    example = "".join(_chain(solved, shown)) + QUESTION.format(value=shown).lstrip("\n") + _all(solved)
    return Hidden(
        [f"\n{line}" for line in _chain(chain, value)],
        QUESTION.format(value=value),
        chain,
        _all(chain),
        intro=f"\n{example}\n\n",
        in_order=True,
        chatty=4,
    )


def _chain(names: list[str], value: str) -> list[str]:
    """A line an assignment."""
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {source}\n" for name, source in zip(names, sources, strict=True)]


def _all(names: list[str]) -> str:
    return f" {', VAR '.join(names)}."
