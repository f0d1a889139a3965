"""Training windows: natural text, and natural text with facts hidden in it that are asked for at its end.

A long-context model is trained on what it has to keep: prediction of ordinary text, and finding what was said far
away. Facts and questions share no sentence form with the evaluation tasks (``tasks*.py``) and no answer kind: answers
are words and letters here, numbers there. Their words are other ones, too (``needles.ordinary_words``).
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.needles import FIRST, draw_words, filler, ordinary_words
from sparsec.calibrate.splits import Calibration
from sparsec.errors import CalibrationError

# Statement, question, and the answer that completes the question.
FORMS = (
    (
        "Note: the locker of the {key} opens with the word {word}.",
        "The locker of the {key} opens with the word",
        "{word}",
    ),
    (
        "According to the {key}, the meeting place was called {word}.",
        "The meeting place of the {key} was called",
        "{word}",
    ),
    ("Everybody who knew the {key} used the nickname {word}.", "The nickname of the {key} is", "{word}"),
    ("A badge with the letters {code} was given to the {key}.", "The badge of the {key} has the letters", "{code}"),
    ("The boat of the {key} was registered as {code}.", "The boat of the {key} was registered as", "{code}"),
    ("For the {key} they chose {word} and {other}.", "What they chose for the {key} were", "{word} and {other}"),
)
MOST = 12  # facts a window
QUESTION = 40  # tokens that a question and its answer may take


@dataclass(frozen=True)
class Windows:
    """Training windows, and where their answers are."""

    tokens: Tensor  # int64 [windows, length]
    asked: Tensor  # bool [windows]: which have questions
    answers: Tensor  # bool [windows, length]: rows whose next token belongs to an answer


def training_windows(
    calibration: Calibration, split: str, *, length: int, count: int, rows: int, questions: float, seed: int
) -> Windows:
    """Windows for distillation, the same ones for the same arguments.

    Args:
        split: where text and words are from.
        length: tokens of a window, a BOS token included.
        count: windows.
        rows: the last so many tokens are decode rows; questions and answers lie in them.
        questions: share of windows with hidden facts.
        seed: of everything drawn.

    Raises:
        CalibrationError: the split has no document of that length, or too few ordinary words; or a window has no
            room for a question.
    """
    if length < FIRST + 2 * rows:
        raise CalibrationError(
            f"training windows of {length} tokens cannot hold {rows} decode rows and a prompt as long: "
            "use a longer context or fewer rows"
        )
    tokens = filler(calibration, split, length, count, seed)
    vocabulary = ordinary_words(calibration, split) if questions else {}
    asked = torch.zeros(count, dtype=torch.bool)
    answers = torch.zeros(count, length, dtype=torch.bool)
    for number, text in enumerate(tokens):
        # Evenly spread, so that a batch of neighbours is mixed.
        asked[number] = int((number + 1) * questions) > int(number * questions)
        if asked[number]:
            rng = random.Random(f"{seed}/questions/{length}/{number}")
            tokens[number], answers[number] = _with_questions(calibration, text, vocabulary, rows, rng)
    return Windows(tokens, asked, answers)


def _with_questions(
    calibration: Calibration, text: Tensor, vocabulary: dict[str, list[int]], rows: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """The window with facts before its decode rows, and questions with their answers as its last tokens."""
    tokenizer, length = calibration.tokenizer, len(text)
    count = min(rng.randint(1, MOST), max(1, (rows - 1) // QUESTION))
    words = draw_words(vocabulary, tokenizer.decode(text), 3 * count, rng)
    facts, asked = [], []
    for number in range(count):
        key, word, other = words[3 * number : 3 * number + 3]
        code = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, 6)))
        statement, question, answer = (
            part.format(key=key, word=word, other=other, code=code) for part in rng.choice(FORMS)
        )
        facts.append(f"\n{statement}\n")
        asked.append((f"\n{question}", f" {answer}", "."))
    rng.shuffle(asked)
    end, answers = _end(tokenizer, asked)
    hidden = _encode(tokenizer, facts)
    if len(end) >= rows:  # rare: long words; ask fewer
        end, answers = _end(tokenizer, asked[:1])
    body = length - len(end) - sum(map(len, hidden))
    if len(end) >= rows or body <= FIRST + 1:
        raise CalibrationError(
            f"windows of {length} tokens with {rows} decode rows cannot hold a fact and a question about it: "
            "use a longer context or more rows"
        )
    last = max(FIRST + 1, body - (rows - len(end)))  # facts lie before the decode rows
    places = sorted(rng.randint(FIRST, last) for _ in hidden)
    parts, done = [], 0
    for place, fact in zip(places, hidden, strict=True):
        parts += [text[done:place], fact]
        done = place
    marked = torch.zeros(length, dtype=torch.bool)
    marked[length - len(end) - 1 : -1] = answers  # a row reads off the token behind it
    return torch.cat([*parts, text[done:body], end]), marked


def _end(tokenizer: Any, asked: Sequence[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
    """Questions with their answers, one behind another: tokens, and which of them hold some of an answer."""
    text, spans = "", []
    for question, answer, stop in asked:
        text += question
        spans.append((len(text), len(text) + len(answer)))
        text += answer + stop
    text += "\n"
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, places = torch.tensor(made["input_ids"], dtype=torch.long), made["offset_mapping"]
    else:  # Python code that does not say which characters a token stands for: it reads what is before them
        tokens, *before = _encode(tokenizer, [text, *(text[:end] for span in spans for end in span)])
        numbers = [len(ids) for ids in before]
        spans, places = list(zip(numbers[::2], numbers[1::2], strict=True)), [(n, n + 1) for n in range(len(tokens))]
    return tokens, torch.tensor([any(begin < to and at < end for begin, end in spans) for at, to in places])


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [torch.tensor(part, dtype=torch.long) for part in ids]
