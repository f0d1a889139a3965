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
from sparsec.plugins.attention import LayerRuntime, as_selector_sees
from sparsec.plugins.families import native_local_layers

NAME = "sparsec_onnx"
ENDLESS = 1 << 30  # a window that never ends
STORES = ("full_keys", "full_values", "local_keys", "local_values", "index_keys")


@dataclass
class Call:
    """One call of the model while it is traced."""

    decode: bool
    lengths: Tensor  # int64 [batch], tokens stored before it
    added: Tensor  # int64 [batch], its real tokens
    past: dict[tuple[int, str], Tensor]  # stores by layer and name of STORES
    present: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)  # by full layer: bool [batch, sets, slots]


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
    out: dict[int, Tensor] = {}  # by query head, [batch, 1, rows, head_dim]

    def leave(heads: Sequence[int], found: Tensor) -> None:
        out.update(zip(heads, torch.split(found, 1, 1), strict=True))

    if stores.local_kv:
        heads = _heads_on(stores.local_kv, group)
        leave(heads, _local(rt.number, call, _some(query, heads), key, value, stores, near))
    if stores.full_kv:
        k, v = (
            _append(rt.number, call, name, new, stores.full_kv)
            for name, new in zip(STORES[:2], (key, value), strict=True)
        )
        windowed = tuple(h for h in rt.layer.local if h // group in stores.full_kv)
        retrieval = tuple(h for h in _heads_on(stores.full_kv, group) if h not in windowed)
        if windowed:
            rows = Rows(query, k, v, windowed, stores.full_kv, group)
            leave(windowed, _beside(call, rows, near))
        if rt.layer.index != "none" and stores.scored:
            _index(rt, call, key, stores)
        if retrieval:
            if call.decode and rt.layer.index != "none":
                leave(retrieval, _chosen(rt, call, Rows(query, k, v, retrieval, stores.full_kv, group), scale))
            else:
                every = {"window": ENDLESS, "sinks": 0, "min_context": 0, "scale": scale}
                leave(retrieval, _causal(call, Rows(query, k, v, retrieval, stores.full_kv, group), every))
    return torch.cat([out[h] for h in range(query.shape[1])], 1).transpose(1, 2), None


def _heads_on(kv_heads: Sequence[int], group: int) -> tuple[int, ...]:
    """The query heads that read these KV heads."""
    return tuple(kv * group + g for kv in kv_heads for g in range(group))


def _some(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Heads of [batch, heads, rows, head_dim]."""
    if tuple(heads) == tuple(range(x.shape[1])):
        return x
    return x.index_select(1, torch.tensor(heads, device=x.device))


def _append(number: int, call: Call, name: str, new: Tensor, heads: Sequence[int]) -> Tensor:
    past = call.past[number, name]
    operator = "IndexUpdate" if name == STORES[4] and not call.decode else "CacheUpdate"
    present = node(operator, (past, _some(new, heads), call.lengths), past.shape, past.dtype)
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


def _runs(heads: Sequence[int], kv_heads: Sequence[int], group: int) -> tuple[list[int], tuple[int, ...]]:
    """The stored KV heads that these query heads read, by place in the store, and all query heads on them."""
    read = [kv for kv in kv_heads if any(h // group == kv for h in heads)]
    return [kv_heads.index(kv) for kv in read], _heads_on(read, group)


def _of(found: Tensor, heads: Sequence[int], every: Sequence[int]) -> Tensor:
    """The wanted heads of what was computed for all that share their KV heads: keys are read once a KV head."""
    return _some(found, [every.index(h) for h in heads])


@dataclass(frozen=True)
class Rows:
    """Query heads that read KV heads which keep every token."""

    query: Tensor  # [batch, all query heads, rows, head_dim]
    k: Tensor  # [batch, full KV heads, slots, head_dim]; v as well
    v: Tensor
    heads: Sequence[int]  # the query heads that are wanted
    kv_heads: tuple[int, ...]  # the full KV heads
    group: int


def _beside(call: Call, rows: Rows, near: dict[str, Any]) -> Tensor:
    """Local heads on KV heads that keep every token."""
    if not call.decode:
        return _causal(call, rows, near)
    places, every = _runs(rows.heads, rows.kv_heads, rows.group)
    q = _some(rows.query, every)
    found = node("BesideDecode", (q, rows.k, rows.v, call.lengths), q.shape, q.dtype, kv_heads=places, **near)
    return _of(found, rows.heads, every)


def _causal(call: Call, rows: Rows, near: dict[str, Any]) -> Tensor:
    """Rows over all slots of full KV heads: dense, or windowed."""
    places, every = _runs(rows.heads, rows.kv_heads, rows.group)
    if not call.decode and len(every) > len(rows.heads):  # a prompt's rows cost more than a copy of the keys
        places, every = [rows.kv_heads.index(h // rows.group) for h in rows.heads], tuple(rows.heads)
    q = _some(rows.query, every)
    inputs = (q, _some(rows.k, places), _some(rows.v, places), call.lengths)
    return _of(node("CausalAttention", inputs, q.shape, q.dtype, **near), rows.heads, every)


@torch.no_grad()
def _index(rt: LayerRuntime, call: Call, key: Tensor, stores: Stores) -> None:
    """Projected keys of the new tokens into the store."""
    assert rt.indexer is not None
    seen = as_selector_sees(rt, key)
    group = rt.plan.model.group
    own = rt.indexer.keys(_some(seen, [h // group for h in rt.layer.retrieval])).to(key.dtype)
    _append(rt.number, call, STORES[4], own, range(len(rt.layer.retrieval)))


def _chosen(rt: LayerRuntime, call: Call, rows: Rows, scale: float) -> Tensor:
    """A decode row of retrieval heads: choose, or read the choice of the full layer below, and attend."""
    plan, selector, heads = rt.plan, rt.plan.selector, rows.heads
    assert selector is not None
    union = selector.scope == "layer"
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
        call.kept[source] = node("Union", (keep,), (shape[0], 1, shape[2]), torch.bool) if union else keep
    if union:
        places, every = _runs(heads, rows.kv_heads, rows.group)
    else:
        places, every = [rows.kv_heads.index(h // rows.group) for h in heads], tuple(heads)
    q = _some(rows.query, every)
    found = node("ChosenDecode", (q, rows.k, rows.v, call.kept[source]), q.shape, q.dtype, kv_heads=places, scale=scale)
    return _of(found, heads, every)


def _mask(**kwargs: Any) -> None:
    """Transformers' mask interface: the nodes make their own masks."""


AttentionInterface.register(NAME, traced_attention)
AttentionMaskInterface.register(NAME, _mask)
