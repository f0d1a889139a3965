"""Tasks for judging models, over real text with the demo model's tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsec.calibrate import (
    questions,
    tasks,
    tasks_lookup,
    tasks_needles,
    tasks_qa,
    tasks_variables,
)
from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.needles import needle_documents
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import GROUPS, TASKS, Prompt, answer_batch, named, prompts, score, share_found
from sparsec.compiler.source import Source, load_model, load_tokenizer
from sparsec.errors import CalibrationError, UsageError

LENGTH = 1024


@pytest.fixture(scope="module")
def calibration(demo_source: Source) -> Calibration:
    return Calibration(read_corpus("builtin"), load_tokenizer(demo_source))


@pytest.fixture(scope="module")
def byte_tokenizer(tiny_llama: Path) -> Any:
    """A tokenizer with a token for every byte, so that words are many tokens."""
    return AutoTokenizer.from_pretrained(tiny_llama)


def same(some: list[Any], others: list[Any]) -> bool:
    return [x.tokens.tolist() for x in some] == [x.tokens.tolist() for x in others]


def statements(prompt: Prompt, tokenizer: Any) -> tuple[list[re.Match[str]], str, str]:
    """The statements of a needle prompt, its text before the question, and the question."""
    text = tokenizer.decode(prompt.tokens)
    before, line_break, question = text.rpartition("\n")
    stated = list(re.finditer(r'The (?:value of key "(\w+)"|pass key) is (\d+)\.', before))
    return stated, before + line_break, question


ONE_ANSWER = ("kv", "multikey", "passkey")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1024, 2048])
def test_prompts_have_exactly_the_length_asked_for(calibration: Calibration, task: str, length: int) -> None:
    made = prompts(task, calibration, length=length, count=9, seed=3)
    assert len(made) == 9
    assert all(prompt.tokens.shape == (length,) and prompt.tokens.dtype == torch.int64 for prompt in made)
    for prompt in made:
        assert len(set(prompt.answers)) == len(prompt.answers)
        assert share_found(prompt.completion, prompt.answers) == 1
        assert prompt.budget >= len(calibration.tokenizer(prompt.completion)["input_ids"])


@pytest.mark.parametrize("task", ONE_ANSWER)
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


def keyed(text: str) -> list[tuple[str, str]]:
    return re.findall(r'The value of key "(\w+)" is (\d+)\.', text)


def solve_multivalue(text: str) -> list[str]:
    [key] = re.findall(r'The four values of key "(\w+)":\nThe value of key "\1" is$', text)
    return [value for name, value in keyed(text) if name == key]


def solve_multiquery(text: str) -> list[str]:
    question = text[text.rindex("\nThe values of key") :]
    values = dict(keyed(text))
    return [values[key] for key in re.findall(r'key "(\w+)"', question.partition(":")[0])]


def solve_variables(text: str) -> list[str]:
    [value] = re.findall(r"\nThe variables with the value (\d+) are VAR$", text)
    assigned = {name: source.removeprefix("VAR ") for name, source in re.findall(r"VAR (\w+) = (.+)", text)}

    def follow(name: str) -> str:
        return follow(assigned[name]) if name in assigned else name

    return [name for name in assigned if follow(name) == value]


def solve_common(text: str) -> list[str]:
    listed = text[text.rindex("\nList:") : text.rindex("\nQuestion:")].removeprefix("\nList:").split()
    return [word for word, _ in Counter(listed).most_common(10)]


def solve_frequent(text: str) -> list[str]:
    coded = text[text.rindex("appears.\n") : text.rindex("\nQuestion:")].removeprefix("appears.\n").split()
    return [word for word, _ in Counter(word for word in coded if word != "....").most_common(3)]


def solve_lookup(text: str) -> list[str]:
    [name] = re.findall(r'}\n "([\w-]+)":$', text)
    return re.findall(rf'"{name}": (\d+),', text)


def solve_arithmetic(text: str) -> list[str]:
    [thing] = re.findall(r"\nAfter all changes, the number of (\w+) cards is$", text)
    [total] = map(int, re.findall(rf"There are (\d+) {thing} cards\.", text))
    for size, verb in re.findall(rf"Then (\d+) {thing} cards are (added|removed)\.", text):
        total += int(size) if verb == "added" else -int(size)
    return [str(total)]


def solve_places(text: str) -> list[str]:
    [thing] = re.findall(r"\nNow the (\w+) is in the box named$", text)
    return re.findall(rf"Then the {thing} is moved to the (\w+) box\.", text)[-1:]


def solve_qa(text: str) -> list[str]:
    [name] = re.findall(r"\nQuestion: \w+ .*?([A-Z]\w+ [A-Z]\w+)", text)
    told = text[: text.rindex("\nQuestion:")]
    [sentence] = [line for line in told.splitlines() if name in line]
    return [fact for kind in tasks_qa.KINDS for fact in kind.facts if re.search(rf"\b{fact}\b", sentence)]


def links(text: str) -> dict[str, list[str]]:
    """Where each word leads."""
    found: dict[str, list[str]] = {}
    for start, end in re.findall(r'"(\w+)": "(\w+)",', text):
        found.setdefault(start, []).append(end)
    return found


def walk(leads: dict[str, list[str]], start: str) -> list[str]:
    """The longest walk from a word."""
    ways = ([end, *walk(leads, end)] for end in leads.get(start, []))
    return max(ways, key=len, default=[])


def solve_threads(text: str) -> list[str]:
    told, title, question = re.split(r"\n(Walks|The longest walks)(?=[:,])", text)
    [first] = re.findall(r'"(\w+)":$', question)
    starts = re.findall(r'from "(\w+)"', question) or [first]
    assert starts[0] == first
    ways = links(told)
    assert title == "Walks" or max(map(len, ways.values())) == 2
    return [word for start in starts for word in walk(ways, start)]


SOLVERS: dict[str, Callable[[str], list[str]]] = {
    "kv": lambda text: [dict(keyed(text))[re.findall(r'key "(\w+)" is$', text)[0]]],
    "multikey": lambda text: [dict(keyed(text))[re.findall(r'key "(\w+)" is$', text)[0]]],
    "passkey": lambda text: re.findall(r"The pass key is (\d+)\.", text),
    "multivalue": solve_multivalue,
    "multiquery": solve_multiquery,
    "variables": solve_variables,
    "common": solve_common,
    "frequent": solve_frequent,
    "lookup": solve_lookup,
    "qa": solve_qa,
    "thread": solve_threads,
    "multithread": solve_threads,
    "branches": solve_threads,
    "arithmetic": solve_arithmetic,
    "places": solve_places,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1024, 2500])
def test_a_reader_of_the_prompt_can_answer_it(calibration: Calibration, task: str, length: int) -> None:
    for prompt in prompts(task, calibration, length=length, count=4, seed=1):
        found = SOLVERS[task](calibration.tokenizer.decode(prompt.tokens))
        assert sorted(found) == sorted(prompt.answers)


@pytest.mark.parametrize("task", ["lookup", "common", "frequent", "thread", "branches"])
def test_tasks_work_where_words_are_several_tokens_and_few(byte_tokenizer: Any, task: str) -> None:
    calibration = Calibration(read_corpus("builtin"), byte_tokenizer)
    for prompt in prompts(task, calibration, length=6000, count=2, seed=0):
        assert prompt.tokens.shape == (6000,)
        found = SOLVERS[task](byte_tokenizer.decode(prompt.tokens))
        assert sorted(found) == sorted(prompt.answers)


def test_long_lists_are_full(calibration: Calibration) -> None:
    """Few ordinary words must not make a list short: names get longer, and common words more frequent."""
    for task, heading in (("lookup", "A JSON object"), ("common", "The words of the list"), ("frequent", "Read the")):
        for prompt in prompts(task, calibration, length=6000, count=2, seed=0):
            text = calibration.tokenizer.decode(prompt.tokens)
            assert len(calibration.tokenizer(text[: text.index(heading)])["input_ids"]) < 0.1 * 6000


@pytest.mark.parametrize("task", ONE_ANSWER)
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


def test_a_looked_up_line_is_at_its_depth_and_far_from_the_question(calibration: Calibration) -> None:
    depths = []
    for prompt in prompts("lookup", calibration, length=2048, count=12, seed=0):
        text = calibration.tokenizer.decode(prompt.tokens)
        behind = text[text.index(f": {prompt.answer},") :]
        assert len(calibration.tokenizer(behind)["input_ids"]) >= 600
        before = len(calibration.tokenizer(text[: text.index(f": {prompt.answer},")])["input_ids"])
        assert prompt.depth is not None
        assert before / 2048 == pytest.approx(prompt.depth, abs=8 / 2048)
        depths.append(prompt.depth)
    assert max(depths) - min(depths) > 0.4


@pytest.mark.parametrize("task", ["multivalue", "multiquery", "variables", "qa", "thread", "multithread", "branches"])
def test_all_that_is_hidden_is_a_gap_away_from_the_question(calibration: Calibration, task: str) -> None:
    for prompt in prompts(task, calibration, length=2048, count=4, seed=0, gap=500):
        text = calibration.tokenizer.decode(prompt.tokens)
        starts = {"qa": "\nQuestion:", "variables": "\nThe variables", "branches": "\nThe longest walks"}
        start = starts.get(
            task, "\nWalks" if "thread" in task else f"\nThe {'four values' if 'value' in task else 'values'}"
        )
        head = text[: text.rindex(start)]
        last = max(head.rfind(answer) for answer in prompt.answers)
        assert len(calibration.tokenizer(head[last:], add_special_tokens=False)["input_ids"]) >= 480


def test_depths_cover_their_room_evenly(calibration: Calibration) -> None:
    depths = sorted(prompt.depth or 0 for prompt in prompts("kv", calibration, length=2048, count=16, seed=0))
    low, high = 0.05, 1 - 600 / 2048
    assert low <= depths[0] < low + 0.15
    assert high - 0.15 < depths[-1] <= high
    assert max(after - before for before, after in pairwise(depths)) < 0.15


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_the_same_for_the_same_seed_only(calibration: Calibration, task: str) -> None:
    made = prompts(task, calibration, length=LENGTH, count=6, seed=0)
    again = prompts(task, calibration, length=LENGTH, count=6, seed=0, haystack=tasks.Haystack(calibration))
    assert same(made, again)
    assert [prompt.answers for prompt in made] == [prompt.answers for prompt in again]
    assert same(made[:2], prompts(task, calibration, length=LENGTH, count=2, seed=0))
    assert not same(made, prompts(task, calibration, length=LENGTH, count=6, seed=1))
    assert len({prompt.answers for prompt in made}) > 3


def test_text_around_a_statement_is_held_out_and_of_one_document(calibration: Calibration) -> None:
    tokenizer = calibration.tokenizer
    heldout = [document.text for document in calibration.texts("heldout")]
    for prompt in prompts("kv", calibration, length=LENGTH, count=5, seed=0):
        (stated,), before, _ = statements(prompt, tokenizer)
        text = before[: stated.start() - 1], before[stated.end() + 1 : -1]
        assert any(text[0] in document and text[1] in document for document in heldout)


def phrases(text: str) -> set[str]:
    """Every three words of a form that stand together, placeholders left out."""
    found: set[str] = set()
    for part in re.split(r"\{\w+\}|[\"\n]", text.lower()):
        words = re.findall(r"[a-z]+", part)
        found |= {" ".join(words[at : at + 3]) for at in range(len(words) - 2)}
    return found


def test_tasks_share_no_grammar_with_needles_and_training_questions(calibration: Calibration) -> None:
    forms = [tasks_needles.KEYED, tasks_needles.ASKED, tasks_needles.PASSKEY, tasks_needles.ASKED_PASSKEY]
    forms += [tasks_variables.QUESTION, tasks_lookup.HEADING]
    forms += [part for kind in tasks_qa.KINDS for part in (*kind.told, kind.question, kind.begin)]
    mine = set().union(*map(phrases, forms))
    trained = set().union(*(phrases(part) for form in questions.FORMS for part in form))
    assert not mine & trained
    options = {"length": LENGTH, "window": 256, "sinks": 4, "needles_per_document": 3, "words": 16, "seed": 0}
    for document in needle_documents(calibration, split="search", count=8, **options):
        for earlier, _ in document.pairs:
            text = calibration.tokenizer.decode(document.tokens[list(earlier)])
            assert not re.search(r"[^a-z ]", text)
            assert not mine & phrases(text)


@pytest.mark.parametrize("task", TASKS)
def test_too_short_prompts_are_refused_with_the_length_needed(calibration: Calibration, task: str) -> None:
    with pytest.raises(CalibrationError, match=r"use prompts of (\d+) tokens or more") as caught:
        prompts(task, calibration, length=100, count=1, seed=0)
    length = 100
    for _ in range(6):  # estimates for lists may be a little short the first time
        try:
            assert prompts(task, calibration, length=length, count=1, seed=0)
            break
        except CalibrationError as error:
            needed = re.search(r"prompts of (\d+)", str(error))
            assert needed is not None
            assert int(needed[1]) > length
            length = int(needed[1])
    else:
        pytest.fail(f"{caught.value} did not lead to a length that holds {task}")


def test_prompts_that_cannot_be_are_refused(calibration: Calibration) -> None:
    with pytest.raises(CalibrationError, match=r"longest of its \d+ documents has \d+ tokens"):
        prompts("kv", calibration, length=50_000, count=1, seed=0)
    with pytest.raises(UsageError, match="choose from kv, multikey, passkey"):
        prompts("haystack", calibration, length=LENGTH, count=1, seed=0)
    with pytest.raises(UsageError, match="ask for one or more"):
        prompts("kv", calibration, length=LENGTH, count=0, seed=0)


def test_groups_stand_for_their_tasks_each_once() -> None:
    assert named("kv, needles,kv") == list(GROUPS["needles"])
    assert named("threads,qa") == ["thread", "multithread", "branches", "qa"]
    assert named("all") == list(TASKS)
    assert named("") == []
    assert {task for group in GROUPS.values() for task in group} == set(TASKS)
    with pytest.raises(UsageError, match="or a group: needles, ruler, threads, reasoning, all"):
        named("kv,niah")


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


def asking(*answers: str, length: int = 8) -> Prompt:
    return Prompt(torch.zeros(length, dtype=torch.long), answers, 0.5, 12, f" {answers[0]}.")


def test_scores_count_whole_numbers_and_digits(calibration: Calibration) -> None:
    made = [asking("12345") for _ in range(5)]
    answers = [" 12345.\nAnd 9", " 12395", " 123456", " unknown", " 12345"]
    done: list[tuple[int, int]] = []
    model = Recites(calibration.tokenizer, answers)
    result = score(model, calibration.tokenizer, made, batch_size=2, progress=lambda *at: done.append(at))
    assert result.right == (True, False, False, False, True)
    assert result.exact == pytest.approx(2 / 5)
    assert result.digits == pytest.approx((1 + 4 / 5 + 5 / 6 + 0 + 1) / 5)
    assert result.n == 5
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_several_answers_count_by_their_share_as_whole_words_in_any_order_and_case(calibration: Calibration) -> None:
    made = [asking("Lisbon", "Oslo"), asking("Lisbon", "Oslo"), asking("Lisbon", "Oslo"), asking("12345", "678901")]
    answers = [" oslo, and LISBON.", " Lisbonne or Oslo", " unknown", " 678901 and 12346"]
    result = score(Recites(calibration.tokenizer, answers), calibration.tokenizer, made)
    assert result.found == (1, 0.5, 0, 0.5)
    assert result.share == 0.5
    assert result.exact == 0.25
    assert result.digits == pytest.approx((4 / 5 + 1) / 2)
    assert score(Recites(calibration.tokenizer, [" Oslo"]), calibration.tokenizer, made[:1]).digits is None


def test_prompts_of_several_lengths_are_no_batch(calibration: Calibration) -> None:
    made = [asking("12345", length=length) for length in (8, 9)]
    with pytest.raises(UsageError, match="one length"):
        answer_batch(None, calibration.tokenizer, made, max_new_tokens=4)
    with pytest.raises(UsageError, match="no prompts"):
        score(None, calibration.tokenizer, [])


def test_answers_are_greedy_whatever_the_model_comes_with(tiny_llama: Path, byte_tokenizer: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = byte_tokenizer
    batch = [Prompt(torch.arange(start, start + 40), ("12345",), 0.5, 12, " 12345.") for start in (5, 100)]
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
