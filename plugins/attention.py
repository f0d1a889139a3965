"""Reference attention under a plan, in PyTorch: the execution contract row by row.

Transformers calls :func:`sparsec_attention` for every layer (``attn_implementation="sparsec"``) with q, k, v of the
new tokens, after q/k-norm and rotary embedding. Rows are *prefill* rows (retrieval heads dense) or *decode* rows
(retrieval heads: selector, then exact attention on the chosen keys). A chunk of several decode rows is the row-exact
simulation of as many decode steps. Nothing depends on how the rows are cut into chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec.plan import LayerPlan, Plan
from sparsec.plugins.cache import SparseLayer
from sparsec.plugins.selector import Indexer, causal, select, unrotate

BANDED = 1 << 24  # rows x window up to which all tiles of a prompt run in one call: its mask is held at once
ROWS = 512  # rows a tile: what is held at once is [heads, ROWS, keys], never rows x keys of a whole prompt


@dataclass
class Selection:
    """What an observer sees of one layer's decode rows; the tensors of one tile of rows."""

    layer: int
    heads: tuple[int, ...]
    q: Tensor  # [batch, retrieval heads, rows, head_dim]
    k: Tensor  # [batch, retrieval heads, keys, head_dim]
    keep: Tensor  # bool [batch, retrieval heads or 1, rows, keys]
    visible: Tensor  # bool [batch, 1, rows, keys]
    scale: float


@dataclass
class Step:
    """What the layers of one forward call share. Made anew for every call, so no index set outlives its query."""

    decode: bool
    prompt: int = 0  # where decode: the call's first so many rows are prefill rows all the same
    commit: bool = True  # False: the cache is read, not written
    observe: Callable[[Selection], None] | None = None
    index_sets: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (layer, tile) -> keep
    positions: Tensor | None = None  # [batch, keys] token numbers, -1 padding


@dataclass
class LayerRuntime:
    """A layer's plan, worked out once."""

    plan: Plan
    number: int
    layer: LayerPlan
    indexer: Indexer | None
    local_kv: Tensor  # KV heads whose query heads are all local
    full_kv: Tensor  # the others
    evicted: Tensor  # local query heads on local KV heads
    windowed: Tensor  # local query heads on full KV heads
    retrieval: Tensor
    rope: tuple[Tensor, Tensor] | None = None  # this call's cos, sin
    cache: SparseLayer | None = None  # this call's cache
    step: Step | None = None


def layer_runtime(plan: Plan, number: int, indexer: Indexer | None, device: torch.device) -> LayerRuntime:
    """Sort a layer's heads by what they need."""
    layer, group = plan.layers[number], plan.model.group
    local_kv = layer.local_kv_heads(group)
    full_kv = tuple(k for k in range(plan.model.kv_heads) if k not in local_kv)

    def tensor(heads: tuple[int, ...]) -> Tensor:
        return torch.tensor(heads, dtype=torch.long, device=device)

    return LayerRuntime(
        plan=plan,
        number=number,
        layer=layer,
        indexer=indexer,
        local_kv=tensor(local_kv),
        full_kv=tensor(full_kv),
        evicted=tensor(tuple(h for h in layer.local if h // group in local_kv)),
        windowed=tensor(tuple(h for h in layer.local if h // group in full_kv)),
        retrieval=tensor(layer.retrieval),
    )


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
    if runtime.layer.heads is None:
        return _native(query, key, value, attention_mask, scale), None
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError("sparsec attention takes 2-D padding masks only: it makes the causal and window masks itself")
    if kwargs.get("softcap") is not None or dropout:
        raise ValueError("sparsec attention has no soft cap and no dropout: use the dense model")
    cache, step = runtime.cache, runtime.step or Step(decode=False)
    past = cache.length if cache is not None else 0
    if step.positions is None or step.positions.shape[1] != past + query.shape[2]:
        step.positions = token_numbers(attention_mask, query.shape[0], past + query.shape[2], query.device)
    pos = step.positions.to(query.device)
    out = torch.empty_like(query)
    _local(runtime, step, query, key, value, pos, scale, out)
    _full(runtime, step, query, key, value, pos, scale, out)
    if cache is not None and step.commit:
        cache.length = pos.shape[1]
    return out.transpose(1, 2), None


def token_numbers(mask: Tensor | None, batch: int, total: int, device: torch.device) -> Tensor:
    """Number the real tokens of each row from 0; padding is -1. [batch, total]."""
    if mask is None:
        return torch.arange(total, device=device).expand(batch, total)
    if mask.shape[1] != total:
        raise ValueError(f"the attention mask covers {mask.shape[1]} tokens, cache and input hold {total}")
    real = mask.to(device=device, dtype=torch.long)
    return torch.where(real > 0, real.cumsum(1) - 1, -1)


def _local(
    rt: LayerRuntime, step: Step, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, scale: float, out: Tensor
) -> None:
    """Query heads whose KV heads are evicted: sinks and window out of the ring."""
    if not len(rt.evicted):
        return
    rows = q.shape[2]
    q_pos, k, v = pos[:, -rows:], k[:, rt.local_kv], v[:, rt.local_kv]
    store = rt.cache.local if rt.cache is not None else None
    heads = torch.searchsorted(rt.local_kv, rt.evicted // rt.plan.model.group)
    if store is not None and step.commit and rows == 1 and store.write_one(k, v, q_pos):
        keys, values, k_pos = store.stored()
    else:
        keys, values, k_pos = (k, v, q_pos) if store is None else store.joined(k, v, q_pos)
        if store is not None and step.commit:
            store.store(keys, values, k_pos)
    out[:, rt.evicted] = windowed(q[:, rt.evicted], keys, values, heads, q_pos, k_pos, rt.plan, scale)


def _full(
    rt: LayerRuntime, step: Step, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, scale: float, out: Tensor
) -> None:
    """Query heads on KV heads that keep every token: retrieval heads and the local heads beside them."""
    if not len(rt.full_kv):
        return
    cache, rows, group = rt.cache, q.shape[2], rt.plan.model.group
    k, v = k[:, rt.full_kv], v[:, rt.full_kv]
    index = _index_keys(rt, k)
    if cache is not None and cache.full_keys is not None and cache.full_values is not None:
        k, v = torch.cat((cache.full_keys, k), 2), torch.cat((cache.full_values, v), 2)
        if index is not None and cache.index_keys is not None:
            index = torch.cat((cache.index_keys, index), 2)
    if cache is not None and step.commit:
        cache.full_keys, cache.full_values, cache.index_keys = k, v, index
    q_pos = pos[:, -rows:]
    if len(rt.windowed):
        heads = torch.searchsorted(rt.full_kv, rt.windowed // group)
        out[:, rt.windowed] = windowed(q[:, rt.windowed], k, v, heads, q_pos, pos, rt.plan, scale)
    if len(rt.retrieval):
        heads = torch.searchsorted(rt.full_kv, rt.retrieval // group)
        q, k, v = q[:, rt.retrieval], k[:, heads], v[:, heads]
        prompt = min(step.prompt, rows) if step.decode and rt.layer.index != "none" else rows
        parts = []
        if prompt:
            seen = pos.shape[1] - rows + prompt
            parts.append(
                dense(q[:, :, :prompt], k[:, :, :seen], v[:, :, :seen], q_pos[:, :prompt], pos[:, :seen], scale)
            )
        if prompt < rows:
            parts.append(_selected(rt, step, q[:, :, prompt:], k, v, index, pos, scale))
        out[:, rt.retrieval] = torch.cat(parts, 2)


@torch.no_grad()
def _index_keys(rt: LayerRuntime, k: Tensor) -> Tensor | None:
    """Projected keys of the new tokens: [batch, retrieval heads, rows, rank]; shared layers have none."""
    if rt.indexer is None or rt.plan.selector is None:
        return None
    heads = torch.searchsorted(rt.full_kv, rt.retrieval // rt.plan.model.group)
    return rt.indexer.keys(_as_selector_sees(rt, k)[:, heads]).to(k.dtype)


def _as_selector_sees(rt: LayerRuntime, x: Tensor) -> Tensor:
    """x: [batch, heads, rows, head_dim], the call's last so many rows."""
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
    index: Tensor | None,
    pos: Tensor,
    scale: float,
) -> Tensor:
    """Decode rows of retrieval heads: choose keys (or read a shared choice), attend to those exactly."""
    plan, rows = rt.plan, q.shape[2]
    assert plan.selector is not None
    source = plan.index_source(rt.number)
    parts = []
    for tile, start in enumerate(range(0, rows, ROWS)):
        stop = min(start + ROWS, rows)
        seen = pos.shape[1] - rows + stop  # later keys are invisible to this tile
        q_pos, k_pos = pos[:, pos.shape[1] - rows :][:, start:stop], pos[:, :seen]
        if (source, tile) not in step.index_sets:
            step.index_sets[source, tile] = _choose(rt, q, start, stop, index, q_pos, k_pos)
        keep = step.index_sets[source, tile].to(q.device)
        if step.observe is not None:
            visible = causal(q_pos, k_pos)
            heads = rt.layer.retrieval
            step.observe(Selection(rt.number, heads, q[:, :, start:stop], k[:, :, :seen], keep, visible, scale))
        part_q, part_k, part_v = q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen]
        if rows == 1:
            parts.append(gathered(part_q, part_k, part_v, keep, scale))
        else:
            mask = keep | (q_pos < 0)[:, None, :, None]
            parts.append(F.scaled_dot_product_attention(part_q, part_k, part_v, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)


@torch.no_grad()
def _choose(
    rt: LayerRuntime, q: Tensor, start: int, stop: int, index: Tensor | None, q_pos: Tensor, k_pos: Tensor
) -> Tensor:
    """The keys that rows start .. stop keep: [batch, heads or 1, rows, keys]. No gradient goes through a choice."""
    assert rt.indexer is not None
    assert index is not None
    assert rt.plan.selector is not None
    queries = rt.indexer.queries(_as_selector_sees(rt, q)[:, :, start:stop])
    scores = queries @ index[:, :, : k_pos.shape[1]].float().transpose(-1, -2)
    return select(scores, q_pos, k_pos, rt.plan.selector, rt.plan.min_context)


def gathered(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """One row: attention that reads the kept keys and values only.

    q: [batch, heads, 1, dim]; k, v: [batch, heads, keys, dim]; keep: bool [batch, heads or 1, 1, keys].
    """
    kept = keep[:, :, 0].expand(-1, q.shape[1], -1)
    most = max(1, int(kept.sum(-1).max()))
    # Kept keys first, in order of time; rows with fewer are padded with dropped keys and masked.
    flags, at = kept.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
    flags, at = flags[..., :most].bool(), at[..., :most]
    rows = at[..., None].expand(*at.shape, k.shape[-1])
    flags = flags | ~flags.any(-1, keepdim=True)
    picked_k, picked_v = k.gather(2, rows), v.gather(2, rows)
    return F.scaled_dot_product_attention(q, picked_k, picked_v, attn_mask=flags[:, :, None], scale=scale)


def dense(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, scale: float) -> Tensor:
    """Causal attention over all real keys; k and v are repeated to q's heads. Tiled over rows."""
    rows, keys = q.shape[2], k.shape[2]
    if rows == keys and bool((k_pos >= 0).all()):
        return F.scaled_dot_product_attention(q, k, v, is_causal=rows > 1, scale=scale)
    parts = []
    for start in range(0, rows, ROWS):
        seen = keys - rows + min(start + ROWS, rows)
        part_pos = q_pos[:, start : start + ROWS]
        mask = causal(part_pos, k_pos[:, :seen]) | (part_pos < 0)[:, None, :, None]
        part = q[:, :, start : start + ROWS]
        parts.append(F.scaled_dot_product_attention(part, k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)


def windowed(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, q_pos: Tensor, k_pos: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Local heads: sinks and the last ``window.size`` tokens of every row, the row's own included.

    q: [batch, heads, rows, dim]; k, v: [batch, KV heads, keys, dim]; heads: KV head of each query head;
    q_pos, k_pos: token numbers, k_pos ascending where rows > 1. Each tile reads its own slice of the keys.
    """
    assert plan.window is not None
    size, sinks = plan.window.size, plan.window.sinks
    rows, keys = q.shape[2], k.shape[2]
    whole = rows == keys > max(size + sinks, ROWS) and plan.min_context <= size + sinks
    if whole and rows * size <= BANDED and bool((k_pos[:, 0] == 0).all()):
        return banded(q, k, v, heads, size, sinks, scale)
    parts = []
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        part_pos = q_pos[:, start:stop]
        if rows == 1:
            tile_k, tile_v, tile_pos = k, v, k_pos
        else:
            index = _reach(part_pos, k_pos, size, sinks, plan.min_context, keys - rows + stop)
            tile_k, tile_v, tile_pos = k[:, :, index], v[:, :, index], k_pos[:, index]
        t, j = part_pos[:, None, :, None], tile_pos[:, None, None, :]
        near = (t - j < size) | (j < sinks) | (t < plan.min_context)
        mask = ((j >= 0) & (j <= t) & near) | (t < 0)
        tile_k, tile_v = tile_k[:, heads], tile_v[:, heads]
        parts.append(F.scaled_dot_product_attention(q[:, :, start:stop], tile_k, tile_v, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)


def banded(q: Tensor, k: Tensor, v: Tensor, heads: Tensor, size: int, sinks: int, scale: float) -> Tensor:
    """:func:`windowed` for whole prompts, padded on the right at most: all tiles of rows in one call.

    A tile is at least a window long, so its keys are the tile before it, itself and the sinks.
    """
    batch, rows = q.shape[0], q.shape[2]
    tile = max(size, 128)
    tiles = -(-rows // tile)
    columns = -(-sinks // 8) * 8  # fused kernels want masks of aligned rows; the columns behind the sinks are masked

    def tiled(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, tiles * tile - rows)).unflatten(2, (tiles, tile))

    def keys(x: Tensor) -> Tensor:
        own = tiled(x)
        before = F.pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        first = x[:, :, None, :columns].expand(-1, -1, tiles, -1, -1)
        return torch.cat((before, own, first), 3)[:, heads].transpose(1, 2).flatten(0, 1)

    t = torch.arange(tiles * tile, device=q.device).view(tiles, tile, 1)
    j = torch.arange(2 * tile, device=q.device) - tile + t[:, :1]
    near = (j >= 0) & (j <= t) & (t - j < size)
    j = torch.arange(columns, device=q.device)
    first = (j < sinks) & (t - j >= size)
    # A padded row sees whatever: it is cut off.
    mask = (torch.cat((near, first), -1) | (t >= rows)).repeat(batch, 1, 1)[:, None]
    queries = tiled(q).transpose(1, 2).flatten(0, 1)
    found = F.scaled_dot_product_attention(queries, keys(k), keys(v), attn_mask=mask, scale=scale)
    return found.unflatten(0, (batch, tiles)).transpose(1, 2).flatten(2, 3)[:, :, :rows]


def _reach(q_pos: Tensor, k_pos: Tensor, size: int, sinks: int, min_context: int, seen: int) -> Tensor:
    """Indices of the keys that any row of a tile can see."""
    real = q_pos[q_pos >= 0]
    first = int(real.min()) if real.numel() else 0
    low = 0 if first < min_context else max(0, first - size + 1)
    candidates = ((k_pos >= low) | ((k_pos >= 0) & (k_pos < sinks))).any(0)
    candidates[seen:] = False
    if not bool(candidates.any()):
        candidates[:1] = True
    return candidates.nonzero()[:, 0]


def _native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """A layer that the plan leaves alone: Transformers' mask, PyTorch's attention."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    causal_only = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal_only, scale=scale).transpose(1, 2)
