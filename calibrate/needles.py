"""Documents that show which heads look far back: the same words early and late in natural text.

A needle is a sequence of random words, none of them elsewhere in its document, so that nothing but the
earlier copy predicts the later one. Earlier copies lie behind the sinks; later copies close the document,
in an order of their own and further from every earlier copy than the window, out of reach of local heads.
Needles are bare words: the evaluation tasks (``tasks.py``) ask in sentences and answer in numbers.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sparsec.calibrate.splits import Calibration
from sparsec.errors import CalibrationError, UsageError

FIRST = 64  # tokens before any needle: the first ones draw attention whatever they say
SPACING = 16  # tokens of text between needles, so that one does not continue another
LETTERS = re.compile(r"[^\W\d_]+")
WORD = re.compile(r"(?<=\s)[^\W\d_]{4,12}(?=[,;:.!?)]*\s)")  # whole words, no parts of names such as os.path


@dataclass(frozen=True)
class NeedleDocument:
    """``tokens`` int64 [length]; ``pairs`` holds the token ranges of each needle's earlier and later copy."""

    tokens: torch.Tensor
    pairs: tuple[tuple[range, range], ...]


def needle_documents(
    calibration: Calibration,
    *,
    split: str,
    count: int,
    length: int,
    window: int,
    sinks: int,
    needles_per_document: int,
    words: int,
    seed: int,
) -> list[NeedleDocument]:
    """Documents for finding retrieval heads, the same ones for the same arguments.

    Fewer documents are the first ones of more. Where the split has fewer windows than documents, their text
    overlaps.

    Args:
        split: where text and words are from.
        count: documents.
        length: tokens of a document, a BOS token included.
        window: tokens; at least so many lie between an earlier and a later copy.
        sinks: first tokens that local heads see too.
        needles_per_document: needles in each document, no word twice.
        words: words of a needle; in most languages as many tokens.

    Raises:
        CalibrationError: the length cannot hold that, or the split has too little text or too few words.
        UsageError: nothing is asked for.
    """
    if min(count, needles_per_document, words) < 1:
        raise UsageError(
            f"{count} documents of {needles_per_document} needles of {words} words: ask for one or more of each"
        )
    begin = max(FIRST, sinks + SPACING)
    vocabulary = ordinary_words(calibration, split)
    size = words * len(next(iter(vocabulary.values()), ()))
    ending = needles_per_document * (SPACING + size)
    needed = begin + ending + window + ending
    if length < needed:
        raise CalibrationError(
            f"{length} tokens cannot hold {needles_per_document} needles of {words} words further apart than "
            f"a window of {window}: use a context of {needed} tokens or more, a smaller window or fewer needles"
        )
    documents = []
    for number, text in enumerate(filler(calibration, split, length, count, seed)):
        rng = random.Random(f"{seed}/needles/{number}")
        drawn = draw_words(vocabulary, calibration.tokenizer.decode(text), needles_per_document * words, rng)
        needles = torch.tensor([vocabulary[word] for word in drawn]).view(needles_per_document, size)
        earlier = _spread(begin, length - ending - window, needles_per_document, size, rng)
        later = [range(at, at + size) for at in range(length - ending + SPACING, length, SPACING + size)]
        rng.shuffle(later)
        documents.append(_insert(text, needles, earlier, later))
    return documents


def ordinary_words(calibration: Calibration, split: str) -> dict[str, list[int]]:
    """Lowercase words of a split, sorted, with their tokens behind a space.

    All have the number of tokens that is commonest: one, where the tokenizer knows the language. The held-out split
    and the others share no word: what was found or trained with some words is judged on other ones.
    """
    found: set[str] = set()
    for document in calibration.texts(split):
        found.update(word for word in WORD.findall(document.text) if word.islower())
    found = {word for word in found if (zlib.crc32(word.encode()) % 2 == 0) is (split == "heldout")}
    if not found:
        return {}
    words = sorted(found)
    # Behind another word, because tokenizers treat the start of a text each in their own way.
    tokenizer = calibration.tokenizer
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    behind = tokenizer([f"a {word}" for word in words], add_special_tokens=False)["input_ids"]
    tokens = {word: ids[len(before) :] for word, ids in zip(words, behind, strict=True) if ids[: len(before)] == before}
    sizes = Counter(map(len, tokens.values()))
    commonest = min(sizes, key=lambda size: (-sizes[size], size), default=0)
    return {word: ids for word, ids in tokens.items() if len(ids) == commonest}


def draw_words(vocabulary: Iterable[str], text: str, count: int, rng: random.Random) -> list[str]:
    """So many different words that are not in the text, in random order.

    Raises:
        CalibrationError: there are not so many.
    """
    present = set(LETTERS.findall(text.lower()))
    fresh = [word for word in vocabulary if word not in present]
    if len(fresh) < count:
        raise CalibrationError(
            f"{count} ordinary words are needed that a text of {len(text)} characters has not, and its split has "
            f"{len(fresh)}: name more text with --calibration, or set a shorter context"
        )
    return rng.sample(fresh, count)


def filler(calibration: Calibration, split: str, length: int, count: int, seed: int) -> torch.Tensor:
    """Windows of natural text, each out of one document: int64 [count, length].

    Where the split has fewer such windows they are drawn again from other offsets, and then overlap.

    Raises:
        CalibrationError: no document of the split is so long.
    """
    available = max(1, calibration.available(split, length))
    return torch.cat(
        [
            calibration.windows(split, length, min(available, count - taken), seed=seed + 7919 * number)
            for number, taken in enumerate(range(0, count, available))
        ]
    )


def _spread(begin: int, end: int, needles: int, size: int, rng: random.Random) -> list[range]:
    """A place for each needle, at random in its own share of the tokens from begin to end."""
    share = (end - begin) // needles
    places = [begin + number * share + rng.randint(0, share - size - SPACING) for number in range(needles)]
    return [range(at, at + size) for at in places]


def _insert(text: torch.Tensor, needles: torch.Tensor, earlier: list[range], later: list[range]) -> NeedleDocument:
    """The text with both copies of each needle, as long as before: what no longer fits is cut off its end."""
    tokens = torch.empty_like(text)
    is_text = torch.ones(len(text), dtype=torch.bool)
    for needle, places in zip(needles, zip(earlier, later, strict=True), strict=True):
        for place in places:
            tokens[place.start : place.stop] = needle
            is_text[place.start : place.stop] = False
    tokens[is_text] = text[: int(is_text.sum())]
    return NeedleDocument(tokens, tuple(zip(earlier, later, strict=True)))
