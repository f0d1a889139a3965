"""Informed Routing's third stage: distill on a plan that routes and does nothing else, LoRA merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.distillation import Lesson, Settings, distill, hold_out, student_hidden
from sparsec.calibrate.questions import training_windows
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.teacher import top_k
from sparsec.calibrate.trainable import changed_weights, copied_weights, put_weights, trainable
from sparsec.compiler.pipeline import Job, compile_model
from sparsec.compiler.recipe import make_recipe
from sparsec.compiler.source import load_model, load_tokenizer
from sparsec.events import silent
from sparsec.layout import MANIFEST, TENSORS
from sparsec.passes.base import Program
from sparsec.passes.distill import Distill
from sparsec.passes.informed_routing import InformedRouting
from sparsec.plugins.families import base_plan
from sparsec.plugins.load import load
from sparsec.plugins.runtime import added_tensors, applied, new_cache, rows_as, stepping
from sparsec.plugins.step import Step

ROWS, LENGTH = 32, 128
ROUTING: dict[str, Any] = {
    "context": 128, "tokens": 1024, "samples": 512, "epochs": 0, "steps": 0, "rank": 4, "sensitivity_windows": 1,
    "search_windows": 1, "remove": 0.3,
}  # fmt: skip
DISTILL: dict[str, Any] = {
    "context": 256, "rows": 64, "steps": 30, "batch": 2, "windows": 8, "held_windows": 2, "checks": 6, "lora_rank": 8,
    "lr": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def calibration(tiny_deep: Path) -> Calibration:
    return Calibration(read_corpus(), AutoTokenizer.from_pretrained(tiny_deep))


@pytest.fixture(scope="module")
def program(tiny_deep: Path, calibration: Calibration) -> Program:
    model = AutoModelForCausalLM.from_pretrained(tiny_deep).eval().requires_grad_(False)
    with torch.no_grad():
        model.model.norm.weight.mul_(40.0)  # a random model says next to nothing: this one has opinions
    found = InformedRouting(**ROUTING).run(Program(model, base_plan(model.config, "test"), {}, seed=3), calibration)
    return Program(model, found.plan, found.tensors, seed=3)


@pytest.fixture(scope="module")
def tokens(calibration: Calibration) -> Tensor:
    return training_windows(calibration, "train", length=LENGTH, count=4, rows=ROWS, questions=0.0, seed=0).tokens


def paths(run: Callable[[Step], Any], step: Step) -> dict[tuple[int, str], Tensor]:
    seen: dict[tuple[int, str], Tensor] = {}
    step.observe_paths = lambda layer, unit, ran: seen.__setitem__((layer, unit), ran)
    run(step)
    return seen


def test_the_student_takes_the_paths_of_prefill_and_decode(program: Program, tokens: Tensor) -> None:
    model = program.model
    with applied(model, program.plan, program.tensors), torch.no_grad():
        whole = student_hidden(model, tokens, ROWS)
        cache, parts = new_cache(model), []
        with rows_as("prefill"):
            parts.append(model.get_decoder()(input_ids=tokens[:, :-ROWS], past_key_values=cache).last_hidden_state)
        for t in range(LENGTH - ROWS, LENGTH):
            with stepping(Step(decode=True)):
                step = model.get_decoder()(input_ids=tokens[:, t : t + 1], past_key_values=cache)
            parts.append(step.last_hidden_state)
    torch.testing.assert_close(whole, torch.cat(parts, 1), atol=3e-4, rtol=1e-4)


def test_lora_learns_under_routing_and_leaves_routers_and_forecasters(
    program: Program, calibration: Calibration, tokens: Tensor
) -> None:
    model, before = program.model, copied_weights(program.model)
    taught = top_k(model, tokens, 10, 2, torch.no_grad, silent)
    other = training_windows(calibration, "search", length=LENGTH, count=2, rows=ROWS, questions=0.0, seed=0)
    held = hold_out(model, other.tokens, ROWS, ROWS)
    try:
        with applied(model, program.plan, program.tensors):
            with trainable(model, "lora", 8, None):
                assert not [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
                settings = Settings(steps=24, lr=1e-3, warmup=2, checks=4)
                labels = torch.zeros_like(tokens, dtype=torch.bool)
                lesson = Lesson(tokens, labels, taught, held, rows=ROWS, batch=2, micro_batch=2)
                outcome = distill(model, lesson, settings, state=None, listen=silent)
            kept = added_tensors(model)
        assert outcome.best_step > 0
        assert min(kl for _, kl in outcome.checks) < outcome.checks[0][1]
        assert changed_weights(model, before)
        assert kept.keys() == program.tensors.keys()
        assert all(torch.equal(kept[name], program.tensors[name]) for name in kept)
    finally:
        put_weights(model, before)


def test_units_that_no_token_runs_have_no_gradient(program: Program, tokens: Tensor) -> None:
    model, before = program.model, copied_weights(program.model)
    away = {n: t - 1e6 if n.endswith("mlp.router.linear.bias") else t for n, t in program.tensors.items()}
    assert program.plan.routing is not None
    plan = program.plan.edit(routing=program.plan.routing.model_dump() | {"sinks": 0, "special": ()})
    with applied(model, plan, away), trainable(model, "lora", 4, False):
        student_hidden(model, tokens[:1], ROWS).square().mean().backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().sum())}
    assert any("self_attn" in name for name in reached)
    assert not any(".mlp." in name for name in reached)
    put_weights(model, before)


def test_mixed_precision_takes_the_same_way(program: Program, tokens: Tensor) -> None:
    model = program.model
    with applied(model, program.plan, program.tensors), torch.no_grad():
        wanted = student_hidden(model, tokens[:2], ROWS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = student_hidden(model, tokens[:2], ROWS)
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.1


def test_an_artifact_of_routing_and_distill_is_a_plain_checkpoint(
    program: Program, calibration: Calibration, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    program.model.save_pretrained(source)
    calibration.tokenizer.save_pretrained(source)
    passes = {"informed-routing": ROUTING, "distill": DISTILL}
    recipe = make_recipe({"passes": passes, "gate": {"context": 256, "max_loss": 1}})
    outcome = compile_model(Job(str(source), tmp_path / "out", recipe, tmp_path / "cache"))
    assert [each.name for each in outcome.plan.passes] == ["informed-routing", "distill"]
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["weights"] == "trained"
    trained = outcome.measurements["passes"][1]["measured"]
    assert trained["kl_best"] < trained["kl_before"]
    model, _ = load(tmp_path / "out")
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert load_file(tmp_path / "out" / TENSORS).keys() == added_tensors(model).keys()


@pytest.mark.slow
def test_the_demo_model_heals_under_routing(demo_source: Any) -> None:
    model, tokenizer = load_model(demo_source, dtype="float32"), load_tokenizer(demo_source)
    calibration = Calibration(read_corpus(), tokenizer)
    short = {"context": 256, "tokens": 2048, "samples": 2048, "epochs": 0, "steps": 0, "rank": 32, "search_windows": 1}
    dense = Program(model, base_plan(model.config, "test"), {})
    routed = InformedRouting(**{**short, "sensitivity_windows": 1, "remove": 0.2}).run(dense, calibration)
    healing = Distill(lora_rank=16, steps=12, batch=1, context=256, rows=64, held_windows=1, checks=2, lr=3e-4)
    found = healing.run(Program(model, routed.plan, routed.tensors), calibration).measured
    assert found["best_step"] > 0
    assert found["kl_best"] < 0.95 * found["kl_before"]
