"""One attention layer on the kernels against the fastest dense kernel, on a GPU.

    python benchmarks/kernels.py -o benchmarks/results/kernels-h200.json [--lengths 32768,131072] [--rates 0.1]

The layer is Llama-3.1-8B's (32 query heads, 8 KV heads, head_dim 128, bf16, batch 1) with 5 retrieval heads on as many
KV heads, window 8192, 4 sinks, blocks of 64. How many blocks a retrieval head keeps is made: index keys of so many
blocks score high, so kept tokens come in runs of 64, evenly spread. First everything is checked against float64.
Decode is timed as one CUDA graph of several layers, each with its own cache, more than the L2 holds; dense likewise, by
cuDNN and by flash attention; the faster counts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernel_checks import (
    DIM,
    GPU,
    HEADS,
    KV,
    RANK,
    RETRIEVAL,
    SCALE,
    SINKS,
    VOTE_EVERY,
    WAYS,
    WINDOW,
    WRONG,
    check_decode,
    check_prefill,
    check_unions,
    new_rows,
    plan,
    runtime,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsec.compiler.versions import versions
from sparsec.plan import Plan
from sparsec.plugins.index_keys import index_bytes, index_read
from sparsec.plugins.kernels import attention as kernels
from sparsec.plugins.kernels.cache import KernelLayer, Tables
from sparsec.plugins.kernels.window import window_prefill
from sparsec.plugins.selector import Indexer
from sparsec.plugins.step import Step, layer_runtime

OPERATIONS, BANDWIDTH = 600e12, 2.8e12  # a second: what dense kernels reach on an H100, and what floors count with
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


# Times -----------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], Any], least: float = 200.0, most: int = 50) -> float:
    """Median of single runs, ``least`` milliseconds of them altogether."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < most and (sum(times) < least or not times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Of this device: bytes/s of a large copy, read and written, and operations/s of a large bf16 product."""
    x = torch.randn(1 << 30, device=GPU, dtype=torch.bfloat16)
    y, a = torch.empty_like(x), torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16)
    copy, product = milliseconds(lambda: y.copy_(x)), milliseconds(lambda: a @ a)
    return {"bandwidth": 2 * x.nbytes / copy * 1e3, "matrix": 2 * 8192**3 / product * 1e3}


def graphed(steps: list[Callable[[], Any]]) -> Callable[[], Any]:
    """All steps as one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for step in steps:
                step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph.replay


def fastest(make: Callable[[], Callable[[], Any]], names: Iterable[str] = tuple(BACKENDS)) -> dict[str, float]:
    """Milliseconds of each dense backend that runs."""
    found = {}
    for name, backend in ((name, BACKENDS[name]) for name in names):
        try:
            with sdpa_kernel(backend):
                found[name] = milliseconds(make())
        except RuntimeError as error:
            print(f"dense {name}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
            torch.cuda.synchronize()
    return found


def time_prefill(of: Plan, length: int, dense: dict[str, float], names: Iterable[str]) -> dict[str, Any]:
    """The whole layer, and its parts. ``dense``: milliseconds of the dense backends ``names``, filled in if empty."""
    assert of.window is not None
    dtype = torch.bfloat16
    rt = layer_runtime(of, 0, Indexer(*torch.randn(2, len(RETRIEVAL), RANK, DIM, device=GPU)), GPU)
    q, k, v = new_rows(rt, dtype, length, 1)
    pos, out = torch.arange(length, device=GPU)[None], torch.empty_like(q)

    def layer() -> None:
        rt.cache = KernelLayer(of, 0)
        kernels.prefill(rt, Step(decode=False), q, k, v, pos, False, SCALE, out)

    tables, first = Tables(of, 0, GPU), torch.zeros(1, dtype=torch.int32, device=GPU)

    def local() -> None:
        assert of.window is not None
        for heads in (tables.near_heads, tables.beside_heads):
            window_prefill(q, k, v, out, *heads, of.window, 0, SCALE, first)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = milliseconds(layer)
    peak = torch.cuda.max_memory_allocated() - before
    windows = milliseconds(local)
    rt.cache = None
    if not dense:
        dense |= fastest(
            lambda: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), names
        )
    locals_ = HEADS - len(RETRIEVAL)
    near = min(length, of.window.size + SINKS)
    pairs = near * length - near * (near - 1) // 2
    floor = 4 * DIM * pairs * locals_ / OPERATIONS * 1e3
    return {
        "ours_ms": ours, "local_ms": windows, "dense_ms": dense, "speedup": min(dense.values(), default=0.0) / ours,
        "local_floor_ms": floor, "local_over_floor": windows / floor, "peak_bytes": peak,
    }  # fmt: skip


def time_decode(of: Plan, length: int, rate: float) -> dict[str, Any]:
    """Steps of several layers in one graph, per layer."""
    dtype = torch.bfloat16
    dense_bytes = 2 * KV * length * DIM * 2
    layers = max(2, min(8, int(1.5e9 // dense_bytes) + 1))
    made = [runtime(of, dtype, length, rate, seed) for seed in range(layers)]
    rows = [new_rows(rt, dtype, 1, 7) for rt, _ in made]
    out, step = torch.empty_like(rows[0][0]), Step(decode=True, commit=False)
    ours = milliseconds(
        graphed(
            [partial(kernels.decode_step, rt, step, *row, SCALE, out) for (rt, _), row in zip(made, rows, strict=True)]
        )
    )
    share = check_decode(of, dtype, length)["kept"] if length <= 131072 else None
    full = len(made[0][1].full_kv)
    del made
    caches = [torch.randn(2, 1, KV, length, DIM, dtype=dtype, device=GPU) for _ in range(layers)]
    q = rows[0][0]
    dense = fastest(
        lambda: graphed(
            [partial(F.scaled_dot_product_attention, q, keys, values, enable_gqa=True) for keys, values in caches]
        )
    )
    dense = {name: value / layers for name, value in dense.items()}
    window = 2 * (WINDOW + SINKS) * DIM * 2 * KV
    assert of.selector is not None
    read = window + len(RETRIEVAL) * (index_read(of.selector, length, 2) + length * rate * 2 * DIM * 2)
    held = 2 * full * length * DIM * 2 + len(RETRIEVAL) * index_bytes(of.selector, length, 2)
    return {
        "ours_us": ours / layers * 1e3, "dense_us": {name: value * 1e3 for name, value in dense.items()},
        "speedup": min(dense.values(), default=0.0) * layers / ours, "kept": share, "layers": layers,
        "floor_us": read / BANDWIDTH * 1e6, "bytes_per_second": read / (ours / layers * 1e-3),
        "kv_bytes": window // KV * (KV - full) + held,
        "dense_kv_bytes": dense_bytes,
    }  # fmt: skip


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--lengths", default="32768,131072,524288,1048576")
    parser.add_argument("--rates", default="0.1")
    parser.add_argument("--only", choices=["check", "prefill", "decode"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py times kernels on a GPU, and there is none: tests/test_kernels.py checks them")
    found: dict[str, Any] = {
        "command": f"python benchmarks/kernels.py {' '.join(sys.argv[1:])}",
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "checks": {},
        "prefill": {},
        "decode": {},
    }

    def note(part: str, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run one thing and keep what it found; what fails is said and does not stop the others."""
        try:
            result = run()
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            traceback.print_exc()
        found[part][name] = result
        print(part, name, json.dumps(result), flush=True)
        if options.output:
            options.output.write_text(json.dumps(found, indent=1) + "\n")

    if options.only in (None, "check"):
        for dtype in (torch.bfloat16, torch.float16):
            for granularity in ("token", "block"):
                for length in (600, 5000, 40000):
                    name = f"decode {granularity} {length} {dtype}"
                    note("checks", name, partial(check_decode, plan(1024, granularity), dtype, length))
                    for more, changed in WAYS.items():
                        if granularity == "block" or "coarse" not in changed:
                            way = plan(1024, granularity, **changed)
                            note("checks", f"{name} {more}", partial(check_decode, way, dtype, length))
                    unions = partial(check_unions, granularity, dtype, length)
                    note("checks", f"decode {granularity} {length} a set a KV head {dtype}", unions)
            note("checks", f"prefill {dtype}", partial(check_prefill, plan(700, "token"), dtype, 3001))
            for every in VOTE_EVERY:
                name, by_blocks = f"prefill by blocks, every {every} {dtype}", plan(700, "token", "selector", every)
                note("checks", name, partial(check_prefill, by_blocks, dtype, 3001))
            eight = plan(700, "token", "selector", index_dtype="fp8")
            note("checks", f"prefill by blocks, fp8 index keys {dtype}", partial(check_prefill, eight, dtype, 3001))
        wrong = [
            name
            for name, result in found["checks"].items()
            if not result.get("error", math.inf) < WRONG or result.get("misplaced")
        ]
        if wrong:
            sys.exit(f"wrong, so nothing is timed: {', '.join(wrong)}")
    found["ceilings"] = ceilings()
    names: Iterable[str] = tuple(BACKENDS)
    for length in map(int, options.lengths.split(",")):
        dense: dict[str, float] = {}
        if options.only in (None, "decode"):
            for granularity in ("block", "token"):
                for rate in map(float, options.rates.split(",")):
                    note(
                        "decode",
                        f"{granularity} {length} {rate}",
                        partial(time_decode, plan(WINDOW, granularity), length, rate),
                    )
            for rate in map(float, options.rates.split(",")):
                for more, changed in WAYS.items():
                    way = plan(WINDOW, "block", **changed)
                    note("decode", f"block {length} {rate} {more}", partial(time_decode, way, length, rate))
        if options.only in (None, "prefill"):
            ways = {"dense": plan(WINDOW, "block")}
            ways |= {f"blocks, every {n}": plan(WINDOW, "block", "selector", n) for n in VOTE_EVERY}
            for name, way in ways.items():
                note("prefill", f"{name} {length}", partial(time_prefill, way, length, dense, names))
            if dense and length >= 1 << 19:  # dense prompts take half a minute from here on: the faster backend alone
                names = [min(dense, key=lambda name: dense[name])]


if __name__ == "__main__":
    main()
