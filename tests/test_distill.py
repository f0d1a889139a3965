"""Self-distillation: its loss, its data, its checkpoints, and what it leaves behind."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.distillation import (
    Lesson,
    Outcome,
    Settings,
    _Run,
    batch_of,
    distill,
    full_kl,
    hold_out,
    kl_top_k,
    row_weights,
    student_hidden,
)
from sparsec.calibrate.needles import ordinary_words
from sparsec.calibrate.questions import _end, training_windows
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.teacher import identity, read_kept, save_kept, top_k, weights_digest
from sparsec.calibrate.trainable import changed_weights, copied_weights, put_weights, trainable
from sparsec.errors import TrainingError
from sparsec.events import silent
from sparsec.passes.base import Program
from sparsec.passes.distill import Distill
from sparsec.passes.rtpurbo import Rtpurbo
from sparsec.plan import Plan
from sparsec.plugins.families import shape_of
from sparsec.plugins.runtime import applied, new_cache, rows_as, stepping
from sparsec.plugins.step import Step

ROWS = 64


@pytest.fixture(scope="module")
def calibration(tiny_deep: Path) -> Calibration:
    return Calibration(read_corpus(), AutoTokenizer.from_pretrained(tiny_deep))


@pytest.fixture(scope="module")
def program(tiny_deep: Path, calibration: Calibration, tiny_options: dict[str, dict[str, Any]]) -> Program:
    model = AutoModelForCausalLM.from_pretrained(tiny_deep).eval().requires_grad_(False)
    with torch.no_grad():
        model.model.norm.weight.mul_(40.0)  # a random model says next to nothing: this one has opinions
    dense = Program(model, Plan.dense(shape_of(model.config), "test"), {}, seed=3)
    result = Rtpurbo.model_validate(tiny_options["rtpurbo"]).run(dense, calibration)
    return Program(model, result.plan, result.tensors, seed=3)


@pytest.fixture(scope="module")
def lesson(program: Program, calibration: Calibration) -> Lesson:
    draw = partial(training_windows, calibration, length=256, rows=ROWS, questions=0.0, seed=0)
    tokens, held = draw("train", count=4).tokens, draw("search", count=2).tokens
    taught = top_k(program.model, tokens, 10, 2, torch.no_grad, silent)
    labels = (torch.arange(256) >= 256 - ROWS).expand(4, 256)
    return Lesson(tokens, labels, taught, hold_out(program.model, held, ROWS, ROWS), ROWS, batch=2, micro_batch=1)


def settings(**changes: Any) -> Settings:
    usual = {"steps": 8, "lr": 1e-2, "warmup": 2, "checks": 4}
    return Settings(**{**usual, **changes})


def test_the_loss_is_the_kl_over_everything_when_k_is_everything() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 11).log_softmax(-1), torch.randn(5, 11)
    indices = torch.arange(11).expand(5, 11)
    expected = (teacher.exp() * (teacher - student.log_softmax(-1))).sum(-1)
    for rest in (True, False):
        assert torch.allclose(kl_top_k(student, indices, teacher, rest), expected, atol=1e-4)


def test_mass_moved_outside_the_top_k_is_punished_only_with_the_rest() -> None:
    teacher = torch.tensor([[4.0, 3.0, -9.0, -9.0]])
    best = teacher.log_softmax(-1).topk(2)
    moved = torch.tensor([[4.0, 3.0, 8.0, -9.0]])
    renormalised = kl_top_k(moved, best.indices, best.values, rest=False)
    with_rest = kl_top_k(moved, best.indices, best.values, rest=True)
    assert abs(float(renormalised)) < 1e-5
    assert float(with_rest) > 1.0


def test_every_window_is_seen_once_an_epoch_and_batches_depend_on_the_step_alone() -> None:
    seen = [window for step in range(5) for window in batch_of(step, 2, 10, seed=1)]
    assert sorted(seen) == list(range(10))
    assert batch_of(7, 3, 10, seed=1) == batch_of(7, 3, 10, seed=1)
    assert [batch_of(step, 10, 10, seed=1) for step in (0, 1)] != [batch_of(0, 10, 10, seed=1)] * 2


def test_one_call_with_prompt_and_decode_rows_equals_prefill_then_decode(program: Program, lesson: Lesson) -> None:
    tokens = lesson.tokens[:1]
    with applied(program.model, program.plan, program.tensors), torch.no_grad():
        whole = student_hidden(program.model, tokens, ROWS)[:, -ROWS:]
        cache = new_cache(program.model)
        with rows_as("prefill"):
            program.model.get_decoder()(input_ids=tokens[:, :-ROWS], past_key_values=cache)
        with stepping(Step(decode=True)):
            split = program.model.get_decoder()(input_ids=tokens[:, -ROWS:], past_key_values=cache).last_hidden_state
    assert torch.allclose(whole, split, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "all"])
def test_training_brings_the_sparse_model_nearer_to_the_dense_one(program: Program, lesson: Lesson, kind: Any) -> None:
    before = copied_weights(program.model)
    # A student that starts further off than the plan alone puts it, so that there is something to learn.
    with torch.no_grad():
        for layer in program.model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.2)
    shifted = copied_weights(program.model)
    try:
        with applied(program.model, program.plan, program.tensors), trainable(program.model, kind, 8, None):
            indexers = [p.requires_grad for n, p in program.model.named_parameters() if ".indexer." in n]
            outcome = distill(
                program.model,
                lesson,
                settings(steps=24, lr=1e-3 if kind == "lora" else 1e-4),
                state=None,
                listen=silent,
            )
        assert indexers
        assert not any(indexers)
        assert outcome.best_step > 0
        assert min(kl for _, kl in outcome.checks) < outcome.checks[0][1]
        changed = changed_weights(program.model, shifted)
        assert changed
        with applied(program.model, program.plan, program.tensors):
            assert full_kl(program.model, lesson.held, ROWS) == pytest.approx(
                min(kl for _, kl in outcome.checks), rel=1e-2
            )
    finally:
        put_weights(program.model, before)


def test_small_steps_are_not_lost_in_a_small_dtype(program: Program, lesson: Lesson) -> None:
    model = copy.deepcopy(program.model).bfloat16()
    before = copied_weights(model)
    with applied(model, program.plan, program.tensors), trainable(model, "all", 8, None):
        assert {w.dtype for w in model.parameters()} == {torch.float32}
        started = copied_weights(model)
        distill(model, lesson, settings(lr=3e-6, warmup=0), state=None, listen=silent)
        moved = changed_weights(model, started)
    assert set(moved) == {name for name in before if ".indexer." not in name}
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}


def test_a_run_that_gets_worse_or_diverges_keeps_the_weights(program: Program, lesson: Lesson) -> None:
    before = copied_weights(program.model)
    with applied(program.model, program.plan, program.tensors), trainable(program.model, "all", 8, None):
        outcome = distill(program.model, lesson, settings(lr=30.0, warmup=0), state=None, listen=silent)
    assert outcome.best_step == 0
    assert not changed_weights(program.model, before)


def test_a_stopped_run_continues_to_the_same_weights(program: Program, lesson: Lesson, tmp_path: Path) -> None:
    before = copied_weights(program.model)

    def train(stop: int | None, folder: Path | None) -> tuple[dict[str, Tensor], Outcome]:
        with applied(program.model, program.plan, program.tensors), trainable(program.model, "all", 8, None):
            if stop is not None:
                run = _Run(program.model, settings(), folder)
                run.check(lesson, silent)
                for step in range(stop):
                    run.advance(step, lesson)
                    if step + 1 in run.when:
                        run.check(lesson, silent)
                run.save()
                put_weights(program.model, before)
            outcome = distill(program.model, lesson, settings(), state=folder, listen=silent)
        found = copied_weights(program.model)
        put_weights(program.model, before)
        return found, outcome

    whole, undisturbed = train(None, None)
    resumed, outcome = train(3, tmp_path)
    assert outcome.resumed_at == 3
    assert outcome.checks == undisturbed.checks
    assert outcome.losses == undisturbed.losses
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_damaged_training_state_is_refused_with_the_way_out(program: Program, lesson: Lesson, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"nonsense")
    with (
        applied(program.model, program.plan, program.tensors),
        trainable(program.model, "all", 8, None),
        pytest.raises(TrainingError, match=r"damaged .*: delete it"),
    ):
        distill(program.model, lesson, settings(), state=tmp_path, listen=silent)


def test_a_teacher_of_another_model_is_refused(program: Program, lesson: Lesson, tmp_path: Path) -> None:
    taught = lesson.taught
    owner = identity(weights_digest(program.model), lesson.tokens, 10)
    save_kept(tmp_path / "teacher.safetensors", {"indices": taught.indices, "logp": taught.logp}, owner)
    kept = read_kept(tmp_path / "teacher.safetensors", owner)
    assert kept is not None
    assert torch.equal(kept["indices"], taught.indices)
    weight = next(program.model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1
    try:
        with pytest.raises(TrainingError, match="another model's or other text's: delete"):
            read_kept(tmp_path / "teacher.safetensors", identity(weights_digest(program.model), lesson.tokens, 10))
    finally:
        with torch.no_grad():
            weight.view(-1)[0] -= 1


def test_running_out_of_memory_names_what_to_lower(
    program: Program, lesson: Lesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(_Run, "advance", full)
    with (
        applied(program.model, program.plan, program.tensors),
        trainable(program.model, "all", 8, None),
        pytest.raises(TrainingError, match=r"lower distill\.micro_batch or distill.context"),
    ):
        distill(program.model, lesson, settings(), state=None, listen=silent)


def test_questions_lie_in_the_decode_rows_and_their_facts_before(calibration: Calibration) -> None:
    draw = partial(training_windows, calibration, "train", length=700, count=4, rows=200, seed=2)
    windows, plain = draw(questions=0.5), draw(questions=0.0)
    assert windows.tokens.shape == windows.answers.shape == (4, 700)
    assert windows.asked.tolist() == [False, True, False, True]
    assert not plain.asked.any()
    assert not plain.answers.any()
    assert torch.equal(windows.tokens[~windows.asked], plain.tokens[~windows.asked])
    assert not torch.equal(windows.tokens[windows.asked], plain.tokens[windows.asked])


def test_answers_are_what_the_facts_said_and_the_rows_before_them_are_marked(calibration: Calibration) -> None:
    windows = training_windows(calibration, "train", length=900, count=6, rows=200, questions=1.0, seed=4)
    for tokens, answers in zip(windows.tokens, windows.answers, strict=True):
        rows = answers.nonzero()[:, 0].tolist()
        assert not answers[:-200].any()
        runs = [[rows[0]]]
        for row in rows[1:]:
            if row == runs[-1][-1] + 1:
                runs[-1].append(row)
            else:
                runs.append([row])
        facts = calibration.tokenizer.decode(tokens[: rows[0]])
        questions = calibration.tokenizer.decode(tokens[rows[0] + 1 :])
        assert len(runs) == questions.count(".\n"), "one a question"
        for run in runs:
            answer = calibration.tokenizer.decode(tokens[run[0] + 1 : run[-1] + 2])
            assert answer.startswith(" ")
            assert answer[1:] in facts
        assert calibration.tokenizer.decode(tokens[runs[-1][-1] + 2 :]) == ".\n"


def test_answers_are_found_without_offsets_too(calibration: Calibration) -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: Any, add_special_tokens: bool) -> Any:
            return calibration.tokenizer(text, add_special_tokens=add_special_tokens)

    asked = [("\nThe boat of the fox was registered as", " QXZ", "."), ("\nThe nickname of the owl is", " pale", ".")]
    for slow, fast in zip(_end(Slow(), asked), _end(calibration.tokenizer, asked), strict=True):
        assert torch.equal(slow, fast)


def test_label_rows_carry_the_share_of_the_loss_that_they_are_given(program: Program, calibration: Calibration) -> None:
    labels = torch.zeros(2, 100, dtype=torch.bool)
    labels[0, 80:], labels[1, 90:92] = True, True
    assert torch.allclose(row_weights(labels, None), torch.full((2, 100), 0.01))
    weights = row_weights(labels, 0.5)
    assert torch.allclose(weights.sum(1), torch.ones(2))
    assert torch.allclose((weights * labels).sum(1), torch.full((2,), 0.5))
    assert float((row_weights(labels, 1.0) * ~labels).sum()) == 0
    lesson, asked = Distill(steps=2, batch=2, context=512, rows=128, held_windows=1)._lesson(program, calibration, 512)
    assert asked == 2
    assert lesson.labels.sum(1).tolist()[::2] == [128, 128]
    assert all(0 < count < 128 for count in lesson.labels.sum(1).tolist()[1::2])


def test_label_rows_are_what_is_trained_on(program: Program, lesson: Lesson) -> None:
    with applied(program.model, program.plan, program.tensors), trainable(program.model, "all", 8, None):
        before = copied_weights(program.model)
        losses = []
        for share in (None, 0.0, 0.5, 1.0):
            run = _Run(program.model, settings(labels=share, lr=1e-9), None)
            run.advance(0, lesson)
            losses += run.outcome.losses
            put_weights(program.model, before)
    alike, others, both, labels = losses
    assert both == pytest.approx((others + labels) / 2, rel=1e-4)
    assert alike == pytest.approx((others * (256 - ROWS) + labels * ROWS) / 256, rel=1e-4)
    assert labels != pytest.approx(others, rel=1e-2)


def test_the_teacher_is_asked_once(
    program: Program, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Distill(weights="all", steps=2, batch=1, context=256, rows=64, held_windows=1, checks=1)
    kept = replace(program, scratch=tmp_path)
    first = options.run(kept, calibration)
    monkeypatch.setattr("sparsec.passes.distill.top_k", None)
    assert options.run(kept, calibration).measured["losses"] == first.measured["losses"]


def test_held_out_words_are_no_words_of_training(calibration: Calibration) -> None:
    assert not set(ordinary_words(calibration, "heldout")) & set(ordinary_words(calibration, "train"))
