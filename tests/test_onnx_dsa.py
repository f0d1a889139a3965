"""ONNX exports of models with indexers of their own (DSA): sharing, HISA and MISA, alone and together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_dsa import compiled, indexed, patterned, sets
from test_onnx import exported, prompt
from torch import Tensor, nn

from sparsec.errors import PlanError
from sparsec.export.onnx import dsa, files
from sparsec.export.onnx.artifact import quiet
from sparsec.export.onnx.features import check_exportable
from sparsec.export.onnx.files import WEIGHTS
from sparsec.export.onnx.functions import DOMAIN, OPSET
from sparsec.export.parity import compare
from sparsec.plan import Dsa
from sparsec.plugins.dsa_choice import choose
from sparsec.plugins.families import base_plan
from sparsec.plugins.onnx_runner import OnnxModel
from sparsec.plugins.runtime import install, kv_bytes, new_cache

BLOCK, GATE = 4, 14  # the models choose 8 tokens
HISA = {"block": BLOCK, "top_blocks": 3, "min_context": GATE}
# So many heads that no two tokens score alike.
MISA = {"heads": 12, "block": 2 * BLOCK, "candidates": 10, "min_context": GATE - 2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "glm, shared": ("glm_moe_dsa", "FSF", {}),
    "glm, shared, by blocks": ("glm_moe_dsa", "FSF", {"hisa": HISA}),
    "deepseek, some heads": ("deepseek_v32", "FFF", {"misa": MISA}),
    "deepseek, all together": ("deepseek_v32", "FSS", {"hisa": HISA, "misa": MISA}),
}


@pytest.fixture(scope="module", params=CASES)
def both(
    request: pytest.FixtureRequest, dsa_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, OnnxModel]:
    """A model that runs a plan in PyTorch, and its export."""
    family, pattern, ways = CASES[request.param]
    model = dsa_model(family, layers=3)
    embedding = model.get_input_embeddings().weight
    embedding[0] = embedding[1]  # of padding, all zeros: its keys would score alike
    plan = patterned(base_plan(model.config, "test"), pattern)
    install(model, plan.edit(dsa={**plan.dsa.model_dump(), **ways}), {})  # type: ignore[union-attr]
    return model, exported(model, tmp_path_factory.mktemp("onnx") / "export")


# Around one token, what is chosen, blocks, both gates, and what the best blocks hold.
@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 31])
def test_prompts_and_steps_are_the_references_around_every_edge(both: tuple[Any, OnnxModel], length: int) -> None:
    found = compare(*both, [prompt(length)], steps=12)
    assert max(found["prefill"], found["decode"]) < 1e-5
    assert found["same"] == 1


def test_greedy_text_is_the_references(both: tuple[Any, OnnxModel]) -> None:
    found = compare(*both, [prompt(20)], steps=128)
    assert max(found["prefill"], found["decode"]) < 1e-5
    assert found["same"] == 1


def test_a_padded_batch_is_the_references(both: tuple[Any, OnnxModel]) -> None:
    # PyTorch's padding, on the left, is whole blocks: where they begin depends on it.
    found = compare(*both, [prompt(n) for n in (6, 30, 14, 22)], steps=12)
    assert max(found["prefill"], found["decode"]) < 1e-5
    assert found["same"] == 1


def test_a_sequence_of_any_batch_is_that_sequence_alone(both: tuple[Any, OnnxModel]) -> None:
    _, runner = both
    prompts = [prompt(n) for n in (3, 30, 9, 17)]
    tokens = np.arange(12).reshape(3, 4) + 5

    def logits(some: list[int]) -> np.ndarray:
        runner.reset(len(some))
        return np.stack([runner.prefill([prompts[i] for i in some]), *(runner.step(row[some]) for row in tokens)])

    together = logits([0, 1, 2, 3])
    for i in range(4):
        np.testing.assert_allclose(together[:, i : i + 1], logits([i]), atol=1e-4 * np.abs(together).max())


def test_a_long_prompt_in_chunks_and_stores_that_grow(both: tuple[Any, OnnxModel], monkeypatch: Any) -> None:
    monkeypatch.setattr("sparsec.plugins.onnx_runner.CHUNK", 7)
    monkeypatch.setattr("sparsec.plugins.onnx_runner.SLOTS", 16)
    found = compare(*both, [prompt(38), prompt(6)], steps=20)
    assert max(found["prefill"], found["decode"]) < 1e-5
    assert found["same"] == 1


def test_stores_hold_what_the_reference_holds(both: tuple[Any, OnnxModel], monkeypatch: Any) -> None:
    monkeypatch.setattr("sparsec.plugins.onnx_runner.SLOTS", 40)
    model, runner = both
    runner.reset(1)
    runner.prefill([prompt(40)])
    cache = new_cache(model)
    model(torch.tensor([prompt(40)]), past_key_values=cache, use_cache=True)
    assert runner.kv_bytes == kv_bytes(cache)


def test_weights_are_stored_once_and_what_saves_no_time_is_said(both: tuple[Any, OnnxModel]) -> None:
    model, runner = both
    weights = {weight.data_ptr(): weight.nbytes for weight in model.parameters() if weight.nbytes >= files.SMALL}
    size = (runner.folder / WEIGHTS).stat().st_size
    assert size <= sum(-(-each // files.ALIGNED) * files.ALIGNED for each in weights.values()) + files.ALIGNED * 8
    said, plan = runner.manifest.get("choice", ""), model.sparsec_plan.dsa
    assert ("HISA" in said, "MISA" in said) == (plan.hisa is not None, plan.misa is not None)
    used = runner.manifest["operators_used"]
    assert {"Experts", "TopTokens", "KeptAttention"} <= set(used["prefill"])
    assert {"Experts", "TopTokens", "ChosenDecode"} <= set(used["decode"])


class Choice(nn.Module):
    """The nodes by which rows choose."""

    def __init__(self, how: Dsa) -> None:
        super().__init__()
        self.how = how

    def forward(self, q: Tensor, w: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
        return dsa.chosen(q, w, index, lengths, self.how)


WAYS: dict[str, dict[str, Any]] = {
    "all tokens": {},
    "blocks": {"hisa": {"block": 5, "top_blocks": 3}},
    "blocks that may hold too few": {"hisa": {"block": 4, "top_blocks": 2}},
    "more blocks than there are": {"hisa": {"block": 16, "top_blocks": 9}},
    "heads": {"misa": {"heads": 12, "block": 7}},
    "heads and candidates": {"misa": {"heads": 12, "block": 7, "candidates": 11}},
    "more candidates than tokens": {"misa": {"heads": 12, "block": 64, "candidates": 99}},
    "both": {"hisa": {"block": 4, "top_blocks": 3}, "misa": {"heads": 12, "block": 8, "candidates": 10}},
    "both, gated apart": {
        "hisa": {"block": 4, "top_blocks": 3, "min_context": 20},
        "misa": {"heads": 12, "block": 8, "candidates": 10, "min_context": 27},
    },
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PyTorch about itself
@pytest.mark.parametrize("way", WAYS)
def test_nodes_choose_what_the_reference_chooses(way: str, tmp_path: Path) -> None:
    tokens, heads = 45, 16
    q, k, w, visible = indexed(5, tokens, heads)
    how = Dsa.model_validate({"top_k": 8, "heads": heads, "dim": 16, **WAYS[way]})
    expected = sets(choose(q, k, w, visible, how), visible)
    inputs = (q, w, k[:, None], torch.zeros(2, dtype=torch.long))
    with quiet(), (tmp_path / WEIGHTS).open("wb") as file:
        program = torch.onnx.export(
            Choice(how).eval(), inputs, opset_version=OPSET, dynamo=True, optimize=False, verbose=False
        )
        files.write_graph(program, tmp_path / "choice.onnx", files.Weights(file), {})
    files.check(tmp_path / "choice.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "choice.onnx"))
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    assert np.array_equal(found, expected.numpy())


@pytest.mark.slow
def test_half_precision(dsa_model: Callable[..., Any], tmp_path: Path) -> None:
    model = dsa_model("glm_moe_dsa", layers=3, index_topk=64).half()  # no choice hangs on rounding
    install(model, patterned(base_plan(model.config, "test"), "FSF"), {})
    runner = exported(model, tmp_path / "export", "float16")
    assert {each.type for each in runner._inputs.values()} == {"tensor(float16)"}
    found = compare(model, runner, [prompt(n) for n in (4, 21)], steps=12)
    assert max(found["prefill"], found["decode"]) < 2e-2


def test_commands_export_and_generate(cli: Callable[..., Any], tiny_dsa: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--set=hisa.block=16", "--set=misa.block=64", "--set=misa.two_stage=true", "--set=misa.heads=12"]
    done = compiled(cli, tiny_dsa, out, "hisa,misa", *more)
    assert done.status == 0, done.err
    made = cli("export", out, "--to", "onnx")
    assert made.status == 0, made.err
    assert "choice is masked: HISA and MISA score every token" in made.out
    same = [
        json.loads(cli("generate", out, "abcdefgh" * 12, "--max-new-tokens", "16", "--json", *engine).out)["text"]
        for engine in ((), ("--engine", "onnx"))
    ]
    assert same[0] == same[1]
    for kind in files.KINDS:
        proto = onnx.load(out / "onnx" / f"{kind}.onnx", load_external_data=False)
        used = {node.op_type for node in proto.graph.node if node.domain == DOMAIN}
        assert {"InBlocks", "RouteHeads", "Rescore"} <= used == {each.name for each in proto.functions}
    refused = cli("export", out, "--to", "tensorrt")
    assert (refused.status, "are not built yet: use --to onnx" in refused.line) == (1, True)


def test_what_cannot_be_exported_is_refused(dsa_config: Callable[..., Any]) -> None:
    config = dsa_config("glm_moe_dsa")
    plan = base_plan(config, "test")
    check_exportable(plan, config)
    config.hidden_act = "gelu"
    with pytest.raises(PlanError, match="experts with gelu for silu cannot be exported"):
        check_exportable(plan, config)
