"""Reasoning without downloads: sums in several steps, and things that change their place, told in natural text.

Both are told step by step, in order, somewhere in the text; the answer is stated nowhere as one. State tracking is of
bAbI's kind (arXiv 1502.05698: the last of several moves counts), the sums are those of grade-school word problems
without the prose, behind a solved example. Small models answer little of either: the dense model's score says how
much to read into a difference.
"""

from __future__ import annotations

from sparsec.calibrate.tasks_frame import Draw, Hidden

STEPS = 3  # after the first statement
LARGEST = 9  # added or taken in a step


def arithmetic(draw: Draw) -> Hidden:
    """How many are left after ``STEPS`` changes; the answer differs from every number that is stated."""
    thing, shown = draw.words(2)
    lines, answer = _sums(draw, thing)
    example, solved = _sums(draw, shown)
    return Hidden(
        [f"\n{line}\n" for line in lines],
        f"\nAfter all changes, the number of {thing} cards is",
        [str(answer)],
        f" {answer}.",
        intro="\n" + "\n".join([*example, f"After all changes, the number of {shown} cards is {solved}."]) + "\n\n",
        in_order=True,
    )


def _sums(draw: Draw, thing: str) -> tuple[list[str], int]:
    """The lines of a problem, and what comes out."""
    while True:
        total = draw.rng.randint(20, 60)
        lines, stated = [f"There are {total} {thing} cards."], {total}
        for _ in range(STEPS):
            change = draw.rng.choice([-1, 1]) * draw.rng.randint(2, LARGEST)
            total += change
            stated.add(abs(change))
            lines.append(f"Then {abs(change)} {thing} cards are {'added' if change > 0 else 'removed'}.")
        if total not in stated:
            return lines, total


def places(draw: Draw) -> Hidden:
    """Where a thing is after several moves, another thing moving too."""
    thing, other, *rooms = draw.words(2 + STEPS + 1)
    lines = [f"\nThe {thing} is put into the {rooms[0]} box.\n"]
    for number in range(1, STEPS + 1):
        lines.append(f"\nThen the {thing} is moved to the {rooms[number]} box.\n")
    # The other thing ends where the asked one was before, so the last box that is named does not always answer.
    lines.append(f"\nThen the {other} is moved to the {rooms[draw.rng.randrange(STEPS)]} box.\n")
    return Hidden(
        lines,
        f"\nNow the {thing} is in the box named",
        [rooms[STEPS]],
        f" {rooms[STEPS]}.",
        in_order=True,
    )
