"""Needles for finding heads and tasks for judging them, over real text with the demo model's tokenizer."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsec.calibrate import tasks
from sparsec.calibrate.corpus import Corpus, Document, read_corpus
from sparsec.calibrate.needles import FIRST, SPACING, NeedleDocument, needle_documents, ordinary_words
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import TASKS, Prompt, answer_batch, prompts, score
from sparsec.compiler.source import Source, load_model, load_tokenizer
from sparsec.errors import CalibrationError, UsageError

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


def statements(prompt: Prompt, tokenizer: Any) -> tuple[list[re.Match[str]], str, str]:
    """The statements of a prompt, its text before the question, and the question."""
    text = tokenizer.decode(prompt.tokens)
    before, line_break, question = text.rpartition("\n")
    stated = list(re.finditer(r'The (?:value of key "(\w+)"|pass key) is (\d+)\.', before))
    return stated, before + line_break, question


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [700, 1024, 2048])
def test_prompts_have_exactly_the_length_asked_for(calibration: Calibration, task: str, length: int) -> None:
    made = prompts(task, calibration, length=length, count=9, seed=3)
    assert len(made) == 9
    assert all(prompt.tokens.shape == (length,) and prompt.tokens.dtype == torch.int64 for prompt in made)


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_in_the_prompt_exactly_once_and_asked_for(calibration: Calibration, task: str) -> None:
    for prompt in prompts(task, calibration, length=LENGTH, count=8, seed=0):
        stated, before, question = statements(prompt, calibration.tokenizer)
        assert before.count(prompt.answer) == 1
        assert 5 <= len(prompt.answer) <= 7
        assert question.endswith(" is")
        (right,) = [match for match in stated if match[2] == prompt.answer]
        assert len(stated) == (4 if task == "multikey" else 1)
        assert len({match[1] for match in stated}) == len(stated)
        if task != "passkey":
            assert question == f'The value of key "{right[1]}" is'
            assert len(re.findall(rf"\b{right[1]}\b", before)) == 1


@pytest.mark.parametrize("task", TASKS)
def test_statements_are_far_from_the_sinks_and_from_the_question(calibration: Calibration, task: str) -> None:
    for gap in (None, 500):
        for prompt in prompts(task, calibration, length=LENGTH, count=12, seed=0, gap=gap):
            stated, before, _ = statements(prompt, calibration.tokenizer)

            def tokens(text: str) -> int:
                return len(calibration.tokenizer(text, add_special_tokens=False)["input_ids"])

            # Cutting text apart may split a token: hence one or two of tolerance.
            assert tokens(before[: stated[0].start()]) >= 64 - 2
            assert tokens(before[stated[-1].end() :]) >= (gap or int(0.3 * LENGTH)) - 2
            (right,) = [match for match in stated if match[2] == prompt.answer]
            assert tokens(before[: right.start()]) / LENGTH == pytest.approx(prompt.depth, abs=4 / LENGTH)


def test_depths_cover_their_room_evenly(calibration: Calibration) -> None:
    depths = sorted(prompt.depth for prompt in prompts("kv", calibration, length=2048, count=16, seed=0))
    low, high = 0.05, 1 - 600 / 2048
    assert low <= depths[0] < low + 0.15
    assert high - 0.15 < depths[-1] <= high
    assert max(after - before for before, after in pairwise(depths)) < 0.15


def test_prompts_are_the_same_for_the_same_seed_only(calibration: Calibration) -> None:
    made = prompts("multikey", calibration, length=LENGTH, count=6, seed=0)
    assert same(made, prompts("multikey", calibration, length=LENGTH, count=6, seed=0))
    assert same(made[:2], prompts("multikey", calibration, length=LENGTH, count=2, seed=0))
    assert not same(made, prompts("multikey", calibration, length=LENGTH, count=6, seed=1))


def test_text_around_a_statement_is_held_out_and_of_one_document(calibration: Calibration) -> None:
    tokenizer = calibration.tokenizer
    heldout = [document.text for document in calibration.texts("heldout")]
    for prompt in prompts("kv", calibration, length=LENGTH, count=5, seed=0):
        (stated,), before, _ = statements(prompt, tokenizer)
        text = before[: stated.start() - 1], before[stated.end() + 1 : -1]
        assert any(text[0] in document and text[1] in document for document in heldout)


def test_tasks_and_needles_share_no_grammar(calibration: Calibration) -> None:
    fixed = re.sub(r"\{\w+\}", "", " ".join(part for form in tasks.FORMS.values() for part in form))
    phrases = {" ".join(pair) for pair in pairwise(re.findall(r"\w+", fixed.lower()))}
    for document in needles(calibration, count=8):
        for earlier, _ in document.pairs:
            text = calibration.tokenizer.decode(document.tokens[list(earlier)])
            assert not re.search(r"[^a-z ]", text)
            assert not phrases & {" ".join(pair) for pair in pairwise(text.split())}


def test_prompts_that_cannot_be_are_refused(calibration: Calibration) -> None:
    with pytest.raises(CalibrationError, match=r"use prompts of (\d+) tokens or more") as caught:
        prompts("kv", calibration, length=300, count=1, seed=0, gap=250)
    needed = re.search(r"prompts of (\d+)", str(caught.value))
    assert needed is not None
    assert prompts("kv", calibration, length=int(needed[1]) + 8, count=1, seed=0, gap=250)
    with pytest.raises(CalibrationError, match=r"longest of its \d+ documents has \d+ tokens"):
        prompts("kv", calibration, length=50_000, count=1, seed=0)
    with pytest.raises(UsageError, match="choose from kv, multikey, passkey"):
        prompts("haystack", calibration, length=LENGTH, count=1, seed=0)


class Recites:
    """Answers from a list; it stands in for a model where only the scoring of answers is of interest."""

    device = "cpu"

    def __init__(self, tokenizer: Any, answers: list[str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.generation_config = type("Settings", (), {"eos_token_id": tokenizer.eos_token_id})()

    def generate(self, ids: torch.Tensor, *, attention_mask: torch.Tensor) -> torch.Tensor:
        assert attention_mask.shape == ids.shape
        rows = [self.tokenizer(self.answers.pop(0))["input_ids"] for _ in ids]
        longest = max(map(len, rows))
        end = self.tokenizer.eos_token_id
        return torch.cat([ids, torch.tensor([row + [end] * (longest - len(row)) for row in rows])], dim=1)


def test_scores_count_whole_numbers_and_digits(calibration: Calibration) -> None:
    made = [Prompt(torch.zeros(8, dtype=torch.long), "12345", 0.5) for _ in range(5)]
    answers = [" 12345.\nAnd 9", " 12395", " 123456", " unknown", " 12345"]
    done: list[tuple[int, int]] = []
    model = Recites(calibration.tokenizer, answers)
    result = score(model, calibration.tokenizer, made, batch_size=2, progress=lambda *at: done.append(at))
    assert result.right == (True, False, False, False, True)
    assert result.exact == pytest.approx(2 / 5)
    assert result.digits == pytest.approx((1 + 4 / 5 + 5 / 6 + 0 + 1) / 5)
    assert result.n == 5
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_prompts_of_several_lengths_are_no_batch(calibration: Calibration) -> None:
    made = [Prompt(torch.zeros(length, dtype=torch.long), "12345", 0.5) for length in (8, 9)]
    with pytest.raises(UsageError, match="one length"):
        answer_batch(None, calibration.tokenizer, made, max_new_tokens=4)
    with pytest.raises(UsageError, match="no prompts"):
        score(None, calibration.tokenizer, [])


def test_answers_are_greedy_whatever_the_model_comes_with(tiny_llama: Path, byte_tokenizer: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = byte_tokenizer
    batch = [Prompt(torch.arange(start, start + 40), "12345", 0.5) for start in (5, 100)]
    plain = answer_batch(model, tokenizer, batch, max_new_tokens=12)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.no_repeat_ngram_size = True, 5.0, 2.0, 1
    assert answer_batch(model, tokenizer, batch, max_new_tokens=12) == plain
    assert model.generation_config is own
    assert [answer_batch(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in batch] == plain


@pytest.mark.slow
def test_the_dense_demo_model_finds_a_value_at_1024_tokens(demo_source: Source, calibration: Calibration) -> None:
    model = load_model(demo_source, dtype="float32")
    made = prompts("kv", calibration, length=1024, count=8, seed=0)
    assert score(model, calibration.tokenizer, made).exact >= 0.8
