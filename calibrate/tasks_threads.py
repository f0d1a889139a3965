"""Needle threading ("Needle Threading", arXiv 2411.05000): a key's value is the next key; follow it to the end.

Links of several threads stand in the text in random order, as pairs of a JSON object. The answer is written as a walk,
a pair a line, so that a model may look each one up as it goes. Two solved walks come before the asked one, as a
pattern; their pairs stand in the text too. All words that the walk comes to are answers: the share found says how far
it came.
"""

from __future__ import annotations

from itertools import pairwise

from sparsec.calibrate.tasks_frame import Draw, Hidden

STEPS = 3  # links to follow
SOLVED = 2  # walks shown before the asked one
OTHERS = 1  # threads that are neither shown nor asked for
BRANCHES = 2  # links out of each word of a branching thread, one of which leads on
LINK = '"{start}": "{end}",\n'
ASKED = '"{start}":'


def thread(draw: Draw) -> Hidden:
    """One thread: all words from its start to its end."""
    return _hidden(draw, [_path(draw)], "Walks")


def multithread(draw: Draw) -> Hidden:
    """Two threads asked for one after the other."""
    paths = [_path(draw), _path(draw)]
    return _hidden(draw, paths, f'Walks, the last two from "{paths[0][0]}" and from "{paths[1][0]}"')


def branches(draw: Draw) -> Hidden:
    """A branching thread: words lead two ways and one of them ends there; the longest walk is asked for."""
    path = _path(draw)
    # Not from the last word but one: there both ways would be equally long.
    ends = [(start, end) for start in path[: STEPS - 1] for end in draw.words(BRANCHES - 1)]
    return _hidden(draw, [path], "The longest walks", ends)


def _path(draw: Draw) -> list[str]:
    return draw.words(STEPS + 1)


def _hidden(draw: Draw, paths: list[list[str]], title: str, dead_ends: list[tuple[str, str]] | None = None) -> Hidden:
    solved, others = ([_path(draw) for _ in range(count)] for count in (SOLVED, OTHERS))
    first, *links = [link for path in (*paths, *solved, *others) for link in pairwise(path)]
    links += dead_ends or []
    draw.rng.shuffle(links)
    asked = ASKED.format(start=paths[0][0])
    return Hidden(
        ["\n" + LINK.format(start=start, end=end) for start, end in (first, *links)],
        f"\n{title}:\n" + "".join(f"{_walk(path)}\n" for path in solved) + asked,
        [word for path in paths for word in path[1:]],
        "\n".join(map(_walk, paths)).removeprefix(asked),
        chatty=4,
    )


def _walk(path: list[str]) -> str:
    return "".join(LINK.format(start=start, end=end) for start, end in pairwise(path))
