"""The layer that benchmarks/kernels.py times, made up, and its checks against float64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.plan import Plan
from sparsec.plugins import selector as selecting
from sparsec.plugins.blocks import choose_blocks, group_numbers, groups_of, kept_keys
from sparsec.plugins.coarse import candidates
from sparsec.plugins.index_keys import loaded, stored
from sparsec.plugins.kernels import attention as kernels
from sparsec.plugins.kernels.cache import KernelLayer
from sparsec.plugins.kernels.coarse import means_of_prompt
from sparsec.plugins.selector import Indexer
from sparsec.plugins.step import LayerRuntime, Step, layer_runtime

HEADS, KV, DIM, RANK, BLOCK, WINDOW, SINKS = 32, 8, 128, 16, 64, 8192, 4
RETRIEVAL = (0, 5, 10, 15, 20)  # on KV heads 0 to 5 without 4: five of eight keep every token
SCALE = DIM**-0.5
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # main() wants a GPU
VOTE_EVERY = (1, 4)  # of 64 prompt rows all decide, or every fourth
WAYS: dict[str, dict[str, Any]] = {  # of index keys, beside the model's dtype and all of them
    "fp8 index keys": {"index_dtype": "fp8"},
    "coarse level": {"coarse": {"min_context": 1000, "one_in": 4}},
    "fp8 index keys and coarse level": {"index_dtype": "fp8", "coarse": {"min_context": 1000, "one_in": 4}},
}
WRONG = 1e-2  # relative error against float64 from which on a result is wrong


def plan(
    window: int,
    granularity: str,
    prefill: str = "dense",
    every: int = 1,
    retrieval: Sequence[int] = RETRIEVAL,
    **more: Any,
) -> Plan:
    """A plan of one layer. every: prompt rows of which one votes; more: of the selector."""
    heads = tuple(int(head in retrieval) for head in range(HEADS))
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
    retrieval = of.layers[0].retrieval
    projections = torch.randn(2, len(retrieval), RANK, DIM, generator=generator, device=GPU) * DIM**-0.5
    rt = layer_runtime(of, 0, Indexer(*projections).to(GPU), GPU)
    rt.cache = cache = KernelLayer(of, 0)
    cache.prepare(torch.empty(1, KV, 1, DIM, dtype=dtype, device=GPU), RANK, length + BLOCK)
    for store in (*cache.near, *cache.far):
        store.normal_(generator=generator)
    # The first direction of an index key is what queries are made to look at: high in a few blocks, low elsewhere.
    hot = torch.rand(len(retrieval), cache.slots // BLOCK + 1, generator=generator, device=GPU) < rate / 0.9
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
    for place, head in enumerate(rt.layer.retrieval):
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


def check_unions(granularity: str, dtype: torch.dtype, length: int) -> dict[str, Any]:
    """A step with one set a KV head: the attention of its query heads on the union of what each of them keeps alone."""
    retrieval = range(2 * HEADS // KV)  # two whole groups
    alone, together = (plan(1024, granularity, retrieval=retrieval, scope=scope) for scope in ("head", "kv_head"))
    rt, _ = runtime(alone, dtype, length, 0.1, length)
    q, k, v = new_rows(rt, dtype, 1, length + 1)
    step, out = Step(decode=True), torch.full_like(q, float("nan"))
    kernels.decode_step(rt, step, q, k, v, SCALE, out)
    n, group = length + 1, HEADS // KV
    sets = kept_by_kernel(alone, step.kernel_sets[0], n)
    rt, cache = runtime(together, dtype, length, 0.1, length)
    out.fill_(float("nan"))
    kernels.decode_step(rt, Step(decode=True), q, k, v, SCALE, out)
    worst, kept = 0.0, []
    for head in retrieval:
        place = cache.full_kv.index(head // group)
        seen = sets[head // group * group : (head // group + 1) * group].any(0)
        keys, values = cache.far[0][0, place, :n][seen], cache.far[1][0, place, :n][seen]
        true = (keys.double() @ q[0, head, 0].double() * SCALE).softmax(0) @ values.double()
        worst = max(worst, float((out[0, head, 0].double() - true).norm() / true.norm()))
        kept.append(float(seen.float().mean()))
    return {"error": worst, "kept": statistics.mean(kept)}


def kept_by_kernel(of: Plan, found: tuple[Tensor, ...], n: int) -> Tensor:
    """bool [retrieval heads, n]: the tokens that a step's kernels kept, out of what they left for shared layers."""
    selector = of.selector
    assert selector is not None
    item = selector.block if selector.granularity == "block" else 1
    items = -(-n // item)
    if len(found) == 2:  # lists and their lengths
        kept = torch.zeros(len(of.layers[0].retrieval), items, dtype=torch.bool, device=GPU)
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
    forced: Tensor = (begin < selector.sinks) | ((begin + item).clamp_max(n) > n - selector.recent)
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
