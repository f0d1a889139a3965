"""Aggregation (RULER, arXiv 2404.06654, section 3.3): the words that stand most often in a long list.

Nothing here can be found at one place: what is asked is spread over the whole text.
"""

from __future__ import annotations

from string import ascii_lowercase

from sparsec.calibrate.tasks_frame import Draw, Listing, too_short
from sparsec.errors import CalibrationError

COMMON, OFTEN, SELDOM = 10, 30, 3  # RULER's: ten words 30 times each, all others three times
CODED, LETTERS, ALPHA = 3, 6, 2.0  # RULER's: three coded words asked for, of six letters, frequencies rank ** -2
NOISE = " ...."


def common(draw: Draw) -> Listing:
    """Common words extraction: ten ordinary words are frequent, all others rare; the ten are asked for.

    A solved example of a few words comes first, as in RULER. Where 30 repetitions would fill more than half of the
    room, there are fewer: as many as do, and a tenth of them for the rare ones.
    """
    heading = "\nThe words of the list that are there most often are its common words.\n"
    question = (
        f"\nQuestion: what are the {COMMON} most common words of the list? "
        f"Answer: the {COMMON} words that appear most often are:"
    )
    shown = draw.words(COMMON + 4)
    sample = [word for word in shown[:COMMON] for _ in range(3)] + shown[COMMON:]
    draw.rng.shuffle(sample)
    heading += f"Example list:{_spoken(sample)}\n{question.strip()} {', '.join(shown[:COMMON])}.\nList:"
    size = len(next(iter(draw.haystack.words.values())))
    fits = draw.room(heading, question) // size
    # Half of a short list are the common words; in a long one repetitions grow where ordinary words run out.
    often = min(OFTEN, fits // (2 * COMMON))
    if often < 4:
        raise too_short(draw.length, draw.length + size * (8 * COMMON - fits), "the task common")
    seldom = max(1, often * SELDOM // OFTEN)
    supply = draw.supply() - COMMON
    if (fits - often * COMMON) // seldom > supply:
        seldom = -(-fits // (supply + COMMON * OFTEN // SELDOM))
        often = seldom * OFTEN // SELDOM
    rare = (fits - often * COMMON) // seldom
    if rare < COMMON:
        raise CalibrationError(
            f"the held-out text has {supply + COMMON} ordinary words for the task common, it needs more: "
            "name more text, or leave the task out"
        )
    words = draw.words(COMMON + rare)
    order = [word for word in words[:COMMON] for _ in range(often)] + [w for w in words[COMMON:] for _ in range(seldom)]
    draw.rng.shuffle(order)
    lines = [draw.haystack.words[word] for word in order]
    answers = words[:COMMON]
    return Listing(heading, lines, question, answers, f" {', '.join(answers)}.", chatty=COMMON * size)


def frequent(draw: Draw) -> Listing:
    """Frequent words extraction: coded words and dots with Zipf frequencies; the top three words are asked for."""
    heading = "\nRead the following coded text and count how often each coded word appears.\n"
    question = (
        "\nQuestion: what are the three most frequent words in the coded text? Leave out the dots. "
        "Answer: the three most frequent words in the coded text are:"
    )
    room = draw.room(heading, question)
    codes = draw.codes(max(8, min(2000, room // 8)), LETTERS, ascii_lowercase)
    lines = draw.haystack.encode([NOISE, *(f" {code}" for code in codes)])
    weights = [(rank + 1) ** -ALPHA for rank in range(len(lines))]
    unit = sum(weight * len(line) for weight, line in zip(weights, lines, strict=True))
    times = [int(room / unit * weight) for weight in weights]
    # Truncation may leave ranks equal; the last one asked for must stand out.
    if times[CODED] - times[CODED + 1] < 1 or times[CODED] < 3:
        raise too_short(draw.length, draw.length + int(unit * 3 / weights[CODED]) + 64, "the task frequent")
    order = [line for line, count in zip(lines, times, strict=True) for _ in range(count)]
    draw.rng.shuffle(order)
    answers = codes[:CODED]
    return Listing(heading, order, question, answers, f" {', '.join(answers)}.", chatty=8)


def _spoken(words: list[str]) -> str:
    return "".join(f" {word}" for word in words)
