"""ONNX exports: the graphs mean the execution contract, and whatever they cannot mean is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from sparsec.errors import ArtifactError, PlanError, UsageError
from sparsec.export.integrity import check_files
from sparsec.export.manifest import read_manifest
from sparsec.export.onnx.artifact import replace, write_graphs
from sparsec.export.onnx.features import check_exportable
from sparsec.export.onnx.files import WEIGHTS
from sparsec.export.onnx.functions import DOMAIN, FUNCTIONS, OPSET, function
from sparsec.export.parity import compare
from sparsec.plan import Plan
from sparsec.plugins.families import shape_of
from sparsec.plugins.onnx_runner import OnnxModel
from sparsec.plugins.runtime import install, kv_bytes, new_cache, tensor_names

WINDOW, SINKS, CONTEXT = 6, 2, 10
SELECTOR = {
    "rank": 4, "rope": "post", "top_p": 0.7, "granularity": "token", "block": 4, "sinks": 2, "recent": 2,
    "min_keep": 3, "scope": "layer",
}  # fmt: skip
MIXED = [  # local and retrieval heads on one KV head, all retrieval, all local
    {"heads": (0, 0, 1, 0), "index": "full"},
    {"heads": (1, 1, 1, 1), "index": "shared"},
    {"heads": (0, 0, 0, 0)},
]
PLANS: dict[str, dict[str, Any]] = {
    "shared tokens": {"selector": SELECTOR, "layers": MIXED, "min_context": CONTEXT},
    "blocks of every head, before RoPE": {
        "selector": {**SELECTOR, "rope": "pre", "granularity": "block", "scope": "head"},
        "layers": [MIXED[0], {"heads": (1, 1, 1, 0), "index": "full"}, {"heads": (0, 1, 1, 1)}],
    },
    "tokens of every KV head": {
        "selector": {**SELECTOR, "scope": "kv_head"},
        "layers": [MIXED[0], {"heads": (1, 1, 1, 0), "index": "full"}, {"heads": (0, 0, 0, 0)}],
    },
}


def planned(model: Any, **fields: Any) -> Plan:
    """The plan on the model, with random indexers."""
    window = {"size": WINDOW, "sinks": SINKS}
    plan = Plan.parse({"producer": "test", "model": shape_of(model.config), "window": window, **fields})
    generator = torch.Generator().manual_seed(1)
    # Small, so that no weight is a denormal number, which ONNX Runtime may round to none.
    tensors = {name: torch.randn(size, generator=generator) / 4 for name, size in tensor_names(plan).items()}
    install(model, plan, tensors)
    return plan


def exported(model: Any, folder: Path, dtype: str = "float32") -> OnnxModel:
    folder.mkdir()
    write_graphs(model, folder, source={}, dtype=dtype)
    return OnnxModel(folder, device="cpu", threads=1)


def prompt(length: int, seed: int = 0) -> list[int]:
    found: list[int] = torch.randint(60, (length,), generator=torch.Generator().manual_seed(seed + length)).tolist()
    return found


@pytest.fixture(scope="module", params=PLANS)
def both(
    request: pytest.FixtureRequest, small_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, OnnxModel]:
    """A model that runs a plan in PyTorch, and its export."""
    model = small_llama(layers=3)
    planned(model, **PLANS[request.param])
    return model, exported(model, tmp_path_factory.mktemp("onnx") / "export")


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 31])
def test_prompts_and_steps_are_the_references_around_every_edge(both: tuple[Any, OnnxModel], length: int) -> None:
    found = compare(*both, [prompt(length)], steps=20)  # the ring goes round twice
    assert max(found["prefill"], found["decode"]) < 1e-5
    assert found["same"] == 1


def test_a_padded_batch_is_the_references(both: tuple[Any, OnnxModel]) -> None:
    found = compare(*both, [prompt(n) for n in (3, 30, 9, 17)], steps=12)
    assert max(found["prefill"], found["decode"]) < 1e-5
    assert found["same"] == 1


def test_a_long_prompt_in_chunks_and_stores_that_grow(both: tuple[Any, OnnxModel], monkeypatch: Any) -> None:
    monkeypatch.setattr("sparsec.plugins.onnx_runner.CHUNK", 7)
    monkeypatch.setattr("sparsec.plugins.onnx_runner.SLOTS", 16)
    found = compare(*both, [prompt(40), prompt(5)], steps=20)
    assert max(found["prefill"], found["decode"]) < 1e-5


def test_stores_are_as_large_as_the_plan_says(both: tuple[Any, OnnxModel], monkeypatch: Any) -> None:
    monkeypatch.setattr("sparsec.plugins.onnx_runner.SLOTS", 40)
    model, runner = both
    runner.reset(1)
    runner.prefill([prompt(40)])
    cache = new_cache(model, "reference")
    model(torch.tensor([prompt(40)]), past_key_values=cache, use_cache=True)
    numbers = sum(layer.local.pos.nbytes for layer in cache.layers if layer.local.pos is not None)
    # A ring that may be dense up to min_context holds as many tokens.
    more = max(0, model.sparsec_plan.min_context - WINDOW - SINKS) * 2 * 16 * 4
    rings = sum(len(layer.local_kv_heads(2)) for layer in model.sparsec_plan.layers)
    assert runner.kv_bytes == kv_bytes(cache) - numbers + rings * more


def test_what_is_written_in_place_is_said(both: tuple[Any, OnnxModel]) -> None:
    _, runner = both
    every = {name.replace("past.", "present."): name for name in runner._inputs}
    assert runner.manifest["aliased"]["decode"] == every
    prompts = {after: before for after, before in every.items() if ".full_" in after}
    assert runner.manifest["aliased"]["prefill"] == prompts


def test_generation_streams_and_ends(both: tuple[Any, OnnxModel]) -> None:
    _, runner = both
    (whole,) = runner.generate([prompt(9)], max_new_tokens=12, stop=())
    assert len(whole) == 12
    (ended,) = runner.generate([prompt(9)], max_new_tokens=12, stop={whole[4]})
    assert ended == whole[: whole.index(whole[4]) + 1]


@pytest.mark.slow
def test_half_precision(small_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = small_llama(layers=3).half()
    planned(model, **PLANS["shared tokens"] | {"selector": {**SELECTOR, "top_p": 1}})  # no choice hangs on rounding
    runner = exported(model, tmp_path / "export", "float16")
    assert all(each.type == "tensor(float16)" for each in runner._inputs.values())
    found = compare(model, runner, [prompt(n) for n in (4, 21)], steps=12)
    assert max(found["prefill"], found["decode"]) < 1e-2


def test_files_hold_weights_once_bodies_and_where_they_come_from(both: tuple[Any, OnnxModel]) -> None:
    model, runner = both
    weights = {weight.data_ptr(): weight.nbytes for weight in model.parameters() if weight.nbytes >= 1024}
    size = (runner.folder / WEIGHTS).stat().st_size
    assert size <= sum(-(-each // 4096) * 4096 for each in weights.values()) + 4096 * 8
    for kind in ("prefill", "decode"):
        proto = onnx.load(runner.folder / f"{kind}.onnx", load_external_data=False)
        assert {each.domain: each.version for each in proto.opset_import} == {"": OPSET, DOMAIN: 1}
        used = {node.op_type for node in proto.graph.node if node.domain == DOMAIN}
        assert used == {each.name for each in proto.functions}
        assert used <= FUNCTIONS.keys()
        facts = {each.key: each.value for each in proto.metadata_props}
        assert facts["plan_digest"] == model.sparsec_plan.digest
        assert facts["producer"].startswith("sparsec ")
        for node in proto.graph.node:
            if node.domain == DOMAIN:
                assert "plugin_namespace" in {each.name for each in node.attribute}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_body_is_of_standard_operators(name: str) -> None:
    body = function(name)
    context = onnx.checker.C.CheckerContext()
    context.ir_version = onnx.IR_VERSION
    context.opset_imports = {entry.domain: entry.version for entry in body.opset_import}
    onnx.checker.check_function(body, context)
    assert {node.domain for node in body.node} == {""}


def test_what_graphs_cannot_mean_is_refused(small_llama: Callable[..., Any]) -> None:
    model = small_llama(layers=3)
    plan = planned(model, **PLANS["shared tokens"])
    check_exportable(plan, model.config)
    with pytest.raises(PlanError, match="compensate cannot be exported"):
        check_exportable(plan.edit(window={"size": 4, "sinks": 1, "compensate": True}))
    with pytest.raises(PlanError, match="prefill cannot be exported"):
        check_exportable(plan.edit(selector={**SELECTOR, "prefill": "selector"}))
    with pytest.raises(PlanError, match=r"index_dtype cannot be exported yet: compile with rtpurbo.index_dtype=model"):
        check_exportable(plan.edit(selector={**SELECTOR, "index_dtype": "fp8"}))
    levels = {"granularity": "block", "coarse": {"min_context": 0}}
    with pytest.raises(PlanError, match=r"coarse cannot be exported yet: compile with rtpurbo.coarse_from=null"):
        check_exportable(plan.edit(selector={**SELECTOR, **levels}))
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(PlanError, match="dynamic rotary embeddings"):
        check_exportable(plan, model.config)


def test_a_field_that_the_exporter_does_not_know_is_refused(small_llama: Callable[..., Any]) -> None:
    class Later(Plan):
        later: int | None = None

    plan = planned(small_llama(layers=3), **PLANS["shared tokens"])
    check_exportable(Later.model_validate(plan.model_dump()))
    with pytest.raises(PlanError, match="the plan's later cannot be exported"):
        check_exportable(Later.model_validate({**plan.model_dump(), "later": 3}))


def test_the_runner_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no ONNX export: sparsec export"):
        OnnxModel(tmp_path)
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(UsageError, match="no device 'tpu'"):
        OnnxModel(tmp_path, device="tpu")
    for kind in ("prefill", "decode"):
        (tmp_path / f"{kind}.onnx").write_bytes(b"broken")
    with pytest.raises(ArtifactError, match=r"cannot load .*prefill.onnx"):
        OnnxModel(tmp_path, device="cpu")


def test_a_folder_that_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine").touch()
    (tmp_path / "aside").mkdir()
    with pytest.raises(ArtifactError, match="no export of sparsec"):
        replace(tmp_path / "aside", tmp_path / "onnx")
    assert (tmp_path / "onnx" / "mine").exists()


def test_commands_export_generate_and_diagnose(cli: Callable[..., Any], tiny_artifact: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "tiny"
    shutil.copytree(tiny_artifact, artifact)
    missing = cli("generate", artifact, "abc", "--engine", "onnx")
    assert (missing.status, "sparsec export" in missing.line) == (1, True)
    made = cli("export", artifact, "--to", "onnx", "--json")
    assert made.status == 0, made.err
    assert json.loads(made.out)["onnx"]["opset"] == OPSET
    assert sorted(file.name for file in artifact.glob(".*")) == []
    same = [
        json.loads(cli("generate", artifact, "abcdefgh" * 12, "--max-new-tokens", "16", "--json", *engine).out)["text"]
        for engine in ((), ("--engine", "onnx"))
    ]
    assert same[0] == same[1]
    found = json.loads(cli("doctor", artifact, "--json").out)["exports"]
    assert found["onnx"]["loads"]
    assert not found["tensorrt"]["loads"]
    check_files(artifact, read_manifest(artifact))
    with (artifact / "onnx" / WEIGHTS).open("r+b") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="is not what"):
        check_files(artifact, read_manifest(artifact))
    assert "damaged" in json.loads(cli("doctor", artifact, "--json").out)["exports"]["onnx"]["why"]


def test_a_wrong_call_is_one_line(cli: Callable[..., Any], tiny_artifact: Path) -> None:
    assert cli("export", tiny_artifact, "--to", "onxn").status == 2
    never = cli("compile", "demo", "--passes", "window", "-o", tiny_artifact / "new", "--export", "onxn")
    assert (never.status, "--export onxn: there is none of that name" in never.line) == (2, True)
    assert cli("export", tiny_artifact, "--to", "onnx", "--dtype", "int8").status == 2
    assert cli("export", tiny_artifact.parent, "--to", "onnx").status == 1
    wrong = cli("generate", tiny_artifact, "abc", "--engine", "onnx", "--dense")
    assert (wrong.status, "leave --dense" in wrong.line) == (2, True)
