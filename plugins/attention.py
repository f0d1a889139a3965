"""Reference attention under a plan, in PyTorch: the execution contract row by row.

Transformers calls :func:`sparsec_attention` for every layer (``attn_implementation="sparsec"``) with q, k, v of the
new tokens, after q/k-norm and rotary embedding. Rows are *prefill* rows (retrieval heads dense, or on key blocks that
query blocks choose) or *decode* rows (retrieval heads: selector, then exact attention on the chosen keys). A chunk of
several decode rows is the row-exact simulation of as many decode steps. Only query blocks know where a chunk begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsec.plugins.blocks import Groups, choose_blocks, group_numbers, groups_of, kept_keys
from sparsec.plugins.cache import SparseLayer
from sparsec.plugins.coarse import candidates, extended
from sparsec.plugins.compensation import Dropped, compensated
from sparsec.plugins.index_keys import Index, stored
from sparsec.plugins.kernels.support import launching_on
from sparsec.plugins.masked import ROWS, attended, dense, gathered, windowed
from sparsec.plugins.selector import causal, select, unrotate
from sparsec.plugins.step import LayerRuntime, Selection, Step, token_numbers

if TYPE_CHECKING:
    from sparsec.plugins.kernels.cache import KernelLayer


def sparsec_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface.

    Args:
        module: the attention module; ``module.sparsec`` is its :class:`LayerRuntime`.
        query: [batch, heads, rows, head_dim]; key, value: [batch, KV heads, rows, head_dim], the new tokens only.
            Where the module's runtime says which rows were picked, the query has those, in the picked ones' layout.
        attention_mask: bool [batch, tokens so far] or None; a native sliding layer gets Transformers' own mask.

    Returns:
        [batch, rows, heads, head_dim] and None for the weights.

    Raises:
        ValueError: what a plan cannot run: 4-D masks, soft-capped logits, dropout, or no plan at all.
    """
    runtime: LayerRuntime | None = getattr(module, "sparsec", None)
    if runtime is None:
        raise ValueError("attn_implementation='sparsec' needs a plan: load the artifact with sparsec.load(path)")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what was rotated in float32
    if runtime.layer.heads is None:
        return native(query, key, value, attention_mask, scale), None
    check_call(attention_mask, dropout, kwargs)
    cache, step = runtime.cache, runtime.step or Step(decode=False)
    if cache is not None and not isinstance(cache, SparseLayer):
        return _on_kernels(runtime, step, cache, query, key, value, attention_mask, scale), None
    past = cache.length if cache is not None else 0
    if step.positions is None or step.positions.shape[1] != past + key.shape[2]:
        step.positions = token_numbers(attention_mask, key.shape[0], past + key.shape[2], query.device)
        step.padded = attention_mask is not None and bool((step.positions < 0).any())
    pos = step.positions.to(query.device)
    # Without a cache there is no ring: all local heads run in one call.
    together = cache is None and not (runtime.plan.window is not None and runtime.plan.window.compensate)
    parts = [] if together else _local(runtime, step, query, key, value, pos, scale)
    parts += _full(runtime, step, query, key, value, pos, scale, together)
    if cache is not None and step.commit:
        cache.length = pos.shape[1]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return (out if runtime.order is None else out.index_select(1, runtime.order)).transpose(1, 2), None


def check_call(attention_mask: Tensor | None, dropout: float, kwargs: Mapping[str, Any]) -> None:
    """What Transformers may ask of attention and gets nowhere here.

    Raises:
        ValueError: 4-D masks, soft-capped logits, dropout.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError("sparsec attention takes 2-D padding masks only: it makes the causal and window masks itself")
    if kwargs.get("softcap") is not None or dropout:
        raise ValueError("sparsec attention has no soft cap and no dropout: use the dense model")


def _on_kernels(
    rt: LayerRuntime,
    step: Step,
    cache: KernelLayer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The same on Triton's kernels: [batch, rows, heads, head_dim]."""
    from sparsec.plugins.kernels import attention as kernels

    rows = q.shape[2]
    if step.observe is not None or step.observe_prefill is not None or (step.decode and rows > 1):
        raise ValueError("kernels run one decode row at a time, unobserved: new_cache(model, kernels='reference')")
    out = torch.empty(q.shape[0], rows, *q.shape[1::2], dtype=q.dtype, device=q.device).transpose(1, 2)
    with launching_on(q):
        if step.decode:
            kernels.decode_step(rt, step, q, k, v, scale, out)
        else:
            _number(step, cache, q, mask)
            assert step.positions is not None
            kernels.prefill(rt, step, q, k, v, step.positions.to(q.device), bool(step.padded), scale, out)
    return out.transpose(1, 2)


def _number(step: Step, cache: KernelLayer, q: Tensor, mask: Tensor | None) -> None:
    """Token numbers of the call, once for all layers."""
    rows = q.shape[2]
    if step.positions is None:
        step.positions = token_numbers(mask, q.shape[0], cache.length + rows, q.device)
        step.padded = mask is not None and bool((step.positions < 0).any())
        new = step.positions[:, cache.length :]
        if cache.length and step.padded and bool((new[:, 0] < 0).any()):
            raise ValueError("the kernels' cache takes padding on the left of the first call only: pad on the right")


def _local(rt: LayerRuntime, step: Step, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, scale: float) -> list[Tensor]:
    """Query heads whose KV heads are evicted: sinks and window out of the ring."""
    if not len(rt.evicted):
        return []
    rows = k.shape[2]
    q_pos, k, v = pos[:, -rows:], k.index_select(1, rt.local_kv), v.index_select(1, rt.local_kv)
    store = rt.cache.local if rt.cache is not None else None
    commit = store is not None and step.commit
    if store is not None and commit and rows == 1 and store.write_one(k, v, q_pos):
        keys, values, k_pos = store.stored()
        commit = False
    else:
        keys, values, k_pos = (k, v, q_pos) if store is None else store.joined(k, v, q_pos)
    dropped = store.dropped if store is not None else None
    some = q.index_select(1, rt.evicted)
    found, dropped = _near(rt, step, some, keys, values, rt.evicted_on, q_pos, k_pos, scale, dropped)
    if store is not None and commit:
        store.dropped = dropped
        store.store(keys, values, k_pos)
    return [found]


def _near(
    rt: LayerRuntime,
    step: Step,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    scale: float,
    dropped: Dropped | None,
) -> tuple[Tensor, Dropped | None]:
    """Local heads as the plan's window has them, and what they have dropped afterwards."""
    assert rt.plan.window is not None
    if rt.plan.window.compensate:
        found: tuple[Tensor, Dropped] = compensated(q, k, v, heads, q_pos, k_pos, rt.plan, scale, dropped)
        return found
    if rt.picked is not None:
        return rt.picked.attend(q, k, v, heads, k_pos, scale, rt.plan), None
    return windowed(q, k, v, heads, q_pos, k_pos, rt.plan, scale, step.padded, step.masks), None


def _full(
    rt: LayerRuntime, step: Step, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, scale: float, all_local: bool
) -> list[Tensor]:
    """Query heads on KV heads that keep every token: retrieval heads and the local heads beside them.

    all_local: other local heads run here as well.
    """
    parts: list[Tensor] = []
    if all_local and len(rt.layer.local):
        local, group = torch.cat((rt.evicted, rt.windowed)), rt.plan.model.group
        some = q.index_select(1, local)
        parts.append(_near(rt, step, some, k, v, local // group, pos, pos, scale, None)[0])
    if not len(rt.full_kv):
        return parts
    cache, rows = rt.cache, k.shape[2]
    if len(rt.full_kv) != k.shape[1]:
        k, v = k.index_select(1, rt.full_kv), v.index_select(1, rt.full_kv)
    index = _index(rt, k, pos)
    if cache is not None and cache.full_keys is not None and cache.full_values is not None:
        k, v = torch.cat((cache.full_keys, k), 2), torch.cat((cache.full_values, v), 2)
    if cache is not None and step.commit:
        cache.full_keys, cache.full_values = k, v
        if index is not None:
            cache.index_keys, cache.index_means = index.keys, index.means
    q_pos = pos[:, -rows:]
    if len(rt.windowed) and not all_local:
        dropped = cache.dropped if cache is not None else None
        some = q.index_select(1, rt.windowed)
        found, dropped = _near(rt, step, some, k, v, rt.windowed_on, q_pos, pos, scale, dropped)
        parts.append(found)
        if cache is not None and step.commit:
            cache.dropped = dropped
    if len(rt.retrieval):
        parts.append(_far(rt, step, q, k, v, index, pos, scale))
    return parts


def _far(
    rt: LayerRuntime, step: Step, q: Tensor, k: Tensor, v: Tensor, index: Index | None, pos: Tensor, scale: float
) -> Tensor:
    """Retrieval heads; k and v are of the KV heads that keep every token, all tokens so far."""
    rows, whole = q.shape[2], len(rt.retrieval) == q.shape[1]
    q_pos = pos[:, -rows:]
    if rt.picked is not None:
        return rt.picked.attend(q if whole else q.index_select(1, rt.retrieval), k, v, rt.retrieval_on, pos, scale)
    if rt.layer.index == "none" and whole:
        return dense(q, k, v, q_pos, pos, scale, step.padded)  # the model's own attention: nothing is taken out
    q = q.index_select(1, rt.retrieval)
    k, v = k.index_select(1, rt.retrieval_on), v.index_select(1, rt.retrieval_on)
    prompt = min(step.prompt, rows) if step.decode and rt.layer.index != "none" else rows
    parts = []
    if prompt:
        seen = pos.shape[1] - rows + prompt
        chosen = rt.layer.index != "none" and rt.plan.selector is not None and rt.plan.selector.prefill == "selector"
        part = (q[:, :, :prompt], k[:, :, :seen], v[:, :, :seen])
        if chosen:
            parts.append(_chosen_blocks(rt, step, *part, _block_queries(rt, q, prompt), index, pos, scale))
        else:
            parts.append(dense(*part, q_pos[:, :prompt], pos[:, :seen], scale, step.padded))
    if prompt < rows:
        parts.append(_selected(rt, step, q[:, :, prompt:], k, v, index, pos, scale))
    return torch.cat(parts, 2)


@torch.no_grad()
@torch.autocast("cuda", enabled=False)  # a choice has no other precision in training than in use
def _index(rt: LayerRuntime, k: Tensor, pos: Tensor) -> Index | None:
    """Projected keys of all tokens so far; a shared layer has none. k: [batch, full KV heads, rows, head_dim], new."""
    selector, cache = rt.plan.selector, rt.cache
    if rt.indexer is None or selector is None:
        return None
    assert cache is None or isinstance(cache, SparseLayer)
    seen = as_selector_sees(rt, k).index_select(1, rt.retrieval_on)
    keys, means = stored(rt.indexer.keys(seen), k.dtype, selector), None
    if cache is not None and cache.index_keys is not None:
        keys = torch.cat((cache.index_keys, keys), 2)
    if selector.coarse is not None:
        held = cache.index_means if cache is not None else None
        means = extended(held, keys, pos, k.shape[2], selector.block, k.dtype)
    return Index(keys, means)


def as_selector_sees(rt: LayerRuntime, x: Tensor) -> Tensor:
    """q or k before or after RoPE, as the plan says; x: [batch, heads, rows, head_dim], the call's last rows."""
    assert rt.plan.selector is not None
    if rt.plan.selector.rope == "post":
        return x
    if rt.rope is None:
        raise ValueError("the selector reads q and k before RoPE, but the model passed no position embeddings")
    cos, sin = (table[:, -x.shape[2] :] for table in rt.rope)
    return unrotate(x, cos, sin)


def _selected(
    rt: LayerRuntime,
    step: Step,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Index | None,
    pos: Tensor,
    scale: float,
) -> Tensor:
    """Decode rows of retrieval heads: choose keys (or read a shared choice), attend to those exactly."""
    plan, rows = rt.plan, q.shape[2]
    assert plan.selector is not None
    source = plan.index_source(rt.number)
    parts = []
    past = pos.shape[1] - rows
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        seen = past + stop  # later keys are invisible to this tile
        q_pos, k_pos = pos[:, past + start : seen], pos[:, :seen]
        if (source, past + start) not in step.index_sets:
            step.index_sets[source, past + start] = _choose(rt, q, start, stop, index, q_pos, k_pos)
        keep = step.index_sets[source, past + start].to(q.device)
        if step.observe is not None:
            visible = causal(q_pos, k_pos)
            heads = rt.layer.retrieval
            if rt.away is not None:  # these rows choose nothing, they are as good as padding
                q_pos = q_pos.masked_fill(rt.away[:, start:stop], -1)
                visible = causal(q_pos, k_pos)
            part = (q[:, :, start:stop], k[:, :, :seen], keep & visible, visible, scale, plan, q_pos, k_pos)
            scores = partial(_scores, rt, q, start, stop, index, seen) if rt.indexer is not None else None
            step.observe(Selection(rt.number, heads, *part, scores))
        part_q, part_k, part_v = q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen]
        if rows == 1:
            parts.append(gathered(part_q, part_k, part_v, keep, scale))
        else:
            mask = keep if step.padded is False else keep | (q_pos < 0)[:, None, :, None]
            parts.append(attended(part_q, part_k, part_v, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)


@torch.no_grad()
@torch.autocast("cuda", enabled=False)
def _choose(
    rt: LayerRuntime, q: Tensor, start: int, stop: int, index: Index | None, q_pos: Tensor, k_pos: Tensor
) -> Tensor:
    """The keys that rows start .. stop keep: [batch, heads or 1, rows, keys]. No gradient goes through a choice."""
    selector = rt.plan.selector
    assert selector is not None
    scores, of = _scores(rt, q, start, stop, index, k_pos.shape[1]), None
    if selector.coarse is not None:
        assert index is not None
        assert index.means is not None
        of = candidates(_queries(rt, q, start, stop), index.means, q_pos, k_pos, selector)
    return select(scores, q_pos, k_pos, selector, rt.plan.min_context, kv_heads=rt.retrieval_kv, candidates=of)


@torch.no_grad()
@torch.autocast("cuda", enabled=False)
def _scores(rt: LayerRuntime, q: Tensor, start: int, stop: int, index: Index | None, keys: int) -> Tensor:
    """The selector's scores of rows start .. stop on the first keys, float32."""
    assert index is not None
    return _queries(rt, q, start, stop) @ index.read(keys).transpose(-1, -2)


def _queries(rt: LayerRuntime, q: Tensor, start: int, stop: int) -> Tensor:
    """Projected queries of rows start .. stop, float32 [batch, heads, rows, rank]."""
    assert rt.indexer is not None
    return rt.indexer.queries(as_selector_sees(rt, q)[:, :, start:stop])


@torch.no_grad()
@torch.autocast("cuda", enabled=False)
def _block_queries(rt: LayerRuntime, q: Tensor, prompt: int) -> Tensor | None:
    """Projected queries of the call's first rows, [batch, heads, prompt, rank]; None in a shared layer."""
    return _queries(rt, q, 0, prompt) if rt.indexer is not None else None


def _chosen_blocks(
    rt: LayerRuntime,
    step: Step,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor | None,
    index: Index | None,
    pos: Tensor,
    scale: float,
) -> Tensor:
    """Prefill rows of retrieval heads under ``prefill: selector``; k and v end with the last of these rows."""
    selector, source = rt.plan.selector, rt.plan.index_source(rt.number)
    assert selector is not None
    rows, past = q.shape[2], k.shape[2] - q.shape[2]
    numbers = group_numbers(pos[:, past : past + rows], selector, rt.plan.min_context)
    parts = []
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        q_pos, k_pos = pos[:, past + start : past + stop], pos[:, : past + stop]
        keep = visible = causal(q_pos, k_pos)
        groups = groups_of(numbers, start, stop)
        if groups is not None:
            if (source, past + start) not in step.index_sets:
                step.index_sets[source, past + start] = _choose_blocks(rt, queries, index, pos, past, numbers, groups)
            keep = kept_keys(step.index_sets[source, past + start].to(q.device), groups, k_pos, visible, selector.block)
        part_q, part_k, part_v = q[:, :, start:stop], k[:, :, : past + stop], v[:, :, : past + stop]
        if step.observe_prefill is not None:
            heads = rt.layer.retrieval
            part = (part_q, part_k, keep, visible, scale, rt.plan, q_pos, k_pos)
            step.observe_prefill(Selection(rt.number, heads, *part))
        mask = keep | (q_pos < 0)[:, None, :, None]
        parts.append(attended(part_q, part_k, part_v, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)


@torch.no_grad()
@torch.autocast("cuda", enabled=False)
def _choose_blocks(
    rt: LayerRuntime,
    queries: Tensor | None,
    index: Index | None,
    pos: Tensor,
    past: int,
    numbers: Tensor,
    groups: Groups,
) -> Tensor:
    """The key blocks of a tile's groups, by all rows of the call that stand in them."""
    assert queries is not None
    assert index is not None
    assert rt.plan.selector is not None
    part, seen = slice(groups.start, groups.stop), past + groups.stop
    scores = queries[:, :, part] @ index.read(seen).transpose(-1, -2)
    q_pos, k_pos = pos[:, past:][:, part], pos[:, :seen]
    return choose_blocks(scores, numbers[:, part], groups, q_pos, k_pos, rt.plan.selector, rt.retrieval_kv)


def native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """A layer that the plan leaves alone: Transformers' mask, PyTorch's attention."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    causal_only = mask is None and q.shape[2] > 1
    return attended(q, k, v, attn_mask=mask, is_causal=causal_only, scale=scale).transpose(1, 2)
