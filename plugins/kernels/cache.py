"""The cache of one layer for the kernels: allocated ahead, in order of token numbers, lengths on the device.

    full KV heads    every token,        [batch, full KV heads, slots, head_dim]; token n in slot n
    local KV heads   sinks and a ring,   [batch, local KV heads, sinks + ring, head_dim]; see :func:`slot_of`
    index keys       Wk k of every token [batch, retrieval heads, slots, rank]; in fp8 the exponents of their scales
                     apart, [batch, retrieval heads, slots, 1]
    index means      of a coarse level   [batch, retrieval heads, blocks, rank]

The ring holds the window, or all tokens that are dense up to ``min_context`` if those are more. Padding is not stored:
each sequence has its own length, ``lengths``, which decode steps read and count on the device. ``length`` counts
columns, padding included, on the host, so that nothing waits for the device.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from sparsec.plan import Plan, Window
from sparsec.plugins.cache import PlanLayer
from sparsec.plugins.kernels.coarse import means_of_prompt
from sparsec.plugins.kernels.decode import groups_of

LEAST = 1024  # slots; more are taken in doubles


class KernelLayer(PlanLayer):
    """Stores and tables of one layer. ``plan`` and ``number`` say which."""

    def __init__(self, plan: Plan, number: int) -> None:
        super().__init__()
        self.plan, self.number = plan, number
        layer, group = plan.layers[number], plan.model.group
        self.local_kv = layer.local_kv_heads(group)
        self.full_kv = tuple(kv for kv in range(plan.model.kv_heads) if kv not in self.local_kv)
        self.window = plan.window or Window(size=1, sinks=0)  # none: every head is a retrieval head
        self.sinks = self.window.sinks
        self.ring = max(self.window.size, plan.min_context - self.sinks)
        self.length = self.slots = 0
        self.lengths: Tensor | None = None  # int32 [batch]
        self._block = plan.selector.block if plan.selector is not None else 1
        self.means: Tensor | None = None  # [batch, retrieval heads, blocks, rank], of a coarse level
        self.scales: Tensor | None = None  # uint8 [batch, retrieval heads, slots, 1]

    def prepare(self, k: Tensor, rank: int, more: int) -> None:
        """Room for ``more`` columns like k, [batch, KV heads, rows, head_dim]."""
        needed = self.length + more
        if self.lengths is None:
            batch, _, _, dim = k.shape
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=k.device)
            shape = (batch, len(self.local_kv), self.sinks + self.ring, dim)
            self.near_keys, self.near_values = k.new_zeros(shape), k.new_zeros(shape)
            shape = (batch, len(self.full_kv), 0, dim)
            self.far_keys, self.far_values = k.new_zeros(shape), k.new_zeros(shape)
            scored = len(self.plan.layers[self.number].retrieval) if rank else 0
            fp8 = self.plan.selector is not None and self.plan.selector.index_dtype == "fp8"
            dtype = torch.uint8 if fp8 else k.dtype
            self.index = k.new_zeros(batch, scored, 0, max(1, rank), dtype=dtype)
            self.scales = k.new_zeros(batch, scored, 0, 1, dtype=dtype) if fp8 else None
            coarse = rank and self.plan.selector is not None and self.plan.selector.coarse is not None
            self.means = k.new_zeros(batch, scored, 0, rank) if coarse else None
        if needed > self.slots:
            self.reserve(max(LEAST, 2 * self.slots, needed) if self.length else max(LEAST, needed + LEAST))

    def reserve(self, slots: int) -> None:
        """Room for so many tokens a sequence; what is stored stays."""
        if slots <= self.slots:
            return
        keep = self.slots
        self.slots = -(-slots // LEAST) * LEAST
        # One slot more: padding is written there.
        self.far_keys = _grown(self.far_keys, keep, self.slots + 1)
        self.far_values = _grown(self.far_values, keep, self.slots + 1)
        self.index = _grown(self.index, keep, self.slots + 1)
        if self.scales is not None:
            self.scales = _grown(self.scales, keep, self.slots + 1)
        if self.means is not None:
            self.means = _grown(self.means, keep // self._block, self.slots // self._block)

    def slot_of(self, token: Tensor) -> Tensor:
        """Where local KV heads hold a token."""
        return torch.where(token < self.sinks, token, self.sinks + (token - self.sinks) % self.ring)

    def recent(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What local KV heads hold, in order of time: keys, values, and the window kernel's two offsets."""
        assert self.lengths is not None
        stored = min(self.length, self.sinks + self.ring)
        shift = self.lengths - stored  # negative where a sequence is shorter: it stands at the right
        column = torch.arange(stored, device=shift.device)
        token = column + shift[:, None]
        token = torch.where((shift[:, None] > 0) & (column < self.sinks), column, token)
        at = self.slot_of(token.clamp_min(0))[:, None, :, None]
        at = at.expand(-1, len(self.local_kv), -1, self.near[0].shape[3])
        return self.near[0].gather(2, at), self.near[1].gather(2, at), shift.clamp_max(0), shift

    def store(self, k: Tensor, v: Tensor, index: Tensor | None, number: Tensor, padded: bool) -> None:
        """New tokens of a prompt.

        Args:
            k, v: [batch, KV heads, rows, head_dim]; index: [batch, retrieval heads, rows, ...] or None, as
                :func:`sparsec.plugins.index_keys.stored` gives them.
            number: int [batch, rows], token numbers, -1 where a row is padding.
            padded: some row is.
        """
        assert self.lengths is not None
        rows = k.shape[2]
        stores = [
            (store[:, place], new[:, kv])
            for store, new in zip(self.far, (k, v), strict=True)
            for place, kv in enumerate(self.full_kv)
        ]
        if index is not None:
            stores += [
                pair
                for store, part in self._index_parts(index)
                for pair in zip(store.unbind(1), part.unbind(1), strict=True)
            ]
        slot = torch.where(number >= 0, number, self.slots)
        for store, new in stores:  # [batch, slots, …] and [batch, rows, …]
            if not padded:
                store[:, self.length : self.length + rows] = new
            else:
                for b in range(len(k)):
                    store[b].index_copy_(0, slot[b], new[b])
        after = torch.maximum(self.lengths, (number.amax(1) + 1).to(torch.int32))
        if self.local_kv:
            local, begin, sinks = list(self.local_kv), 0, 0
            if not padded:  # what is neither a sink nor among the newest is not even copied
                begin = max(0, rows - self.ring)
                sinks = max(0, min(self.sinks - self.length, begin))
            k, v = (torch.cat((x[:, local, :sinks], x[:, local, begin:]), 2) for x in (k, v))
            self._store_recent(k, v, torch.cat((number[:, :sinks], number[:, begin:]), 1), after, padded)
        if index is not None and self.means is not None:  # padded sequences differ, so all their blocks are looked at
            start, stop = 0 if padded else self.length // self._block, (self.length + rows) // self._block
            keys = self.index_of(slice(start * self._block, stop * self._block))
            means_of_prompt(keys, self.means, self._block, start, stop)
        self.lengths.copy_(after)
        self.length += rows

    def store_index(self, slots: slice, index: Tensor) -> None:
        """Put index keys, as :func:`sparsec.plugins.index_keys.stored` gives them, into these slots."""
        for store, part in self._index_parts(index):
            store[:, :, slots] = part

    def index_of(self, slots: slice) -> Tensor:
        """What these slots hold, as :func:`sparsec.plugins.index_keys.stored` gave it."""
        keys = self.index[:, :, slots]
        return keys if self.scales is None else torch.cat((keys, self.scales[:, :, slots]), 3)

    def _index_parts(self, index: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The stores, and what of each key belongs there."""
        rank = self.index.shape[3]
        scales = [(self.scales, index[..., rank:])] if self.scales is not None else []
        return [(self.index, index[..., :rank]), *scales]

    def _store_recent(self, k: Tensor, v: Tensor, number: Tensor, after: Tensor, padded: bool) -> None:
        """Sinks, and the newest ``ring`` tokens: no slot is written twice, so the order of writing does not matter."""
        live = (number >= 0) & ((number < self.sinks) | (number >= after[:, None] - self.ring))
        slot = self.slot_of(number.clamp_min(0))
        if not padded:  # all of them, and nothing waits for the device
            for store, new in zip(self.near, (k, v), strict=True):
                store.scatter_(2, slot[:, None, :, None].expand(new.shape), new)
            return
        for b in range(len(k)):
            columns = live[b].nonzero()[:, 0]
            for store, new in zip(self.near, (k, v), strict=True):
                store[b].index_copy_(1, slot[b, columns], new[b, :, columns])

    def reset(self) -> None:
        """Forget everything."""
        self.length = self.slots = 0
        self.lengths = None

    def _held(self) -> list[tuple[Any, str]]:
        names = ["lengths", "near_keys", "near_values", "far_keys", "far_values", "index"]
        names += [name for name in ("scales", "means") if getattr(self, name) is not None]
        return [(self, name) for name in names] if self.lengths is not None else []

    @property
    def near(self) -> tuple[Tensor, Tensor]:
        """Keys and values of local KV heads."""
        return self.near_keys, self.near_values

    @property
    def far(self) -> tuple[Tensor, Tensor]:
        """Keys and values of full KV heads."""
        return self.far_keys, self.far_values


class Tables:
    """Which heads a layer's kernels run, as tables on the device; made once for a plan."""

    def __init__(self, plan: Plan, number: int, device: torch.device) -> None:
        layer, group = plan.layers[number], plan.model.group
        local_kv = layer.local_kv_heads(group)
        place = {kv: -1 - i for i, kv in enumerate(local_kv)}
        place |= {kv: i for i, kv in enumerate(kv for kv in range(plan.model.kv_heads) if kv not in local_kv)}

        def ints(values: Any) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        def grouped(heads: list[int]) -> tuple[Tensor, Tensor]:
            by: dict[int, list[int]] = {}
            for head in heads:
                kv = place[head // group]
                by.setdefault(kv if kv >= 0 else -1 - kv, []).append(head)
            return groups_of(by, device)

        self.heads = plan.model.heads
        self.kv_place = ints(place[kv] for kv in range(plan.model.kv_heads))
        evicted = [h for h in layer.local if h // group in local_kv]
        windowed = [h for h in layer.local if h // group not in local_kv]
        self.retrieval_kv_heads = [h // group for h in layer.retrieval]
        self.retrieval, self.retrieval_kv = ints(layer.retrieval), ints(self.retrieval_kv_heads)
        self.near, self.beside = grouped(evicted), grouped(windowed)
        self.windowed = (torch.cat([self.near[0], self.beside[0]]), torch.cat([self.near[1], self.beside[1]]))
        # Prefill: heads, and the KV head that each reads, in the call's own keys or in the store (``places``).
        self.near_heads = (ints(evicted), ints(h // group for h in evicted))
        self.near_places = (ints(evicted), ints(-1 - place[h // group] for h in evicted))
        self.beside_heads = (ints(windowed), ints(h // group for h in windowed))
        self.beside_places = (ints(windowed), ints(place[h // group] for h in windowed))
        self.retrieval_places = ints(place[h // group] for h in layer.retrieval)
        # Sets of kept items, each of so many retrieval heads, which lie one behind the other.
        scope = plan.selector.scope if plan.selector is not None else "head"
        of = {"head": list(range(len(layer.retrieval))), "kv_head": self.retrieval_kv_heads}
        alike = of.get(scope, [0] * len(layer.retrieval))
        sizes = Counter(alike)
        self.most = max(sizes.values(), default=1)
        self.first, self.members = ints(alike.index(one) for one in sizes), ints(sizes.values())
        numbers = {one: number for number, one in enumerate(sizes)}
        self.list_of = ints(numbers[one] for one in alike)  # of prompts' block lists
        if scope == "head":
            rows = [[h] + [-1] * 15 for h in layer.retrieval]
            self.chosen = (torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 16), self.retrieval_places)
            self.sets = self.list_of
        else:
            self.chosen = grouped(list(layer.retrieval))
            by_place = {place[h // group]: numbers[one] for h, one in zip(layer.retrieval, alike, strict=True)}
            self.sets = ints(by_place[where] for where in self.chosen[1].tolist())
        self._shares: dict[tuple[int, int], Tensor] = {}

    def shares(self, local: int, retrieval: int) -> Tensor:
        """How many partial results each query head has: int32 [heads]."""
        if (local, retrieval) not in self._shares:
            table = torch.full((self.heads,), local, dtype=torch.int32, device=self.retrieval.device)
            self._shares[local, retrieval] = table.index_fill_(0, self.retrieval.long(), retrieval)
        return self._shares[local, retrieval]


def _grown(x: Tensor, keep: int, slots: int) -> Tensor:
    out = x.new_zeros(*x.shape[:2], slots, x.shape[3])
    out[:, :, :keep] = x[:, :, :keep]
    return out


__all__ = ["KernelLayer", "Tables"]
