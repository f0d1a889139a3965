"""What evaluation tasks are made of: natural text, something hidden in it or listed after it, a question at the end.

A task's function gets a :class:`Draw` (words, numbers and randomness of one prompt) and says what is asked: a
:class:`Hidden` is put into natural text line by line, a :class:`Listing` follows a little of it as one block. This file
puts either together, as long as asked to the token.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sparsec.calibrate.needles import FIRST, LETTERS, draw_words, filler, ordinary_words
from sparsec.calibrate.splits import Calibration
from sparsec.errors import CalibrationError

SHALLOWEST, DEEPEST = 0.05, 0.9
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill [0, 1) evenly however many there are
DIGITS = (5, 7)
MANY = 64  # numbers of one length are no part of each other without a look at all pairs
SPARE = 2  # tokens generated beyond an answer, to see that its number or word ends there


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    ``tokens`` int64 [length]; ``answers``, all asked for; ``depth``, the share of the length at which the first asked
    statement stands (None where the whole text is the statement); ``budget``, new tokens that an answer may take;
    ``completion``, a continuation that answers everything.
    """

    tokens: Tensor
    answers: tuple[str, ...]
    depth: float | None
    budget: int
    completion: str

    @property
    def answer(self) -> str:
        """The first answer."""
        return self.answers[0]


@dataclass(frozen=True)
class Hidden:
    """Statements to be put into natural text; the first one is asked for."""

    statements: Sequence[str]
    question: str
    answers: Sequence[str]
    completion: str
    intro: str = ""  # said early, before any statement
    in_order: bool = False  # statements stand in the order given, else from wherever the first one is
    chatty: int = 0  # tokens that a right answer may waste on other words


@dataclass(frozen=True)
class Listing:
    """A block of lines or words after a little natural text, up to the question. ``lines`` are token ids."""

    heading: str
    lines: Sequence[Sequence[int]]
    question: str
    answers: Sequence[str]
    completion: str
    asked: int | None = None  # the line asked for first
    chatty: int = 0


class Haystack:
    """The natural text of a split, and what is worked out about it once for all prompts."""

    def __init__(self, calibration: Calibration, split: str = "heldout") -> None:
        self.calibration, self.split = calibration, split
        self.tokenizer = calibration.tokenizer

    @cached_property
    def words(self) -> dict[str, list[int]]:
        """Ordinary words with their tokens behind a space, all of one number of tokens."""
        return ordinary_words(self.calibration, self.split)

    def texts(self, length: int, count: int, seed: int) -> Tensor:
        """int64 [count, length], each out of one document."""
        return filler(self.calibration, self.split, length, count, seed)

    def line_starts(self, text: Tensor) -> list[int]:
        """The tokens that start a line."""
        different, places = torch.unique(text, return_inverse=True)
        ends = torch.tensor([token.endswith("\n") for token in self.tokenizer.batch_decode(different[:, None])])
        return [int(at) + 1 for at in ends[places].nonzero()[:, 0]]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return ids


@dataclass
class Draw:
    """What one prompt draws at random; nothing drawn is in its text, or drawn twice."""

    haystack: Haystack
    rng: random.Random
    text: str  # the natural text around
    length: int  # tokens of the prompt
    gap: int  # tokens at least between what is asked and the question
    pairs: int  # statements of tasks that hide several
    taken: list[str] = field(default_factory=list)

    def supply(self) -> int:
        """How many words can still be drawn."""
        present = set(LETTERS.findall(" ".join([self.text, *self.taken]).lower()))
        return sum(word not in present for word in self.haystack.words)

    def words(self, count: int) -> list[str]:
        """Different ordinary words."""
        found = draw_words(self.haystack.words, " ".join([self.text, *self.taken]), count, self.rng)
        self.taken += found
        return found

    def numbers(self, count: int) -> list[str]:
        """Different numbers, none part of another: of five to seven digits, all of seven where there are many."""
        values: dict[str, None] = {}
        many = count > MANY
        while len(values) < count:
            size = DIGITS[1] if many else self.rng.randint(*DIGITS)
            value = str(self.rng.randrange(10 ** (size - 1), 10**size))
            others = self.taken if many else [*self.taken, *values]
            if value not in self.text and not any(value in other or other in value for other in others):
                values[value] = None
        self.taken += values
        return list(values)

    def codes(self, count: int, size: int, alphabet: str) -> list[str]:
        """Different strings of random letters."""
        codes: list[str] = []
        while len(codes) < count:
            code = "".join(self.rng.choice(alphabet) for _ in range(size))
            if code not in self.text and code not in codes and code not in self.taken:
                codes.append(code)
        self.taken += codes
        return codes

    def room(self, heading: str, question: str) -> int:
        """Tokens that the lines of a listing may take.

        Raises:
            CalibrationError: none at all.
        """
        spent = FIRST + sum(map(len, self.haystack.encode([heading, question])))
        if self.length <= spent:
            raise too_short(self.length, spent + 1)
        return self.length - spent

    def lines_between(
        self, asked: Sequence[str], others: Sequence[str], room: int
    ) -> tuple[list[list[int]], list[int]]:
        """``asked`` lines evenly among as many of the ``others`` as the room holds, and where the asked ones are.

        Behind the last asked line there are ``gap`` tokens at least. Lines are token ids.

        Raises:
            CalibrationError: the room does not hold the asked lines and as many others.
        """
        mine, rest = self.haystack.encode(asked), self.haystack.encode(others)
        free = room - sum(map(len, mine))
        fits = sum(1 for total in itertools.accumulate(map(len, rest)) if total <= free)
        if fits < len(asked) or free < self.gap:
            few = sum(map(len, rest[: len(asked)]))
            raise too_short(self.length, self.length - free + max(few, round(self.gap * 1.5)))
        rest = rest[:fits]
        after = itertools.accumulate(map(len, reversed(rest)))
        behind = 1 + sum(1 for total in after if total < self.gap)
        slots, start = fits - behind + 1, self.rng.random()
        places = [int(slots * ((start + number / len(asked)) % 1)) for number in range(len(asked))]
        lines: list[list[int]] = []
        at = [0] * len(asked)
        for place in range(fits + 1):
            for number in [n for n, wanted in enumerate(places) if wanted == place]:
                at[number] = len(lines)
                lines.append(mine[number])
            lines += rest[place : place + 1]
        return lines, at


def assemble(
    made: Hidden | Listing, task: str, haystack: Haystack, text: Tensor, *, at: float, gap: int | None
) -> Prompt:
    """The prompt, as long as ``text``.

    Args:
        at: where in its room the first statement is put, 0 to 1.
        gap: tokens at least between a statement and the question; None: see :func:`least_gap`.

    Raises:
        CalibrationError: the length cannot hold that; the message says which one can.
    """
    budget = len(haystack.encode([made.completion])[0]) + SPARE + made.chatty
    put = _hide(made, task, haystack, text, at, gap) if isinstance(made, Hidden) else _listed(made, haystack, text)
    return Prompt(put[0], tuple(made.answers), put[1], budget, made.completion)


def least_gap(length: int, gap: int | None) -> int:
    """Tokens between a statement and the question, where none are given: 600 or 30 % of the length, what is less."""
    return min(600, int(0.3 * length)) if gap is None else gap


def too_short(length: int, needed: int, task: str = "a task's list") -> CalibrationError:
    """The error of a length that cannot hold a task."""
    return CalibrationError(f"{length} tokens cannot hold {task}: use prompts of {needed} tokens or more")


def _hide(
    made: Hidden, task: str, haystack: Haystack, text: Tensor, at: float, gap: int | None
) -> tuple[Tensor, float]:
    *statements, asked, intro = map(torch.tensor, haystack.encode([*made.statements, made.question, made.intro or "."]))
    intro = intro[: len(intro) if made.intro else 0].long()
    added = sum(map(len, statements)) + len(asked) + len(intro)
    room = _room(task, len(text), added, gap)
    places = _places(len(statements), room, at, haystack.line_starts(text), len(text) // 32)
    if made.in_order:
        places.sort()
    parts, done, depth = [text[:FIRST], intro], FIRST, 0.0
    for number in sorted(range(len(statements)), key=places.__getitem__):
        parts.append(text[done : places[number]])
        if number == 0:
            depth = sum(map(len, parts)) / len(text)
        parts.append(statements[number])
        done = places[number]
    parts.append(text[done : len(text) - added])
    return torch.cat([*parts, asked]), depth


def _room(task: str, length: int, added: int, gap: int | None) -> range:
    """The tokens of the text before which a statement may be put; ``added`` tokens are not the text's."""

    def room(length: int) -> range:
        last = min(length - added - least_gap(length, gap), int(DEEPEST * length) - added)
        return range(max(FIRST, round(SHALLOWEST * length)), last + 1)

    if not room(length):
        needed = next(longer for longer in itertools.count(length) if room(longer))
        before = f"the task {task} with a gap of {least_gap(length, gap)} tokens before its question"
        raise too_short(length, needed, before)
    return room(length)


def _places(count: int, room: range, at: float, breaks: list[int], near: int) -> list[int]:
    """Where to put the statements: evenly spread over the room, the first one at the share ``at`` of it.

    Where a line of the text starts near a place, the place is there.
    """
    places = [room[int(len(room) * ((at + number / count) % 1))] for number in range(count)]
    starts = [start for start in breaks if start in room]
    moved = [min(starts, key=lambda start: abs(start - place), default=place) for place in places]
    return [to if abs(to - place) <= near else place for to, place in zip(moved, places, strict=True)]


def _listed(made: Listing, haystack: Haystack, text: Tensor) -> tuple[Tensor, float | None]:
    """Text, heading, lines, question: the text takes what the others leave."""
    heading, question = map(torch.tensor, haystack.encode([made.heading, made.question]))
    lines = torch.tensor([token for line in made.lines for token in line])
    free = len(text) - len(heading) - len(lines) - len(question)
    depth = None
    if made.asked is not None:
        depth = (free + len(heading) + sum(map(len, made.lines[: made.asked]))) / len(text)
    return torch.cat([text[:free], heading, lines, question]), depth
