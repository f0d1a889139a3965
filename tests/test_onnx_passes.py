"""ONNX exports of what passes add to heads and selectors, and half precision at every edge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from test_onnx import MIXED, PLANS, SELECTOR, exported, planned, prompt

import sparsec
from sparsec.export.onnx.artifact import write_graphs
from sparsec.export.onnx.functions import DOMAIN
from sparsec.export.onnx.routing import MASKED
from sparsec.export.parity import compare
from sparsec.export.verdicts import PASS
from sparsec.plugins.onnx_runner import MANIFEST, OnnxModel
from sparsec.plugins.runtime import new_cache, stepping
from sparsec.plugins.step import Step

EDGES = [5, 6, 7, 8, 9, 10, 11, 12]  # of window, ring, blocks, least kept and min_context


def test_half_precision_at_every_edge(small_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = small_llama(layers=3).half()
    plan = PLANS["blocks of every head, before RoPE"]
    # Least kept: 5 unforced tokens, two blocks. A choice by rank hangs less on rounding than one by mass.
    planned(model, **plan | {"selector": {**plan["selector"], "top_p": 1e-3, "min_keep": 5}})
    runner = exported(model, tmp_path / "export", "float16")
    for lengths in (EDGES[:4], EDGES[4:], [3, 40, 9, 17]):  # padded batches of 4 whose rings go round
        found = compare(model, runner, [prompt(n) for n in lengths], steps=18)
        assert max(found["prefill"], found["decode"]) < 1e-2
        assert found["same"] > 0.95


@pytest.mark.parametrize("name", PLANS)
def test_decode_rows_under_masks_are_the_references(name: str, small_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = small_llama(layers=3)
    planned(model, **PLANS[name])
    write_graphs(model, tmp_path, source={}, dtype="float32", slots=64)  # as for TensorRT without plugins
    runner = OnnxModel(tmp_path, device="cpu", threads=1)
    assert "MaskedDecode" in runner.manifest["operators_used"]["decode"]
    for lengths in ([1], EDGES[:4], EDGES[4:], [3, 40, 9, 17]):
        found = compare(model, runner, [prompt(n) for n in lengths], steps=18)
        assert max(found["prefill"], found["decode"]) < 1e-5
        assert found["same"] == 1


ROUTING = {
    "width": 48, "rank": 4, "activation": "silu", "hidden": 3, "threshold": 0.0, "sinks": 2, "special": (7, 11),
    "attention": (1, 2), "mlp": (0, 1, 2),
}  # fmt: skip


@pytest.fixture(scope="module", params=[4, 0], ids=["forecast", "skip"])
def routed(
    request: pytest.FixtureRequest, small_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, OnnxModel]:
    model = small_llama(layers=3)
    planned(model, selector=SELECTOR, layers=MIXED, min_context=10, routing={**ROUTING, "rank": request.param})
    return model, exported(model, tmp_path_factory.mktemp("routed") / "export")


def test_routed_units_are_the_references(routed: tuple[Any, OnnxModel]) -> None:
    model, runner = routed
    shares: list[float] = []
    with stepping(Step(decode=False, observe_paths=lambda *seen: shares.append(float(seen[2].float().mean())))):
        model(torch.tensor([prompt(40)]), past_key_values=new_cache(model, "reference"))
    assert len(shares) == 5
    assert min(shares) > 0.1
    assert max(shares) < 0.95  # both branches are taken by some tokens of every unit
    for lengths in ([1], [2], [3, 30, 9, 17]):
        found = compare(model, runner, [prompt(n) for n in lengths], steps=12)
        assert max(found["prefill"], found["decode"]) < 1e-5
        assert found["same"] == 1


def test_routing_says_that_it_is_masked_and_leaves_the_model_as_it_was(routed: tuple[Any, OnnxModel]) -> None:
    model, runner = routed
    assert runner.manifest["routing"] == MASKED
    proto = onnx.load(runner.folder / "decode.onnx", load_external_data=False)
    assert not {"If", "Loop"} & {node.op_type for node in proto.graph.node if node.domain != DOMAIN}
    assert torch.isfinite(model(torch.tensor([prompt(9)]), use_cache=True).logits).all()
    assert not any(hasattr(module, "sparsec_kept") for module in model.modules())


@pytest.fixture(scope="module")
def merged(cli: Any, tiny_deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged tokens and windows, and its ONNX export."""
    out = tmp_path_factory.mktemp("merged") / "out"
    settings = ["dynamic-tokenization.merges=200", "dynamic-tokenization.prediction=mean", "window.window=64"]
    settings += ["gate.max_loss=9", "gate.context=256", "gate.rows=64"]
    line = [part for each in settings for part in ("--set", each)]
    done = cli("compile", tiny_deep, "--passes", "window,dynamic-tokenization", *line, "-o", out)
    assert done.status == 0, done.err
    done = cli("export", out, "--to", "onnx")
    assert done.status == 0, done.err
    return out


def test_merged_tokens_are_read_and_never_written(merged: Path, cli: Any, tmp_path: Path) -> None:
    model, tokenizer = sparsec.load(merged)
    ids = [tokenizer(text)["input_ids"] for text in ("the value of the function is the same", "the type")]
    own = model.sparsec_plan.vocabulary
    assert max(ids[0]) >= own.base
    runner = OnnxModel(merged / "onnx", device="cpu", threads=1)
    found = compare(model, runner, ids, steps=8)
    assert max(found["prefill"], found["decode"]) < 1e-5
    assert runner.manifest["suppress"] == [[own.base, own.rows]]
    # A graph whose merged rows win all the same: only the suppression keeps them from being written.
    step = runner.step
    runner.step = lambda tokens: np.roll(step(tokens), own.rows - own.base, 1)  # type: ignore[method-assign]
    assert max(runner.generate(ids, max_new_tokens=12, stop=())[0]) < own.base
    same = [
        json.loads(cli("generate", merged, "the value of", "--max-new-tokens", "12", "--json", *engine).out)["text"]
        for engine in ((), ("--engine", "onnx"))
    ]
    assert same[0] == same[1]


def test_golden_prompts_are_read_merged_on_every_engine(merged: Path, cli: Any, tmp_path: Path) -> None:
    artifact = shutil.copytree(merged, tmp_path / "artifact")
    done = cli("verify", artifact, "--quick", "--json")
    assert done.status == 0, done.err
    found = {(each["name"], each["engine"]): each["status"] for each in json.loads(done.out)["checks"]}
    assert found["next tokens", "onnx"] == found["greedy tokens", "onnx"] == PASS
    assert json.loads((artifact / "onnx" / MANIFEST).read_text())["suppress"]
