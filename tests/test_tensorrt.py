"""Engines: built for real with TensorRT-RTX where it is installed, which needs no GPU. None is run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsec.compiler.diagnosis import diagnosis
from sparsec.errors import UsageError
from sparsec.export.onnx.artifact import write_graphs
from sparsec.export.onnx.files import KINDS
from sparsec.export.tensorrt import build, export_tensorrt, flavour_of
from sparsec.export.tensorrt_options import RTX_CAPABILITIES, Build, Options, Profile, parse
from sparsec.plan import Plan
from sparsec.plugins.families import shape_of
from sparsec.plugins.runtime import install, tensor_names

RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not RTX, reason="TensorRT-RTX is not installed: pip install '.[tensorrt-rtx]'")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_flavour_that_is_missing_is_named_with_the_way_to_it() -> None:
    with pytest.raises(UsageError, match="pip install tensorrt on the machine with the GPU"):
        flavour_of("tensorrt")


@needs_rtx
def test_what_rtx_cannot_be_built_for_is_refused_before_the_work(tiny_artifact: Path) -> None:
    with pytest.raises(UsageError, match="not 90: use --trt tensorrt"):
        export_tensorrt(tiny_artifact, flavour="rtx", slots=64, capabilities=(89, 90))
    with pytest.raises(UsageError, match="ranks 3840 tokens at most, not 4096"):
        export_tensorrt(tiny_artifact, flavour="rtx", slots=4096)
    with pytest.raises(UsageError, match="has no strip: it needs a GPU"):
        export_tensorrt(tiny_artifact, flavour="rtx", slots=64, options=Options(strip=True))
    with pytest.raises(UsageError, match="512 rows does not fit in 64 slots"):
        export_tensorrt(tiny_artifact, flavour="rtx", slots=64, profile=Profile())


def test_options_are_read(tmp_path: Path) -> None:
    times = tmp_path / "times"
    assert parse(["refit", "strip=false", f"timing-cache={times}", "rows=1,64,128", "capabilities=86,89"]) == Build(
        Options(timing_cache=times, refit=True), Profile(rows=(1, 64, 128)), (86, 89)
    )
    assert parse([]) == Build()


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["fast"], "there is no 'fast'. Known: refit, strip"),
        (["refit", "refit=true"], "stands twice"),
        (["refit=1"], "it is true or false"),
        (["rows"], "wants a value: rows=1,256,512"),
        (["rows=1,2"], "least, usual and most"),
        (["batch=4,1,1"], "least, usual and most"),
        (["batch=0,1,1"], "least, usual and most"),
        (["capabilities=8.9"], "compute capabilities"),
        (["timing-cache=/nowhere/times"], "name a file in a folder that is there"),
    ],
)
def test_wrong_options_are_named(texts: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(texts)


def test_options_on_the_command_line(cli: Callable[..., Any], tiny_artifact: Path) -> None:
    to = ("export", tiny_artifact, "--to")
    wrong = cli(*to, "tensorrt", "--trt", "rtx", "--trt-option", "fast")
    assert (wrong.status, "there is no 'fast'" in wrong.line) == (2, True)
    wrong = cli(*to, "onnx", "--trt-option", "refit")
    assert (wrong.status, "--to onnx builds none" in wrong.line) == (2, True)
    if RTX:
        wrong = cli(*to, "tensorrt", "--trt", "rtx", "--trt-option", "timing-cache=times")
        assert (wrong.status, "has no timing-cache: it measures no kernels" in wrong.line) == (2, True)
        wrong = cli(*to, "tensorrt", "--trt", "rtx", "--trt-option", "capabilities=89,90")
        assert (wrong.status, "not 90: use --trt tensorrt" in wrong.line) == (2, True)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("plugins", [False, True])
def test_engines_are_built_and_say_where_they_load(plugins: bool, tiny_artifact: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "tiny"
    shutil.copytree(tiny_artifact, artifact)
    script = (
        "import json, sys; from pathlib import Path; from sparsec.export.tensorrt import export_tensorrt; "
        "made = export_tensorrt(Path(sys.argv[1]), flavour='rtx', slots=64, plugins=sys.argv[2] == 'True'); "
        "print(json.dumps(made))"
    )  # in a process of its own: Triton's interpreter, which tests use, compiles nothing
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    call = [sys.executable, "-c", script, str(artifact), str(plugins)]
    ran = subprocess.run(call, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    made: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert made["compute_capabilities"] == list(RTX_CAPABILITIES)
    assert {name for name in made["files"] if name.endswith(".engine")} == {"prefill.engine", "decode.engine"}
    for kind in KINDS:
        assert made["layers"][kind].get("KV_CACHE_UPDATE", 0) == len(made["aliased"][kind])
    assert made["aliased"]["decode"]
    assert ("TOPK" in made["layers"]["decode"]) != plugins
    assert (made["layers"]["decode"].get("PLUGIN_V3", 0) > 0) == plugins
    assert bool(made["plugins"]) == plugins
    for plugin in made["plugins"]:
        assert {each["sha256"] for each in plugin["ptx"].values()} <= set(made["files"].values())
    why = diagnosis(artifact)["exports"]["tensorrt"]["why"]
    assert torch.cuda.is_available() or why == "there is no GPU to run it on"


KEPT = {  # retrieval heads by layer, of which a compile of the demo model finds most
    6: (0,), 7: (4,), 14: (1, 5), 15: (3,), 17: (3, 4), 18: (6, 7), 19: (1,), 20: (6, 8), 21: (2, 5, 8), 23: (1, 2),
    24: (0, 3, 5),
}  # fmt: skip
OVER = 1.1  # an engine's bytes beside the weights'


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(("granularity", "rope", "plugins"), [("token", "post", False), ("block", "pre", True)])
def test_engines_of_the_demo_model_are_built(
    granularity: str, rope: str, plugins: bool, demo_source: Any, tmp_path: Path
) -> None:
    """Whole, with the heads and sharing of a compile; what an indexer's weights are does not matter to a builder."""
    from sparsec.plugins import tensorrt_rtx

    trt = importlib.import_module("tensorrt_rtx")
    model = AutoModelForCausalLM.from_pretrained(demo_source.path, dtype=torch.float16).eval().requires_grad_(False)
    layers: list[dict[str, Any]] = []
    for layer in range(30):
        row = tuple(int(head in KEPT.get(layer, ())) for head in range(9))
        index = "none" if layer not in KEPT else "full" if layer in (6, 17, 20) else "shared"
        layers.append({"heads": row, "index": index})
    selector = {
        "rank": 16, "rope": rope, "top_p": 0.9, "granularity": granularity, "block": 64, "sinks": 4, "recent": 64,
        "min_keep": 64, "scope": "layer",
    }  # fmt: skip
    window = {"size": 512, "sinks": 4}
    shape = shape_of(model.config)
    plan = Plan.parse({"producer": "test", "model": shape, "window": window, "selector": selector, "layers": layers})
    install(model, plan, {name: torch.randn(size) / 4 for name, size in tensor_names(plan).items()})
    weights = sum(weight.nbytes for weight in model.parameters())
    write_graphs(model, tmp_path, source={}, dtype="float16", slots=2048, plugins=plugins)
    del model
    if plugins:
        tensorrt_rtx.register(trt)
    for kind in KINDS:
        engine = tmp_path / f"{kind}.engine"
        found = build(trt, "rtx", tmp_path / f"{kind}.onnx", engine, Profile(), RTX_CAPABILITIES, Options())
        assert ("PLUGIN_V3" in found) == (plugins and kind == "decode")
        assert weights < engine.stat().st_size < OVER * weights


@pytest.mark.tensorrt
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is None or not torch.cuda.is_available(), reason="needs TensorRT and a GPU"
)
def test_engines_with_plugins_are_built_on_a_gpu(tiny_artifact: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "tiny"
    shutil.copytree(tiny_artifact, artifact)
    times = tmp_path / "times"
    made = export_tensorrt(artifact, flavour="tensorrt", slots=64, options=Options(timing_cache=times, refit=True))
    assert made["options"] == ["timing_cache", "refit"]
    assert times.stat().st_size > 0
    assert made["layers"]["decode"]["PLUGIN_V3"] > 0
    assert diagnosis(artifact)["exports"]["tensorrt"]["loads"]
