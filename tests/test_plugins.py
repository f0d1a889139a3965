"""Plugins of TensorRT without TensorRT: their kernels against the graphs' bodies, their PTX, their signatures."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from sparsec.errors import UsageError
from sparsec.export.onnx.artifact import write_graphs
from sparsec.export.onnx.divided import BODIES, DIVIDED
from sparsec.export.onnx.functions import DOMAIN, FUNCTIONS, IR, OPSET, function
from sparsec.export.parity import compare
from sparsec.plugins import ahead, driver
from sparsec.plugins.ahead import CAPABILITIES, OPERATORS, TACTICS, Compiled, only
from sparsec.plugins.onnx_runner import OnnxModel

triton = pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, SLOTS, DIM = 3, 40, 16
NEAR = {"window": 6, "sinks": 2, "min_context": 10, "scale": 0.25}
CHOICE = {"sinks": 2, "recent": 3, "min_keep": 5}
LENGTHS = [0, 9, 37]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "WindowShares": [(1, 6, 1, 64), (1, 2, 516, 64), (1, 2, 516, 64), (1,)],
    "BesideShares": [(1, 6, 1, 64), (1, 3, 2048, 64), (1, 3, 2048, 64), (1,)],
    "ListKept": [(1, 1, 2048)],
    "ListedShares": [(1, 6, 1, 64), (1, 3, 2048, 64), (1, 3, 2048, 64), (1, 1, 2048), (1, 1)],
    "ScoreItems": [(1, 3, 1, 16), (1, 3, 2048, 16), (1,)],
    "KeepItems": [(1, 3, 128), (1,)],
    "CombineShares": [(1, 6, 4, 64), (1, 6, 4), (1, 6, 1, 64)],
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "WindowShares": {**NEAR, "shares": 4},
    "BesideShares": {**NEAR, "shares": 4, "kv_heads": (0, 2)},
    "ListKept": {},
    "ListedShares": {"kv_heads": (0, 2), "scale": 0.25, "shares": 3},
    "ScoreItems": {"block": 16, "items": 128},
    "KeepItems": {**CHOICE, "top_p": 0.9, "min_context": 10, "block": 16, "slots": 2048},
    "CombineShares": {},
}


def body(name: str, inputs: list[np.ndarray], attributes: dict[str, Any], kind: int = TensorProto.FLOAT) -> np.ndarray:
    """What ONNX Runtime computes by an operator's body."""
    import onnxruntime

    names = [f"in{place}" for place in range(len(inputs))]
    values = [
        helper.make_tensor_value_info(each, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for each, array in zip(names, inputs, strict=True)
    ]
    node = helper.make_node(name, names, ["out"], domain=DOMAIN, **attributes)
    out = helper.make_tensor_value_info("out", kind, None)
    graph = helper.make_graph([node], "one", values, [out])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph, opset_imports=opsets, functions=[function(name, {**FUNCTIONS, **BODIES})], ir_version=IR
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, dict(zip(names, inputs, strict=True)))[0]
    return found


def run(name: str, inputs: list[torch.Tensor], attributes: dict[str, Any], tactic: int) -> list[torch.Tensor]:
    """A kernel under the launch that an engine would use."""
    from sparsec.plugins.kernels import engine

    operator = OPERATORS[name]
    tactic = tactic if tactic in operator.tactics else operator.tactics[0]
    shapes = [tuple(each.shape) for each in inputs]
    kinds = operator.types("float32")[1]
    outputs = [
        torch.full(shape, 7, dtype=getattr(torch, kind), device=DEVICE)
        for shape, kind in zip(operator.shapes(shapes, attributes), kinds, strict=True)
    ]
    how = operator.launch(shapes, attributes)
    constants = operator.constants(shapes, attributes, TACTICS[tactic])
    getattr(engine, operator.kernel)[how.grid](*inputs, *how.integers, *outputs, **constants)
    return outputs


@pytest.mark.parametrize("tactic", [1, 2])
@pytest.mark.parametrize("name", DIVIDED)
def test_kernels_are_the_bodies(name: str, tactic: int) -> None:
    generator = np.random.default_rng(1)
    heads, kv_heads, slots = 6, 2, 10 if name == "WindowDecode" else SLOTS
    q = generator.normal(size=(BATCH, heads, 1, DIM)).astype(np.float32)
    k, v = (generator.normal(size=(BATCH, kv_heads + 1, slots, DIM)).astype(np.float32) for _ in range(2))
    lengths = np.array(LENGTHS)
    if name == "WindowDecode":
        k, v, attributes = k[:, :kv_heads].copy(), v[:, :kv_heads].copy(), dict(NEAR)
    elif name == "BesideDecode":
        attributes = {**NEAR, "kv_heads": [2, 0]}
    else:
        attributes = {"kv_heads": [2, 0], "scale": 0.25}
        last = generator.random((BATCH, kv_heads, slots)) < 0.3
        last[:, :, 0] = True
    inputs = [q, k, v, lengths if name != "ChosenDecode" else last]
    expected = body(name, inputs, attributes)
    shared = {**attributes, "shares": 3}
    on = [torch.tensor(each, device=DEVICE) for each in inputs]
    if name == "ChosenDecode":
        lists = run("ListKept", [on[3].to(torch.int8)], {}, tactic)
        parts = run("ListedShares", [*on[:3], *lists], shared, tactic)
    else:
        parts = run(DIVIDED[name], on, shared, tactic)
    (found,) = run("CombineShares", [*parts, on[0]], {}, tactic)
    assert np.abs(found.cpu().numpy() - expected).max() < (1e-5 if DEVICE.type == "cpu" else 5e-3)


@pytest.mark.parametrize(
    ("block", "changes"),
    [(1, {}), (16, {"top_p": 1e-3}), (4, {"top_p": 1.0}), (4, {"min_keep": 0, "recent": 0})],
    ids=["tokens", "floor", "all", "free"],
)
def test_choosing_kernels_are_the_selectors_bodies(block: int, changes: dict[str, Any]) -> None:
    generator = np.random.default_rng(2)
    queries = generator.normal(size=(BATCH, 2, 1, 4)).astype(np.float32)
    index = generator.normal(size=(BATCH, 2, SLOTS, 4)).astype(np.float32)
    inputs = [queries, index, np.array(LENGTHS)]
    attributes: dict[str, Any] = {**CHOICE, "top_p": 0.7, "min_context": 8, **changes}
    blocks = {"block": block} if block > 1 else {}
    expected = body("SelectBlocks" if blocks else "SelectTokens", inputs, {**attributes, **blocks}, TensorProto.BOOL)
    sizes = {"block": block, "items": -(-SLOTS // block)}
    more = {**attributes, "block": block, "slots": SLOTS}
    values = body("ScoreItems", inputs, sizes)
    assert np.array_equal(body("KeepItems", [values, inputs[2]], more, TensorProto.BOOL), expected)
    on = [torch.tensor(each, device=DEVICE) for each in inputs]
    (scored,) = run("ScoreItems", on, sizes, 1)
    np.testing.assert_allclose(scored.cpu().numpy(), values, atol=1e-5)
    (kept,) = run("KeepItems", [scored, on[2]], more, 1)
    assert np.array_equal(kept.cpu().numpy(), expected)


def test_groups_larger_than_a_program_are_divided() -> None:
    attributes = {"kv_heads": (0,), "scale": 0.25, "shares": 2}
    how = OPERATORS["ListedShares"].launch([(1, 20, 1, 16), (1, 1, 40, 16), (1, 1, 40, 16), (1, 1, 40)], attributes)
    assert (how.grid, how.integers) == ((2, 2, 1), (20, 1, 40, 1))


def test_a_divided_graph_is_the_model(small_llama: Callable[..., Any], tmp_path: Path) -> None:
    model, folder = small_llama(layers=3), tmp_path / "graphs"
    folder.mkdir()
    planned(model)
    write_graphs(model, folder, source={}, dtype="float32", slots=256, plugins=True)
    decode = onnx.load(folder / "decode.onnx", load_external_data=False)
    used = {node.op_type for node in decode.graph.node if node.domain == DOMAIN}
    assert used > OPERATORS.keys()
    assert not used & DIVIDED.keys()
    for node in decode.graph.node:
        if node.op_type in OPERATORS and node.domain == DOMAIN:
            given = {each.name for each in node.attribute}
            assert given == {*OPERATORS[node.op_type].attributes, "plugin_namespace", "plugin_version", "aot"}
    runner = OnnxModel(folder, device="cpu", threads=1)
    prompts = [torch.arange(length).remainder(60).tolist() for length in (3, 30, 9)]
    found = compare(model, runner, prompts, 12)
    assert max(found["prefill"], found["decode"]) < 1e-5
    assert found["same"] == 1


def planned(model: Any) -> None:
    """Local, mixed and retrieval heads on the model, with random indexers."""
    from sparsec.plan import Plan
    from sparsec.plugins.families import shape_of
    from sparsec.plugins.runtime import install, tensor_names

    selector = {"rank": 4, "top_p": 0.7, "granularity": "token", "block": 4, "sinks": 2, "recent": 2, "min_keep": 3}
    layers = [
        {"heads": (0, 0, 1, 0), "index": "full"},
        {"heads": (1, 1, 1, 1), "index": "shared"},
        {"heads": (0, 0, 0, 0)},
    ]
    data = {"producer": "test", "model": shape_of(model.config), "window": {"size": 6, "sinks": 2}, "layers": layers}
    plan = Plan.parse({**data, "min_context": 10, "selector": {**selector, "rope": "post", "scope": "layer"}})
    generator = torch.Generator().manual_seed(1)
    install(model, plan, {n: torch.randn(s, generator=generator) / 4 for n, s in tensor_names(plan).items()})


COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path
from sparsec.plugins.ahead import OPERATORS, compiled
from triton.backends.nvidia.compiler import get_ptxas
name, capability, shapes, attributes, tactics = sys.argv[1], int(sys.argv[2]), *map(eval, sys.argv[3:])
for tactic in tactics or OPERATORS[name].tactics:
    made = compiled(OPERATORS[name], "float16", shapes, attributes, capability, tactic)
    operator = OPERATORS[name]
    count = len(operator.inputs) + len(operator.integers) + len(operator.outputs)
    head = made.ptx[made.ptx.index(".entry") :].split(")")[0]
    assert head.count(".param") == count, head
    assert made.shared <= 48 << 10, (tactic, made.shared)
    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(made.ptx)
        call = [get_ptxas(capability).path, f"-arch=sm_{capability}{suffix}", file, "-o", file.with_suffix(".o")]
        subprocess.run(call, check=True)
    print(made.name, made.threads, made.shared, made.digest)
"""  # fmt: skip


def compile_one(name: str, capability: int, tactics: tuple[int, ...]) -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    call = [sys.executable, "-P", "-c", COMPILE, name, str(capability)]
    call += [repr(each) for each in (SHAPES[name], ATTRIBUTES[name], tactics)]
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ptx_is_made_and_assembled_without_a_gpu(capability: int) -> None:
    compile_one("WindowShares" if capability % 20 else "ListedShares", capability, (1,))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_tactic_is_compiled(name: str, capability: int) -> None:
    compile_one(name, capability, ())


def test_ptx_that_needs_scratch_memory_is_refused() -> None:
    plain = ".entry f(\n .param .u64 f_param_0,\n .param .u64 f_param_1\n)\n{ ld.param.u64 %r, [f_param_0]; }"
    assert "f_param_1" not in only(plain, "f", 1)
    with pytest.raises(ValueError, match="needs scratch memory"):
        only(plain.replace("[f_param_0]", "[f_param_1]"), "f", 1)
    with pytest.raises(ValueError, match="no tactic 1 for compute capability 70"):
        ahead.compiled(OPERATORS["WindowShares"], "float16", SHAPES["WindowShares"], ATTRIBUTES["WindowShares"], 70, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_launching_without_a_driver_is_one_line() -> None:
    with pytest.raises(UsageError, match="no CUDA driver here"):
        driver.launch(Compiled("f", "", 128, 0), [], [], [], (1, 1, 1))


class Standin(ModuleType):
    """The compiled part of TensorRT, of which the ``plugin`` package needs names only."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *args: None, "WARNING": 0, "log": lambda self, *args: None})
        setattr(self, name, made)
        return made


class Registry:
    def register_creator(self, creator: Any, namespace: str) -> None: ...

    def get_creator(self, name: str, version: str, namespace: str) -> Any: ...


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The bindings' ``plugin`` package as it is shipped, over a stand-in for what is compiled."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("TensorRT's bindings are not installed: pip install --no-deps tensorrt-cu13-bindings")
    trt = Standin("tensorrt")
    trt.__path__ = list(spec.submodule_search_locations)
    kinds = SimpleNamespace(**{name: name for name in ("INT64", "INT32", "INT16", "INT8", "FLOAT64", "FLOAT32")})
    kinds.FLOAT16, kinds.CHAR, kinds.UNKNOWN = "FLOAT16", "CHAR", "UNKNOWN"
    for name, value in {
        "PluginFieldType": kinds, "get_plugin_registry": Registry, "Dims": type("Dims", (), {"MAX_DIMS": 8}),
        **{kind: kind for kind in ("float32", "float16", "bfloat16", "int32", "int64", "bool")},
    }.items():  # fmt: skip
        setattr(trt, name, value)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    yield trt, importlib.import_module("tensorrt.plugin")
    for name in [each for each in sys.modules if each.startswith("tensorrt.plugin")]:
        del sys.modules[name]


def test_signatures_are_what_tensorrt_takes(
    library: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsec.plugins import tensorrt

    trt, trtp = library
    monkeypatch.setattr(tensorrt, "compiled", lambda *args: Compiled("kernel", "ptx", 128, 1024))
    uses = tensorrt.plugins_of(trt, trtp, lambda: 90)
    registered = importlib.import_module("tensorrt.plugin._lib").QDP_REGISTRY
    assert set(registered) == {f"sparsec::{name}" for name in OPERATORS}
    for name, operator in OPERATORS.items():
        found = registered[f"sparsec::{name}"]
        assert found.num_outputs == len(operator.outputs)
        kinds = operator.types("float16")[0]
        descs = [SimpleNamespace(shape_expr=s, dtype=kind) for s, kind in zip(SHAPES[name], kinds, strict=True)]
        values = [ATTRIBUTES[name][each] for each in operator.attributes]
        assert len(found.register_func(*descs, *values)) == len(operator.outputs)
        (combination,) = found.autotune_func(*descs, *values, ())
        assert len(combination.io_types) == len(operator.inputs) + len(operator.outputs)
        kernel, ptx, _, extra = found.aot_impl_func(*descs, *values, (), 1)
        assert (kernel, ptx, len(extra)) == ("kernel", "ptx", len(operator.integers))
    assert [use.operator for use in uses] == list(OPERATORS)
