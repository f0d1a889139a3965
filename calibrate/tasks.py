"""Evaluation tasks answered by generating: a number hidden in natural text, asked for at the end.

Statements and questions are sentences that a base model completes as well as an instructed one. They share
nothing with the needles that heads are chosen by (``needles.py``), and their text is of another split.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from sparsec.calibrate.needles import FIRST, draw_words, filler, ordinary_words
from sparsec.calibrate.splits import Calibration
from sparsec.errors import CalibrationError, UsageError

TASKS: dict[str, str] = {
    "kv": "one key with its number hidden in natural text, the number asked for",
    "multikey": "several keys with their numbers hidden in natural text, one of the numbers asked for",
    "passkey": "a pass key hidden in natural text and asked for",
}
# The statement that is hidden, and the question whose completion is the answer. Of a few wordings the dense demo
# model answered these best (four keys and a pass key, in 1024 tokens); no sparse model had a say.
KEYED = ('\nThe value of key "{key}" is {value}.\n', '\nThe value of key "{key}" is')
FORMS: dict[str, tuple[str, str]] = {
    "kv": KEYED,
    "multikey": KEYED,
    "passkey": ("\nThe pass key is {value}. Remember it.\n", "\nWhat is the pass key? The pass key is"),
}
DIGITS = (5, 7)
SHALLOWEST, DEEPEST = 0.05, 0.9
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill [0, 1) evenly however many there are


@dataclass(frozen=True)
class Prompt:
    """``tokens`` int64 [length]; ``depth``, a share of the length, is where the asked number is stated."""

    tokens: torch.Tensor
    answer: str
    depth: float


@dataclass(frozen=True)
class Score:
    """Shares of right answers and of right digits; ``right`` is prompt by prompt, for paired comparisons."""

    exact: float
    digits: float
    n: int
    right: tuple[bool, ...]


def prompts(
    task: str,
    calibration: Calibration,
    *,
    length: int,
    count: int,
    seed: int,
    split: str = "heldout",
    gap: int | None = None,
    pairs: int = 4,
) -> list[Prompt]:
    """Prompts of a task, the same ones for the same arguments; fewer are the first ones of more.

    Statements start 64 tokens or more into the text, which is of one document; different prompts may share
    text. Depths are spread evenly over what 5 to 90 % of the length and the gap leave.

    Args:
        task: one of :data:`TASKS`.
        length: tokens of every prompt, exactly, a BOS token and the question included.
        gap: tokens at least between a statement and the question: take more than the window.
            None is 600 or 30 % of the length, whichever is less.
        pairs: keys in a prompt of the task ``multikey``.

    Raises:
        CalibrationError: the length cannot hold that, or the split has no document so long.
        UsageError: an unknown task, or nothing is asked for.
    """
    if task not in TASKS:
        raise UsageError(f"no task {task!r}: choose from {', '.join(TASKS)}")
    if min(count, pairs) < 1:
        raise UsageError(f"{count} prompts with {pairs} keys: ask for one or more of each")
    vocabulary = ordinary_words(calibration, split)
    texts = filler(calibration, split, length, count, seed)
    start = random.Random(f"{seed}/{task}/{length}").random()
    made = []
    for number, text in enumerate(texts):
        rng = random.Random(f"{seed}/{task}/{length}/{number}")
        read = calibration.tokenizer.decode(text)
        keys = draw_words(vocabulary, read, pairs if task == "multikey" else 1, rng)
        values = _values(len(keys), read, rng)
        hidden, asked = _written(task, calibration.tokenizer, keys, values)
        room = _room(task, length, sum(map(len, hidden)) + len(asked), gap)
        breaks = _line_breaks(calibration.tokenizer, text)
        places = _places(len(keys), room, (start + number * GOLDEN) % 1, breaks, length // 32)
        tokens, depth = _assemble(text, hidden, places, asked)
        made.append(Prompt(tokens, values[0], depth))
    return made


def answer_batch(model: Any, tokenizer: Any, batch: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
    """What the model generates after each prompt, greedily: the new text only.

    Raises:
        UsageError: prompts of different lengths.
    """
    if len({len(prompt.tokens) for prompt in batch}) != 1:
        raise UsageError("a batch needs prompts of one length: answer each length on its own")
    ids = torch.stack([prompt.tokens for prompt in batch]).to(model.device)
    with _greedy(model, tokenizer, max_new_tokens):
        out = model.generate(ids, attention_mask=torch.ones_like(ids))
    texts: list[str] = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Let the model answer all prompts. An answer is the first number generated.

    Args:
        progress: called with the prompts done and their total after every batch.

    Raises:
        UsageError: no prompts, or prompts of different lengths.
    """
    if not prompts:
        raise UsageError("there are no prompts to score: ask for one or more")
    longest = max(
        len(ids) for ids in tokenizer([f" {p.answer}" for p in prompts], add_special_tokens=False)["input_ids"]
    )
    right, digits = [], 0.0
    for at in range(0, len(prompts), batch_size):
        batch = prompts[at : at + batch_size]
        # Two tokens more than the answer, to see that its number ends there.
        for prompt, text in zip(batch, answer_batch(model, tokenizer, batch, max_new_tokens=longest + 2), strict=True):
            number = re.search(r"\d+", text)
            given = number.group() if number else ""
            right.append(given == prompt.answer)
            same = sum(a == b for a, b in zip(given, prompt.answer, strict=False))
            digits += same / max(len(given), len(prompt.answer))
        if progress is not None:
            progress(len(right), len(prompts))
    return Score(sum(right) / len(right), digits / len(right), len(right), tuple(right))


def _values(count: int, text: str, rng: random.Random) -> list[str]:
    """Random numbers as digits, none part of another or of the text."""
    values: list[str] = []
    while len(values) < count:
        size = rng.randint(*DIGITS)
        value = str(rng.randrange(10 ** (size - 1), 10**size))
        if value not in text and not any(value in other or other in value for other in values):
            values.append(value)
    return values


def _written(task: str, tokenizer: Any, keys: list[str], values: list[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The tokens of each key's statement, and of the question for the first key."""
    statement, question = FORMS[task]
    texts = [statement.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    ids = tokenizer([*texts, question.format(key=keys[0])], add_special_tokens=False)["input_ids"]
    *hidden, asked = (torch.tensor(part, dtype=torch.long) for part in ids)
    return hidden, asked


def _room(task: str, length: int, added: int, gap: int | None) -> range:
    """The tokens of the text before which a statement may be put; ``added`` tokens are not the text's."""

    def room(length: int) -> range:
        last = min(length - added - _gap(length, gap), int(DEEPEST * length) - added)
        return range(max(FIRST, round(SHALLOWEST * length)), last + 1)

    if not room(length):
        needed = next(longer for longer in itertools.count(length) if room(longer))
        raise CalibrationError(
            f"{length} tokens cannot hold the task {task} with a gap of {_gap(length, gap)} tokens before its "
            f"question: use prompts of {needed} tokens or more"
        )
    return room(length)


def _gap(length: int, gap: int | None) -> int:
    return min(600, int(0.3 * length)) if gap is None else gap


def _line_breaks(tokenizer: Any, text: torch.Tensor) -> list[int]:
    """The tokens that start a line."""
    decoded = tokenizer.batch_decode(text[:, None])
    return [number for number, token in enumerate(decoded, start=1) if token.endswith("\n")]


def _places(count: int, room: range, at: float, breaks: list[int], near: int) -> list[int]:
    """Where to put the statements: evenly spread over the room, the first one at the share ``at`` of it.

    Where a line of the text starts near a place, the place is there.
    """
    places = [room[int(len(room) * ((at + number / count) % 1))] for number in range(count)]
    starts = [start for start in breaks if start in room]
    moved = [min(starts, key=lambda start: abs(start - place), default=place) for place in places]
    return [to if abs(to - place) <= near else place for to, place in zip(moved, places, strict=True)]


def _assemble(
    text: torch.Tensor, hidden: list[torch.Tensor], places: list[int], asked: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The prompt, as long as the text, whose end makes room; and the depth of the first statement."""
    parts: list[torch.Tensor] = []
    done, depth = 0, 0.0
    for number in sorted(range(len(hidden)), key=places.__getitem__):
        parts.append(text[done : places[number]])
        if number == 0:
            depth = sum(map(len, parts)) / len(text)
        parts.append(hidden[number])
        done = places[number]
    parts.append(text[done : len(text) - sum(map(len, hidden)) - len(asked)])
    return torch.cat([*parts, asked]), depth


@contextmanager
def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Inside the block ``model.generate`` is plainly greedy.

    Settings that come with a model (repetition penalty, suppressed tokens) would change the answers, and
    arguments of ``generate`` do not reset them all.
    """
    own = model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = next(iter(end), 0) if isinstance(end, list) else end or 0
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad
    )
    try:
        yield
    finally:
        model.generation_config = own
