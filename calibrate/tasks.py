"""Evaluation tasks answered by generating: what there is, prompts of them, and the score of a model's answers.

Texts and words are of the held-out split. Tasks share no sentence with the needles that heads are chosen by
(``needles.py``) nor with the questions that weights are trained on (``questions.py``).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from sparsec.calibrate import (
    tasks_lookup,
    tasks_needles,
    tasks_qa,
    tasks_reasoning,
    tasks_threads,
    tasks_variables,
    tasks_words,
)
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks_frame import GOLDEN, Draw, Haystack, Hidden, Listing, Prompt, assemble, least_gap
from sparsec.errors import UsageError
from sparsec.plugins.merged_writing import base_tokens
from sparsec.plugins.vocabulary import read

__all__ = ["GROUPS", "TASKS", "Haystack", "Prompt", "Score", "answer_batch", "greedy", "named", "prompts", "score"]


@dataclass(frozen=True)
class Task:
    """What is asked, and the function that draws it."""

    summary: str
    make: Callable[[Draw], Hidden | Listing]


TASKS: dict[str, Task] = {
    "kv": Task("one key with its number hidden in natural text, the number asked for", tasks_needles.kv),
    "multikey": Task("several keys with a number each, one of the numbers asked for", tasks_needles.multikey),
    "passkey": Task("a pass key hidden in natural text and asked for", tasks_needles.passkey),
    "multivalue": Task("one key with several numbers, all asked for", tasks_needles.multivalue),
    "multiquery": Task("several keys with a number each, all asked for at once", tasks_needles.multiquery),
    "variables": Task("a chain of assignments, all variables with the value asked for", tasks_variables.variables),
    "common": Task("the ten words that a long list has most often", tasks_words.common),
    "frequent": Task("the three most frequent coded words of a text of them", tasks_words.frequent),
    "lookup": Task("the number of one name in a long list of names and numbers", tasks_lookup.lookup),
    "qa": Task("a fact about a person, told among facts about others, asked in other words", tasks_qa.qa),
    "thread": Task("a key leads to the next one: a walk of three steps", tasks_threads.thread),
    "multithread": Task("two such walks, one after the other", tasks_threads.multithread),
    "branches": Task("the longest walk where keys lead two ways", tasks_threads.branches),
    "arithmetic": Task("a number after several changes, told one by one", tasks_reasoning.arithmetic),
    "places": Task("where a thing is after several moves, another moving too", tasks_reasoning.places),
}
NEEDLES = ("kv", "multikey", "passkey", "multivalue", "multiquery")
GROUPS: dict[str, tuple[str, ...]] = {
    "needles": NEEDLES,
    "ruler": (*NEEDLES, "variables", "common", "frequent", "lookup", "qa"),
    "threads": ("thread", "multithread", "branches"),
    "reasoning": ("arithmetic", "places"),
    "all": tuple(TASKS),
}


@dataclass(frozen=True)
class Score:
    """Answers of one model to all prompts of a task.

    ``found``, prompt by prompt, is the share of the asked answers that was given (RULER's ``string_match_all``, whole
    numbers and words only); ``digits`` is the share of right digits, None where answers are not numbers.
    """

    found: tuple[float, ...]
    digits: float | None

    @property
    def n(self) -> int:
        """Prompts."""
        return len(self.found)

    @property
    def share(self) -> float:
        """Mean share of the asked answers that was given."""
        return sum(self.found) / self.n

    @property
    def right(self) -> tuple[bool, ...]:
        """Prompt by prompt: everything asked was given."""
        return tuple(found == 1 for found in self.found)

    @property
    def exact(self) -> float:
        """Share of prompts with everything asked given."""
        return sum(self.right) / self.n


def named(text: str) -> list[str]:
    """Tasks by a comma-separated list of tasks and groups, each once.

    Raises:
        UsageError: one of the names is neither.
    """
    found: dict[str, None] = {}
    for name in filter(None, map(str.strip, text.split(","))):
        if name not in GROUPS and name not in TASKS:
            raise UsageError(f"no task {name!r}: choose from {', '.join(TASKS)} or a group: {', '.join(GROUPS)}")
        found |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(found)


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
    haystack: Haystack | None = None,
) -> list[Prompt]:
    """Prompts of a task, the same ones for the same arguments; fewer are the first ones of more.

    What is asked starts 64 tokens or more into the text, which is of one document; different prompts may share
    text. Depths are spread evenly over what 5 to 90 % of the length and the gap leave.

    Args:
        task: one of :data:`TASKS`.
        length: tokens of every prompt, exactly, a BOS token and the question included.
        gap: tokens at least between a statement and the question: take more than the window.
            None is 600 or 30 % of the length, whichever is less.
        pairs: keys, values or links of a chain, in tasks with several.
        haystack: of this calibration and split; pass one to work its words out only once.

    Raises:
        CalibrationError: the length cannot hold that, or the split has no document so long.
        UsageError: an unknown task, or nothing is asked for.
    """
    if task not in TASKS:
        raise UsageError(f"no task {task!r}: choose from {', '.join(TASKS)}")
    if min(count, pairs) < 1:
        raise UsageError(f"{count} prompts with {pairs} keys: ask for one or more of each")
    haystack = haystack or Haystack(calibration, split)
    texts = haystack.texts(length, count, seed)
    start = random.Random(f"{seed}/{task}/{length}").random()
    made = []
    for number, (text, words) in enumerate(zip(texts, calibration.tokenizer.batch_decode(texts), strict=True)):
        rng = random.Random(f"{seed}/{task}/{length}/{number}")
        asked = TASKS[task].make(Draw(haystack, rng, words, length, least_gap(length, gap), pairs))
        made.append(assemble(asked, task, haystack, text, at=(start + number * GOLDEN) % 1, gap=gap))
    return made


def answer_batch(model: Any, tokenizer: Any, batch: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
    """What the model generates after each prompt, greedily: the new text only.

    Raises:
        UsageError: prompts of different lengths.
    """
    if len({len(prompt.tokens) for prompt in batch}) != 1:
        raise UsageError("a batch needs prompts of one length: answer each length on its own")
    ids = torch.stack([prompt.tokens for prompt in batch]).to(model.device)
    ids, mask = read(model, ids)
    with greedy(model, tokenizer, max_new_tokens):
        out = model.generate(ids, attention_mask=mask)
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
    """Let the model answer all prompts, and see which of the asked answers its text has.

    Args:
        progress: called with the prompts done and their total after every batch.

    Raises:
        UsageError: no prompts, or prompts of different lengths.
    """
    if not prompts:
        raise UsageError("there are no prompts to score: ask for one or more")
    budget = max(prompt.budget for prompt in prompts)
    found: list[float] = []
    digits: list[float] = []
    for at in range(0, len(prompts), batch_size):
        batch = prompts[at : at + batch_size]
        for prompt, text in zip(batch, answer_batch(model, tokenizer, batch, max_new_tokens=budget), strict=True):
            found.append(share_found(text, prompt.answers))
            digits += [best_digits(text, answer) for answer in prompt.answers if answer.isdigit()]
        if progress is not None:
            progress(len(found), len(prompts))
    return Score(tuple(found), sum(digits) / len(digits) if digits else None)


def share_found(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that the text has as whole words or numbers, in whatever case."""
    given = set(re.findall(r"\w+", text.lower()))
    return sum(answer.lower() in given for answer in answers) / len(answers)


def best_digits(text: str, answer: str) -> float:
    """Share of an answer's digits in their places, in the number of the text that agrees best; 0 without a number."""
    numbers = re.findall(r"\d+", text)
    same = (sum(map(str.__eq__, number, answer)) / max(len(number), len(answer)) for number in numbers)
    return max(same, default=0.0)


@contextmanager
def greedy(model: Any, tokenizer: Any, max_new_tokens: int, *, stop: bool = True) -> Iterator[None]:
    """Inside the block ``model.generate`` is plainly greedy.

    Settings that come with a model (repetition penalty, suppressed tokens) would change the answers, and
    arguments of ``generate`` do not reset them all. Without ``stop`` no token ends the text. What is written are tokens
    of the base vocabulary, so that texts and their lengths can be compared.
    """
    own = model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = next(iter(end), 0) if isinstance(end, list) else end or 0
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end if stop else None, pad_token_id=pad
    )
    try:
        with base_tokens():
            yield
    finally:
        model.generation_config = own
