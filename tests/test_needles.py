"""Needles for finding retrieval heads, over real text with the demo model's tokenizer."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sparsec.calibrate.corpus import Corpus, Document, read_corpus
from sparsec.calibrate.needles import FIRST, SPACING, NeedleDocument, needle_documents, ordinary_words
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.source import Source, load_tokenizer
from sparsec.errors import CalibrationError

LENGTH, WINDOW, WORDS = 1024, 256, 16


@pytest.fixture(scope="module")
def calibration(demo_source: Source) -> Calibration:
    return Calibration(read_corpus("builtin"), load_tokenizer(demo_source))


@pytest.fixture(scope="module")
def byte_tokenizer(tiny_llama: Path) -> Any:
    """A tokenizer with a token for every byte, so that words are many tokens."""
    return AutoTokenizer.from_pretrained(tiny_llama)


def needles(calibration: Calibration, **changes: Any) -> list[NeedleDocument]:
    asked = {"split": "search", "count": 4, "length": LENGTH, "window": WINDOW, "sinks": 4, "seed": 0}
    asked |= {"needles_per_document": 3, "words": WORDS}
    return needle_documents(calibration, **(asked | changes))


def same(some: list[Any], others: list[Any]) -> bool:
    return [x.tokens.tolist() for x in some] == [x.tokens.tolist() for x in others]


def test_both_copies_of_a_needle_have_the_same_tokens(calibration: Calibration) -> None:
    for document in needles(calibration):
        assert document.tokens.shape == (LENGTH,)
        assert document.tokens.dtype == torch.int64
        assert len(document.pairs) == 3
        for earlier, later in document.pairs:
            assert len(earlier) == len(later) == WORDS
            assert document.tokens[list(earlier)].tolist() == document.tokens[list(later)].tolist()


def test_a_needle_is_beyond_the_window_of_its_copy_and_behind_the_sinks(calibration: Calibration) -> None:
    for document in needles(calibration, sinks=100):
        assert min(earlier.start for earlier, _ in document.pairs) >= 100 + SPACING
        last_earlier = max(earlier.stop for earlier, _ in document.pairs)
        first_later = min(later.start for _, later in document.pairs)
        assert first_later - last_earlier >= WINDOW
        assert max(later.stop for _, later in document.pairs) == LENGTH
    assert min(earlier.start for earlier, _ in needles(calibration)[0].pairs) >= FIRST


def test_needles_are_kept_apart_by_text(calibration: Calibration) -> None:
    for document in needles(calibration):
        spans = sorted((span for pair in document.pairs for span in pair), key=lambda span: span.start)
        assert all(after.start - before.stop >= SPACING for before, after in pairwise(spans))


def test_needles_are_bare_words_that_occur_nowhere_else_in_their_document(calibration: Calibration) -> None:
    tokenizer = calibration.tokenizer
    for document in needles(calibration):
        drawn: list[str] = []
        is_text = torch.ones(LENGTH, dtype=torch.bool)
        for earlier, later in document.pairs:
            drawn += tokenizer.decode(document.tokens[list(earlier)]).split()
            is_text[list(earlier) + list(later)] = False
        assert all(re.fullmatch("[a-z]+", word) for word in drawn)
        assert len(set(drawn)) == len(drawn) == 3 * WORDS
        text = set(re.findall("[a-z]+", tokenizer.decode(document.tokens[is_text]).lower()))
        assert not text & set(drawn)


def test_needles_are_the_same_for_the_same_seed_only(calibration: Calibration) -> None:
    documents = needles(calibration)
    assert same(documents, needles(calibration))
    assert same(documents[:2], needles(calibration, count=2))
    assert not same(documents, needles(calibration, seed=1))
    assert documents[0].pairs != documents[1].pairs


def test_needle_documents_share_text_where_there_is_too_little(calibration: Calibration) -> None:
    count = calibration.available("search", LENGTH) + 2
    documents = needles(calibration, count=count)
    assert len({tuple(document.tokens.tolist()) for document in documents}) == count


def test_too_short_documents_are_refused_with_the_length_needed(calibration: Calibration) -> None:
    with pytest.raises(CalibrationError, match=r"400 tokens cannot hold .* use a context of (\d+) tokens") as caught:
        needles(calibration, length=400)
    needed = re.search(r"context of (\d+)", str(caught.value))
    assert needed is not None
    assert len(needles(calibration, length=int(needed[1]))) == 4
    with pytest.raises(CalibrationError, match="cannot hold"):
        needles(calibration, length=int(needed[1]) - 1)


def test_too_few_words_are_refused(byte_tokenizer: Any) -> None:
    text = "\n\n".join(f"The same few words over and over again, number {number}." for number in range(600))
    poor = Calibration(Corpus("poor", (Document("poor", text),)), byte_tokenizer)
    with pytest.raises(CalibrationError, match="ordinary words are needed"):
        needles(poor)


def test_needles_work_where_words_are_several_tokens(byte_tokenizer: Any) -> None:
    calibration = Calibration(read_corpus("builtin"), byte_tokenizer)
    for document in needles(calibration, length=4096, words=4):
        for earlier, later in document.pairs:
            text = calibration.tokenizer.decode(document.tokens[list(earlier)])
            assert len(text.split()) == 4
            assert document.tokens[list(earlier)].tolist() == document.tokens[list(later)].tolist()


def test_ordinary_words_are_one_token_each(calibration: Calibration) -> None:
    words = ordinary_words(calibration, "search")
    assert len(words) > 500
    assert list(words) == sorted(words)
    assert all(calibration.tokenizer.decode(ids) == f" {word}" for word, ids in words.items() if len(ids) == 1)
    assert {len(ids) for ids in words.values()} == {1}
