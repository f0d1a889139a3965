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
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsec.compiler.versions import versions
from sparsec.plan import Plan
from sparsec.plugins import selector as selecting
from sparsec.plugins.attention import LayerRuntime, Step, layer_runtime
from sparsec.plugins.blocks import choose_blocks, group_numbers, groups_of, kept_keys
from sparsec.plugins.coarse import candidates
from sparsec.plugins.index_keys import index_bytes, index_read, loaded, stored
from sparsec.plugins.kernels import attention as kernels
from sparsec.plugins.kernels.cache import KernelLayer, Tables
from sparsec.plugins.kernels.coarse import means_of_prompt
from sparsec.plugins.kernels.window import window_prefill
from sparsec.plugins.selector import Indexer

HEADS, KV, DIM, RANK, BLOCK, WINDOW, SINKS = 32, 8, 128, 16, 64, 8192, 4
RETRIEVAL = (0, 5, 10, 15, 20)  # on KV heads 0 to 5 without 4: five of eight keep every token
SCALE = DIM**-0.5
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # main() wants a GPU
VOTE_EVERY = (1, 4)  # of 64 prompt rows all decide, or every fourth
OPERATIONS, BANDWIDTH = 600e12, 2.8e12  # a second: what dense kernels reach on an H100, and what floors count with
WAYS: dict[str, dict[str, Any]] = {  # of index keys, beside the model's dtype and all of them
    "fp8 index keys": {"index_dtype": "fp8"},
    "coarse level": {"coarse": {"min_context": 1000, "one_in": 4}},
    "fp8 index keys and coarse level": {"index_dtype": "fp8", "coarse": {"min_context": 1000, "one_in": 4}},
}
WRONG = 1e-2  # relative error against float64 from which on a result is wrong
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def plan(window: int, granularity: str, prefill: str = "dense", every: int = 1, **more: Any) -> Plan:
    """A plan of one layer. every: prompt rows of which one votes; more: of the selector."""
    heads = tuple(int(head in RETRIEVAL) for head in range(HEADS))
    return Plan.parse(
        {
            "format": 1,
            "producer": "benchmark",
            "model": {"model_type": "llama", "layers": 1, "heads": HEADS, "kv_heads": KV, "head_dim": DIM},
            "window": {"size": window, "sinks": SINKS},
            "selector": {
                "rank": RANK, "rope": "post", "top_p": 0.9, "granularity": granularity, "block": BLOCK,
                "sinks": SINKS, "recent": 64, "min_keep": 0, "scope": "head", "prefill": prefill,
                "vote_every": every, **more,
            },
            "layers": [{"heads": heads, "index": "full"}],
        }
    )  # fmt: skip


def runtime(of: Plan, dtype: torch.dtype, length: int, rate: float, seed: int) -> tuple[LayerRuntime, KernelLayer]:
    """A layer with a cache of ``length`` random tokens, of whose blocks ``rate`` will be kept."""
    generator = torch.Generator(GPU).manual_seed(seed)
    projections = torch.randn(2, len(RETRIEVAL), RANK, DIM, generator=generator, device=GPU) * DIM**-0.5
    rt = layer_runtime(of, 0, Indexer(*projections).to(GPU), GPU)
    rt.cache = cache = KernelLayer(of, 0)
    cache.prepare(torch.empty(1, KV, 1, DIM, dtype=dtype, device=GPU), RANK, length + BLOCK)
    for store in (*cache.near, *cache.far):
        store.normal_(generator=generator)
    # The first direction of an index key is what queries are made to look at: high in a few blocks, low elsewhere.
    hot = torch.rand(len(RETRIEVAL), cache.slots // BLOCK + 1, generator=generator, device=GPU) < rate / 0.9
    index = torch.empty(cache.index.shape, dtype=dtype, device=GPU).normal_(generator=generator).mul_(0.02)
    at = hot.repeat_interleave(BLOCK, 1)[:, : index.shape[2]]
    index[0, :, :, 0] += torch.where(at, 4.0, -4.0).to(dtype)
    assert of.selector is not None
    held = stored(index, dtype, of.selector)
    cache.store_index(slice(0, index.shape[2]), held)
    if cache.means is not None:
        means_of_prompt(held, cache.means, BLOCK, 0, length // BLOCK)
    assert cache.lengths is not None
    cache.lengths.fill_(length)
    cache.length = length
    return rt, cache


def new_rows(rt: LayerRuntime, dtype: torch.dtype, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v of new tokens; a retrieval head's query, projected, looks along the first direction."""
    generator = torch.Generator(GPU).manual_seed(seed)
    q = torch.randn(1, rows, HEADS, DIM, generator=generator, device=GPU)
    assert rt.indexer is not None
    for place, head in enumerate(RETRIEVAL):
        wq = rt.indexer.q_proj.weight[place]
        wanted = torch.zeros(RANK, 1, device=GPU)
        wanted[0] = 3.0
        q[0, :, head] += torch.linalg.lstsq(wq, wanted).solution[:, 0]
    k, v = torch.randn(2, 1, rows, KV, DIM, generator=generator, device=GPU).to(dtype)
    return q.to(dtype).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


# Checks ----------------------------------------------------------------------------------------------------------


def check_decode(of: Plan, dtype: torch.dtype, length: int) -> dict[str, Any]:
    """A step against float64: what is kept, and the attention of every head on its window or on what is kept.

    ``error``: the largest relative error of a head's output. ``misplaced``: items kept or left out against the float64
    choice, ties and rounding (:func:`misplaced`) aside.
    """
    assert of.window is not None
    assert of.selector is not None
    rt, cache = runtime(of, dtype, length, 0.1, length)
    q, k, v = new_rows(rt, dtype, 1, length + 1)
    out = torch.full_like(q, float("nan"))
    step = Step(decode=True)
    kernels.decode_step(rt, step, q, k, v, SCALE, out)
    n = length + 1
    pos = torch.arange(n, device=GPU)
    assert rt.indexer is not None
    queries = rt.indexer.queries(q[:, list(RETRIEVAL)]).double()
    sets = kept_by_kernel(of, step.kernel_sets[0], n)
    worst, kept, wrong = 0.0, [], 0
    for head in range(HEADS):
        kv = head // (HEADS // KV)
        if kv in cache.local_kv:
            tokens = torch.cat((pos[:SINKS], pos[max(SINKS, n - of.window.size) :])) if n > SINKS else pos
            slot, place = cache.slot_of(tokens), cache.local_kv.index(kv)
            keys, values = cache.near[0][0, place, slot], cache.near[1][0, place, slot]
        else:
            place = cache.full_kv.index(kv)
            seen = (n - 1 - pos < of.window.size) | (pos < SINKS)
            if head in RETRIEVAL:
                row = RETRIEVAL.index(head)
                seen = sets[row]
                scores = loaded(cache.index_of(slice(0, n)))[0, row].double() @ queries[0, row, 0]
                if cache.means is not None:
                    each = slice(row, row + 1)
                    of_row = (queries[:, each].float(), cache.means[:, each, : n // BLOCK], pos[None, -1:], pos[None])
                    scores = scores.masked_fill(~candidates(*of_row, of.selector)[0, 0, 0], float("-inf"))
                wrong += misplaced(of.selector, scores, seen)
                kept.append(float(seen.float().mean()))
            keys, values = cache.far[0][0, place, :n][seen], cache.far[1][0, place, :n][seen]
        true = (keys.double() @ q[0, head, 0].double() * SCALE).softmax(0) @ values.double()
        worst = max(worst, float((out[0, head, 0].double() - true).norm() / true.norm()))
    return {"error": worst, "misplaced": wrong, "kept": statistics.mean(kept)}


def kept_by_kernel(of: Plan, found: tuple[Tensor, ...], n: int) -> Tensor:
    """bool [retrieval heads, n]: the tokens that a step's kernels kept, out of what they left for shared layers."""
    selector = of.selector
    assert selector is not None
    item = selector.block if selector.granularity == "block" else 1
    items = -(-n // item)
    if len(found) == 2:  # lists and their lengths
        kept = torch.zeros(len(RETRIEVAL), items, dtype=torch.bool, device=GPU)
        for row, (listed, count) in enumerate(zip(found[0][0], found[1][0].tolist(), strict=True)):
            kept[row, listed[:count].long()] = True
    else:  # scores and edges
        values, _, edges = found
        kept = values[0, :, :items] >= edges[0, :, :1] + math.log1p(-selecting.TIE)
        kept |= forced_items(selector, n)
    return kept.repeat_interleave(item, 1)[:, :n]


def forced_items(selector: Any, n: int) -> Tensor:
    """bool [items]: those with a sink or a recent token."""
    item = selector.block if selector.granularity == "block" else 1
    begin = torch.arange(0, n, item, device=GPU)
    forced: Tensor = (begin < selector.sinks) | (begin + item > n - selector.recent)
    return forced


def misplaced(selector: Any, scores: Tensor, kept: Tensor) -> int:
    """Items on the wrong side of the edge. scores: float64 [tokens]; kept: bool [tokens].

    The edge is the value at which the summed weight crosses top_p. Float32 sums may see that MASS earlier or later;
    below it, twice what counts as a tie may still be kept, because the search ends within one of it.
    """
    mass, rounding = 1e-5, 1e-5
    item = selector.block if selector.granularity == "block" else 1
    lines = F.pad(scores, (0, -len(scores) % item), value=float("-inf")).view(-1, item)
    value = lines.logsumexp(1)
    weight, order = value.softmax(0).sort(descending=True)
    before = weight.cumsum(0) - weight
    high, low = (value[order[int((before < selector.top_p + off).sum()) - 1]] for off in (-mass, mass))
    taken, free = kept[::item], ~forced_items(selector, len(scores))
    missing = (value > high + rounding) & ~taken
    surplus = (value < low - 2 * selecting.TIE - rounding) & taken & free
    return int((missing | surplus).sum())


def check_prefill(of: Plan, dtype: torch.dtype, length: int) -> dict[str, Any]:
    """A prompt in two chunks against float64; where blocks are chosen, against the reference's choice."""
    assert of.window is not None
    assert of.selector is not None
    generator = torch.Generator(GPU).manual_seed(length)
    weights = torch.randn(2, len(RETRIEVAL), RANK, DIM, generator=generator, device=GPU) * 0.15
    rt = layer_runtime(of, 0, Indexer(*weights).to(GPU), GPU)
    rt.cache = KernelLayer(of, 0)
    q, k, v = new_rows(rt, dtype, length, length)
    out, cut = torch.full_like(q, float("nan")), length * 2 // 3 // 64 * 64
    assert rt.indexer is not None
    kept = []
    for start, stop in ((0, cut), (cut, length)):
        part = slice(start, stop)
        pos = torch.arange(stop, device=GPU)[None]
        kernels.prefill(
            rt, Step(decode=False), q[:, :, part], k[:, :, part], v[:, :, part], pos, False, SCALE, out[:, :, part]
        )
    t = torch.arange(length, device=GPU)[:, None]
    causal = t >= t.T
    near = causal & ((t - t.T < of.window.size) | (t.T < SINKS))
    sets = torch.ones(1, len(RETRIEVAL), length, length, dtype=torch.bool, device=GPU)
    if of.selector.prefill == "selector":
        queries = rt.indexer.queries(q[:, list(RETRIEVAL)])
        index = rt.indexer.keys(k[:, [head // (HEADS // KV) for head in RETRIEVAL]])
        index = loaded(stored(index, dtype, of.selector))
        numbers = group_numbers(t.T, of.selector, 0)
        groups = groups_of(numbers, 0, length)
        assert groups is not None
        blocks = choose_blocks(queries @ index.transpose(2, 3), numbers, groups, t.T, t.T, of.selector)
        sets = kept_keys(blocks, groups, t.T, causal[None, None], of.selector.block)
        kept = [float(sets.float().sum() / causal.float().sum() / len(RETRIEVAL))]
    worst = 0.0
    for head in range(HEADS):
        kv = head // (HEADS // KV)
        scores = q[0, head].double() @ k[0, kv].double().T * SCALE
        seen = causal & sets[0, RETRIEVAL.index(head)] if head in RETRIEVAL else near
        true = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[0, kv].double()
        worst = max(worst, float((out[0, head].double() - true).norm() / true.norm()))
    return {"error": worst, "kept": kept}


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
