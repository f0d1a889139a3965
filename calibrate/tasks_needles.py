"""Needles in natural text (RULER's NIAH types, arXiv 2404.06654, section 3): numbers under keys, asked for at the end.

Statements and questions are sentences that a base model completes as well as an instructed one.
"""

from __future__ import annotations

from sparsec.calibrate.tasks_frame import Draw, Hidden

# Of a few wordings the dense demo model answered these best, in 1024 tokens; no sparse model had a say.
KEYED = '\nThe value of key "{key}" is {value}.\n'
ASKED = '\nThe value of key "{key}" is'
PASSKEY = "\nThe pass key is {value}. Remember it.\n"
ASKED_PASSKEY = "\nWhat is the pass key? The pass key is"


def kv(draw: Draw) -> Hidden:
    """One key with its number."""
    return _one(draw, 1)


def multikey(draw: Draw) -> Hidden:
    """Several keys with a number each; one of the numbers is asked for."""
    return _one(draw, draw.pairs)


def passkey(draw: Draw) -> Hidden:
    """A pass key."""
    draw.words(1)
    [value] = draw.numbers(1)
    return Hidden([PASSKEY.format(value=value)], ASKED_PASSKEY, [value], f" {value}.")


def multivalue(draw: Draw) -> Hidden:
    """One key with several numbers, each in a statement of its own; all are asked for."""
    [key], values = draw.words(1), draw.numbers(draw.pairs)
    statements = [KEYED.format(key=key, value=value) for value in values]
    question = f'\nThe {_spelled(len(values))} values of key "{key}":' + ASKED.format(key=key)
    return Hidden(statements, question, values, _repeated([key] * len(values), values), chatty=8)


def multiquery(draw: Draw) -> Hidden:
    """Several keys with a number each; all numbers are asked for in one question."""
    keys = draw.words(draw.pairs)
    values = draw.numbers(draw.pairs)
    statements = [KEYED.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    named = _listed([f'key "{key}"' for key in keys])
    question = f"\nThe values of {named}:" + ASKED.format(key=keys[0])
    return Hidden(statements, question, values, _repeated(keys, values), chatty=8)


def _one(draw: Draw, count: int) -> Hidden:
    keys = draw.words(count)
    values = draw.numbers(count)
    statements = [KEYED.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    return Hidden(statements, ASKED.format(key=keys[0]), values[:1], f" {values[0]}.")


def _repeated(keys: list[str], values: list[str]) -> str:
    """The statements once more, the first one without what the question has of it already."""
    said = "".join(f"{ASKED.format(key=key)} {value}." for key, value in zip(keys, values, strict=True))
    return said.removeprefix(ASKED.format(key=keys[0]))


def _spelled(number: int) -> str:
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[number] if number < len(words) else str(number)


def _listed(items: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1]) if part)
