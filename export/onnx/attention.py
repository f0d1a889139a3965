"""Attention as it is traced into a graph: what the reference computes becomes nodes of the domain ``ai.sparsec``.

The model is the runtime's own, with the plan installed, so families need nothing of their own here: Transformers calls
:func:`traced_attention` where it would call the reference. A layer's stores are the graph's inputs, what becomes of
them its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sparsec.export.onnx.functions import DOMAIN, VERSION
from sparsec.plan import Plan, Window
from sparsec.plugins.ahead import NAMESPACE
from sparsec.plugins.attention import as_selector_sees
from sparsec.plugins.families import native_local_layers
from sparsec.plugins.step import LayerRuntime

NAME = "sparsec_onnx"
ENDLESS = 1 << 30  # a window that never ends
STORES = ("full_keys", "full_values", "local_keys", "local_values", "index_keys", "latents")


@dataclass
class Call:
    """One call of the model while it is traced."""

    decode: bool
    lengths: Tensor  # int64 [batch], tokens stored before it
    added: Tensor  # int64 [batch], its real tokens
    past: dict[tuple[int, str], Tensor]  # stores by layer and name of STORES
    masked: bool = False  # decode rows read all keys under masks instead of gathering some
    rewrite: bool = False  # index keys are chosen slot by slot in decode rows, too
    present: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)  # by full layer: bool [batch, sets or rows, slots]


@dataclass(frozen=True)
class Stores:
    """What a layer keeps: KV heads that keep every token, those that are a ring, and that ring."""

    full_kv: tuple[int, ...]
    local_kv: tuple[int, ...]
    window: Window | None
    min_context: int
    scored: int  # heads whose index keys are kept

    @property
    def slots(self) -> int:
        """Of a local KV head: sinks, and the window or what is dense up to ``min_context`` where that is more."""
        if self.window is None:
            return 0
        return self.window.sinks + max(self.window.size, self.min_context - self.window.sinks)

    def shapes(self, head_dim: int, rank: int, batch: Any, slots: Any) -> dict[str, tuple[Any, ...]]:
        """The stores' shapes by name; ``slots`` of full KV heads."""
        found: dict[str, tuple[Any, ...]] = {}
        if self.full_kv:
            found |= dict.fromkeys(STORES[:2], (batch, len(self.full_kv), slots, head_dim))
        if self.local_kv:
            found |= dict.fromkeys(STORES[2:4], (batch, len(self.local_kv), self.slots, head_dim))
        if self.scored:
            found[STORES[4]] = (batch, self.scored, slots, rank)
        return found


def stores_of(plan: Plan, number: int, config: Any) -> Stores:
    """The stores of a layer. One that the model itself runs with a sliding window is all local, without sinks."""
    layer = plan.layers[number]
    every = tuple(range(plan.model.kv_heads))
    if number in native_local_layers(config):
        return Stores((), every, Window(size=config.sliding_window, sinks=0), 0, 0)
    local = layer.local_kv_heads(plan.model.group) if layer.heads is not None else ()
    full = tuple(kv for kv in every if kv not in local)
    scored = len(layer.retrieval) if layer.index == "full" else 0
    return Stores(full, local, plan.window, plan.min_context, scored)


def node(name: str, inputs: Sequence[Tensor], shape: Sequence[Any], dtype: torch.dtype, **attributes: Any) -> Tensor:
    """A node of an operator of ours; TensorRT finds a plugin of its name by the attributes ``plugin_...``."""
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}",
        inputs,
        attrs={**attributes, "plugin_namespace": NAMESPACE, "plugin_version": str(VERSION)},
        dtype=dtype,
        shape=shape,
        version=VERSION,
    )
    return found


def traced_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface; arguments as in :func:`~sparsec.plugins.attention.sparsec_attention`."""
    rt: Any = module.sparsec
    call: Call = rt.call
    stores = stores_of(rt.plan, rt.number, module.config)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window, context = (stores.window, stores.min_context) if stores.window else (Window(size=ENDLESS, sinks=0), 0)
    near = {"window": window.size, "sinks": window.sinks, "min_context": context, "scale": scale}
    group = rt.plan.model.group
    parts: list[Tensor] = []  # [batch, heads, rows, head_dim]
    found: dict[int, int] = {}  # by query head, its place in all parts

    def leave(heads: Sequence[int], part: Tensor, wanted: Sequence[int] | None = None) -> None:
        behind = sum(each.shape[1] for each in parts)
        found.update((h, behind + place) for place, h in enumerate(heads) if wanted is None or h in wanted)
        parts.append(part)

    if stores.local_kv:
        heads = _heads_on(stores.local_kv, group)
        leave(heads, _local(rt.number, call, _some(query, heads), key, value, stores, near))
    if stores.full_kv:
        k, v = (
            append(rt.number, call, name, _some(new, stores.full_kv))
            for name, new in zip(STORES[:2], (key, value), strict=True)
        )
        heads = _heads_on(stores.full_kv, group)
        windowed = tuple(h for h in heads if h in rt.layer.local)
        retrieval = tuple(h for h in heads if h not in windowed)
        rows = Rows(query, k, v, stores.full_kv, group)
        if rt.layer.index != "none" and stores.scored:
            _index(rt, call, key, stores)
        chosen = call.decode and rt.layer.index != "none" and bool(retrieval)
        if not call.decode or call.masked:  # one call for both kinds: they read the same keys
            one = _masked(rt, call, rows, retrieval, near) if chosen else _causal(call, rows, heads, windowed, near)
            leave(heads, one)
        else:
            if windowed:
                leave(*_beside(call, rows, windowed, near), windowed)
            if chosen:
                leave(*_chosen(rt, call, rows, retrieval, scale), retrieval)
            elif retrieval:
                leave(*_dense(call, rows, retrieval, near), retrieval)
    whole = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return _some(whole, [found[h] for h in range(query.shape[1])]).transpose(1, 2), None


def _heads_on(kv_heads: Sequence[int], group: int) -> tuple[int, ...]:
    """The query heads that read these KV heads."""
    return tuple(kv * group + g for kv in kv_heads for g in range(group))


def _some(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Heads of [batch, heads, rows, head_dim]."""
    if tuple(heads) == tuple(range(x.shape[1])):
        return x
    return x.index_select(1, torch.tensor(heads, device=x.device))


def append(number: int, call: Call, name: str, new: Tensor) -> Tensor:
    """Write new tokens, [batch, heads, rows, dim], into a layer's store of that name; the store with them."""
    past = call.past[number, name]
    operator = "IndexUpdate" if name == STORES[4] and (call.rewrite or not call.decode) else "CacheUpdate"
    present = node(operator, (past, new, call.lengths), past.shape, past.dtype)
    call.present[number, name] = present
    return present


def _local(
    number: int, call: Call, q: Tensor, key: Tensor, value: Tensor, stores: Stores, near: dict[str, Any]
) -> Tensor:
    """Query heads whose KV heads are rings."""
    past = [call.past[number, name] for name in STORES[2:4]]
    new = [_some(x, stores.local_kv) for x in (key, value)]
    sinks = {"sinks": near["sinks"]}
    if call.decode:
        present = [
            node("RingWrite", (ring, x, call.lengths), ring.shape, ring.dtype, **sinks)
            for ring, x in zip(past, new, strict=True)
        ]
        found = node("WindowDecode", (q, *present, call.lengths), q.shape, q.dtype, **near)
    else:
        present = [
            node("RingUpdate", (ring, x, call.lengths, call.added), ring.shape, ring.dtype, **sinks)
            for ring, x in zip(past, new, strict=True)
        ]
        found = node("WindowAttention", (q, *past, *new, call.lengths), q.shape, q.dtype, **near)
    call.present |= {(number, name): x for name, x in zip(STORES[2:4], present, strict=True)}
    return found


@dataclass(frozen=True)
class Rows:
    """Query heads that read KV heads which keep every token."""

    query: Tensor  # [batch, all query heads, rows, head_dim]
    k: Tensor  # [batch, full KV heads, slots, head_dim]; v as well
    v: Tensor
    kv_heads: tuple[int, ...]  # the full KV heads
    group: int

    def runs(self, heads: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
        """The KV heads that these query heads read, by place in the store, and all query heads on them: what shares
        its KV heads is computed together, so that keys are read once a KV head."""
        read = [kv for kv in self.kv_heads if any(h // self.group == kv for h in heads)]
        return [self.kv_heads.index(kv) for kv in read], _heads_on(read, self.group)


Found = tuple[tuple[int, ...], Tensor]  # query heads, and what they read: [batch, these heads, rows, head_dim]


def _beside(call: Call, rows: Rows, heads: Sequence[int], near: dict[str, Any]) -> Found:
    """A decode row of local heads on KV heads that keep every token."""
    places, every = rows.runs(heads)
    q = _some(rows.query, every)
    return every, node("BesideDecode", (q, rows.k, rows.v, call.lengths), q.shape, q.dtype, kv_heads=places, **near)


def _dense(call: Call, rows: Rows, heads: Sequence[int], near: dict[str, Any]) -> Found:
    """A decode row of retrieval heads that have no index."""
    places, every = rows.runs(heads)
    part = Rows(rows.query, _some(rows.k, places), _some(rows.v, places), rows.kv_heads, rows.group)
    return every, _causal(call, part, every, (), near)


def _causal(call: Call, rows: Rows, heads: Sequence[int], windowed: Sequence[int], near: dict[str, Any]) -> Tensor:
    """Rows over all slots of all KV heads of ``rows``, of which ``heads`` are equal runs: dense, or of a window."""
    local = [int(h in windowed) for h in heads]
    if len(set(local)) == 1:
        local = local[:1]  # one mask for all
    q = _some(rows.query, heads)
    return node("CausalAttention", (q, rows.k, rows.v, call.lengths), q.shape, q.dtype, local=local, **near)


@torch.no_grad()
def _index(rt: LayerRuntime, call: Call, key: Tensor, stores: Stores) -> None:
    """Projected keys of the new tokens into the store."""
    assert rt.indexer is not None
    seen = as_selector_sees(rt, key)
    group = rt.plan.model.group
    own = rt.indexer.keys(_some(seen, [h // group for h in rt.layer.retrieval])).to(key.dtype)
    append(rt.number, call, STORES[4], own)


def _kept(rt: LayerRuntime, call: Call, rows: Rows, heads: Sequence[int]) -> Tensor:
    """What a decode row of retrieval heads keeps, chosen here or read of the full layer below.

    bool [batch, sets, slots], one set for all heads or one for each.
    """
    plan, selector = rt.plan, rt.plan.selector
    assert selector is not None
    source = plan.index_source(rt.number)
    if source not in call.kept:
        assert rt.indexer is not None
        queries = rt.indexer.queries(as_selector_sees(rt, _some(rows.query, heads)))
        index = call.present[source, STORES[4]]
        attributes: dict[str, Any] = {
            "top_p": selector.top_p,
            "sinks": selector.sinks,
            "recent": selector.recent,
            "min_keep": selector.min_keep,
            "min_context": plan.min_context,
        }
        if selector.granularity == "block":
            attributes["block"] = selector.block
        name = "SelectBlocks" if selector.granularity == "block" else "SelectTokens"
        shape = (index.shape[0], len(heads), index.shape[2])
        keep = node(name, (queries, index, call.lengths), shape, torch.bool, **attributes)
        call.kept[source] = _united(keep, selector.scope, [h // plan.model.group for h in heads])
    return call.kept[source]


def _united(keep: Tensor, scope: str, kv_heads: Sequence[int]) -> Tensor:
    """Sets as the selector's scope has them: one a head (a KV head's is that of each of its), or [batch, 1, slots]."""
    if scope == "head":
        return keep
    one = (keep.shape[0], 1, keep.shape[2])
    if scope == "layer":
        return node("Union", (keep,), one, torch.bool)
    places = {kv: [i for i, other in enumerate(kv_heads) if other == kv] for kv in kv_heads}
    each = {kv: node("Union", (keep[:, of[0] : of[-1] + 1],), one, torch.bool) for kv, of in places.items()}
    return torch.cat([each[kv] for kv in kv_heads], 1)


def _masked(rt: LayerRuntime, call: Call, rows: Rows, heads: Sequence[int], near: dict[str, Any]) -> Tensor:
    """A decode row of all query heads on full KV heads, which retrieval ``heads`` read where they keep."""
    keep = _kept(rt, call, rows, heads)
    every = _heads_on(rows.kv_heads, rows.group)
    sets = [(0 if keep.shape[1] == 1 else heads.index(h)) if h in heads else -1 for h in every]
    q = _some(rows.query, every)
    return node("MaskedDecode", (q, rows.k, rows.v, keep, call.lengths), q.shape, q.dtype, sets=sets, **near)


def _chosen(rt: LayerRuntime, call: Call, rows: Rows, heads: Sequence[int], scale: float) -> Found:
    """A decode row of retrieval heads: choose, gather and attend."""
    assert rt.plan.selector is not None
    keep = _kept(rt, call, rows, heads)
    if rt.plan.selector.scope == "layer":
        places, every = rows.runs(heads)
    else:
        places, every = [rows.kv_heads.index(h // rows.group) for h in heads], tuple(heads)
    q = _some(rows.query, every)
    inputs = (q, rows.k, rows.v, keep)
    return every, node("ChosenDecode", inputs, q.shape, q.dtype, kv_heads=places, scale=scale)


def _mask(**kwargs: Any) -> None:
    """Transformers' mask interface: the nodes make their own masks."""


AttentionInterface.register(NAME, traced_attention)
AttentionMaskInterface.register(NAME, _mask)
