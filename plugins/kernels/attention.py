"""One layer of a plan on the kernels: what :func:`sparsec.plugins.attention.sparsec_attention` calls on a GPU.

prefill   local heads: window kernel; retrieval heads: PyTorch's own dense attention (a first chunk), the window
          kernel with a window that never ends (later chunks), or chosen blocks; everything is stored
decode    append, window, [score, search], listed, combine: six launches, no host synchronisation
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.plan import Window
from sparsec.plugins.attention import as_selector_sees
from sparsec.plugins.index_keys import stored
from sparsec.plugins.kernels import append, blocks, choose, decode, edge, lists
from sparsec.plugins.kernels import coarse as levels
from sparsec.plugins.kernels.cache import KernelLayer, Tables
from sparsec.plugins.kernels.window import window_prefill
from sparsec.plugins.step import LayerRuntime, Step

SHARE = 512  # keys of a window a program, until MOST programs divide it
MOST = 64
ALL = 1 << 30  # a window that never ends
RANGES = 256  # programs that divide what a retrieval head keeps, about, where it is no list
PROGRAMS = 390  # that read lists, at most about: three a multiprocessor, all at once


def prefill(
    rt: LayerRuntime, step: Step, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, padded: bool, scale: float, out: Tensor
) -> None:
    """Prompt rows.

    Args:
        q, out: [batch, heads, rows, head_dim]; k, v: [batch, KV heads, rows, head_dim].
        pos: [batch, columns so far and new], token numbers, -1 where there is padding; ``padded``: somewhere there is.
    """
    cache, tables, plan = rt.cache, _tables(rt, q), rt.plan
    assert isinstance(cache, KernelLayer)
    rows = q.shape[2]
    cache.prepare(k, _rank(rt), rows)
    assert cache.lengths is not None
    number = pos[:, -rows:]
    # Padding is on the left of a first chunk, or on the right: row m is token first + m where it is one.
    lead = (number < 0).int().cumprod(1).sum(1) if padded else 0
    first = (cache.lengths - lead).to(torch.int32)
    if len(tables.near_heads[0]):
        near_k, near_v, heads, sink_at, window_at = k, v, tables.near_heads, first, first
        if cache.length:
            old_k, old_v, sink_at, window_at = cache.recent()
            local = list(cache.local_kv)
            near_k, near_v = torch.cat((old_k, k[:, local]), 2), torch.cat((old_v, v[:, local]), 2)
            heads = tables.near_places
        window_prefill(q, near_k, near_v, out, *heads, cache.window, plan.min_context, scale, first, sink_at, window_at)
    index = _index_keys(rt, k)
    before = cache.length
    cache.store(k, v, index, number, padded)
    zero = torch.zeros_like(first)
    if len(tables.beside_heads[0]):
        where = (*cache.far, zero, tables.beside_places[1]) if before else (k, v, first, tables.beside_heads[1])
        window_prefill(
            q, where[0], where[1], out, tables.beside_heads[0], where[3], cache.window, plan.min_context, scale, first,
            where[2], where[2],
        )  # fmt: skip
    selector = plan.selector
    chooses = selector is not None and selector.prefill == "selector" and rt.layer.index != "none"
    # Rows that read all keys: all of them, or those up to ``min_context``; where there is padding, that is not known.
    dense = rows if padded or not chooses else min(rows, max(0, plan.min_context - before))
    if len(tables.retrieval) and dense:
        part, to = q[:, :, :dense], out[:, :, :dense]
        if not before and not padded:
            _dense(part, k[:, :, :dense], v[:, :, :dense], rt.layer.retrieval, tables.retrieval_kv_heads, scale, to)
        else:
            endless, places = Window(size=ALL, sinks=0), tables.retrieval_places
            window_prefill(part, *cache.far, to, tables.retrieval, places, endless, 0, scale, first, zero, zero)
    if len(tables.retrieval) and chooses:
        _chosen_blocks(rt, step, cache, q, first, 0 if padded else before, before + rows, scale, out)


def _chosen_blocks(
    rt: LayerRuntime,
    step: Step,
    cache: KernelLayer,
    q: Tensor,
    first: Tensor,
    start: int,
    stop: int,
    scale: float,
    out: Tensor,
) -> None:
    """Groups of prompt rows on the blocks that they choose; tokens ``start`` to ``stop`` - 1 hold all rows."""
    selector, tables, least = rt.plan.selector, _tables(rt, q), rt.plan.min_context
    assert selector is not None
    queries = None
    if rt.indexer is not None:
        queries = rt.indexer.queries(as_selector_sees(rt, q[:, list(rt.layer.retrieval)])).contiguous()
        step.kernel_lists = {rt.number: []}  # shared layers read the nearest full one alone
    source = step.kernel_lists[rt.plan.index_source(rt.number)]
    for place, (group, count) in enumerate(
        blocks.group_range(start, stop - start, len(q) * len(rt.layer.retrieval), selector)
    ):
        if queries is not None:
            sets = (tables.first, tables.members, tables.most)
            chosen = (queries, cache.index, first, group, count, stop, selector, least, *sets, cache.scales)
            source.append(blocks.choose_lists(*chosen))
        blocks.block_prefill(
            q, *cache.far, out, tables.retrieval, tables.retrieval_places, tables.list_of, first, source[place],
            selector, least, scale,
        )  # fmt: skip


def decode_step(rt: LayerRuntime, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """One new token of every sequence. q, out: [batch, heads, 1, head_dim]; k, v: [batch, KV heads, 1, head_dim]."""
    cache, tables, plan = rt.cache, _tables(rt, q), rt.plan
    assert isinstance(cache, KernelLayer)
    cache.prepare(k, _rank(rt), 1)
    assert cache.lengths is not None
    batch, heads, _, dim = q.shape
    selector = plan.selector
    indexed = rt.layer.index != "none" and selector is not None
    item = selector.block if selector is not None and selector.granularity == "block" else 1
    items = -(-cache.slots // item)
    listed = edge.fits(items) or (selector is not None and selector.coarse is not None)
    size = _range(items, item)
    if not indexed:
        ranges = -(-cache.slots // 1024)
    else:
        ranges = _shares_of_list(items, item, batch * len(tables.sets)) if listed else -(-items // size)
    shares = min(MOST, -(-(cache.sinks + cache.ring) // SHARE))
    most = max(shares, ranges)
    partial = q.new_empty(batch, heads, most, dim, dtype=torch.float32)
    lse = q.new_empty(batch, heads, most, dtype=torch.float32)
    queries = q.new_empty(batch, max(1, cache.index.shape[1]), max(1, _rank(rt)), dtype=torch.float32)
    rope = rt.rope if selector is not None and selector.rope == "pre" else None
    projections = (rt.indexer.q_proj.weight, rt.indexer.k_proj.weight) if rt.indexer is not None else None
    append.append(
        q, k, v, rope, projections, cache.lengths, tables.kv_place, tables.retrieval, tables.retrieval_kv,
        cache.near, cache.far, cache.index, queries, cache.sinks, cache.scales, cache.means, item,
    )  # fmt: skip
    where = (q, cache.near, cache.far, cache.lengths)
    with _ahead(q.device) as wait_for_chain:
        if indexed:
            assert selector is not None
            if rt.layer.index == "full":
                scores = _scored(rt, cache, queries, item, items)
                wait_for_chain()  # windows run beside the search's few programs; scores need the bandwidth
                found: tuple[Tensor, ...] = (
                    _listed(rt, cache.lengths, scores[0], tables) if listed else _searched(rt, cache.lengths, *scores)
                )
                step.kernel_sets = {rt.number: found}  # shared layers read this one alone
            found = step.kernel_sets[plan.index_source(rt.number)]
            if listed:
                kept, counts = found
                decode.listed_decode(
                    q, *cache.far, cache.lengths, *tables.chosen, kept, counts, tables.sets, item, scale, ranges,
                    partial, lse,
                )  # fmt: skip
            else:
                values, totals, edges = found
                scratch = torch.empty(batch, len(tables.sets), ranges, size, dtype=torch.int32, device=q.device)
                decode.chosen_decode(
                    q, *cache.far, cache.lengths, *tables.chosen, values, totals, edges, tables.sets, tables.first,
                    tables.members, tables.most, selector, plan.min_context, scale, scratch, partial, lse,
                )  # fmt: skip
        elif len(tables.retrieval):
            endless = Window(size=ALL, sinks=0)
            decode.window_decode(*where, *tables.chosen, 0, endless, 0, scale, cache.ring, ranges, partial, lse)
    if len(tables.windowed[0]):
        decode.window_decode(
            *where, *tables.windowed, len(tables.near[0]), cache.window, plan.min_context, scale, cache.ring, shares,
            partial, lse,
        )  # fmt: skip
    wait_for_chain()
    decode.combine(partial, lse, tables.shares(shares, ranges), out, cache.lengths, step.commit)
    cache.length += int(step.commit)


@contextmanager
def _ahead(device: torch.device) -> Iterator[Callable[[], None]]:
    """What is launched inside is a chain that goes ahead of what is launched behind the block.

    Yields a function after which everything else waits for what the chain has launched so far, and for no more. Only a
    captured graph gains by it: there a second stream costs nothing to launch.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda: None
        return
    main, first = torch.cuda.current_stream(device), _first_stream(device)
    first.wait_stream(main)
    with torch.cuda.stream(first):
        yield lambda: main.wait_event(first.record_event())


@functools.cache
def _first_stream(device: torch.device) -> torch.cuda.Stream:
    """Its kernels' programs start before those of other streams."""
    return torch.cuda.Stream(device, priority=-1)


def _scored(rt: LayerRuntime, cache: KernelLayer, queries: Tensor, item: int, items: int) -> tuple[Tensor, Tensor]:
    """Scores of the items, and of each chunk of them the sums that a divided search starts from."""
    assert rt.plan.selector is not None
    assert cache.lengths is not None
    batch, scored = cache.index.shape[:2]
    values = queries.new_empty(batch, scored, items)
    stats = queries.new_empty(batch, scored, -(-cache.slots // choose.CHUNK), 3)
    coarse = rt.plan.selector.coarse
    if coarse is not None and cache.slots > coarse.min_context:
        assert cache.means is not None
        levels.score(cache.index, cache.scales, cache.means, queries, cache.lengths, rt.plan.selector, values)
    elif rt.plan.selector.top_p < 1:  # else all is kept, whatever it scores
        choose.score(cache.index, queries, cache.lengths, item, values, stats, cache.scales)
    return values, stats


def _listed(rt: LayerRuntime, lengths: Tensor, values: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """The lists of what is kept, and their lengths."""
    selector = rt.plan.selector
    assert selector is not None
    batch, scored, items = values.shape
    totals, edges = values.new_empty(batch, scored), values.new_empty(batch, scored, 2)
    sets = len(tables.first)
    found = values.new_empty(batch, sets, items, dtype=torch.int32)
    counts = values.new_empty(batch, sets, dtype=torch.int32)
    least = rt.plan.min_context
    lists.kept(values, lengths, selector, least, totals, edges, found, counts, tables.first, tables.members)
    return found, counts


def _searched(rt: LayerRuntime, lengths: Tensor, values: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the items, the log of all weights, and the edges down to which items are kept."""
    selector = rt.plan.selector
    assert selector is not None
    batch, scored, items = values.shape
    totals, edges = values.new_empty(batch, scored), values.new_empty(batch, scored, 2)
    if selector.top_p < 1:
        sums = values.new_empty(2, batch, scored, choose.shares_of(items), 2 * choose.WAYS)
        states = values.new_empty(2, batch, scored, 4)
        choose.search(values, lengths, stats, selector, sums, states, totals, edges)
    return values, totals, edges


def _dense(
    q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, ...], kv_heads: list[int], scale: float, out: Tensor
) -> None:
    """A whole first chunk, causal, by PyTorch's kernels: few heads fill a GPU only together, so K and V are copied."""
    own = list(heads)
    found = F.scaled_dot_product_attention(
        q[:, own], k[:, kv_heads], v[:, kv_heads], is_causal=q.shape[2] > 1, scale=scale
    )
    out[:, own] = found


def _shares_of_list(items: int, item: int, programs: int) -> int:
    """How many programs divide a list: about PROGRAMS altogether, none for less than 256 tokens."""
    return max(1, min(MOST, PROGRAMS // programs, -(-items * item // 256)))


def _range(items: int, item: int) -> int:
    """Items a program of chosen attention: 512 to 4,096 tokens, 16 to 64 blocks."""
    least, most = (512, 4096) if item == 1 else (16, 64)
    return min(most, max(least, 1 << max(0, (items // RANGES - 1).bit_length())))


def _index_keys(rt: LayerRuntime, k: Tensor) -> Tensor | None:
    if rt.indexer is None or rt.plan.selector is None:
        return None
    keys = rt.indexer.keys(as_selector_sees(rt, k)[:, _tables(rt, k).retrieval_kv_heads])
    return stored(keys, k.dtype, rt.plan.selector)


def _rank(rt: LayerRuntime) -> int:
    return rt.plan.selector.rank if rt.indexer is not None and rt.plan.selector is not None else 0


def _tables(rt: LayerRuntime, x: Tensor) -> Tables:
    if rt.tables is None:
        rt.tables = Tables(rt.plan, rt.number, x.device)
    return rt.tables
