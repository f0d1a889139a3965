"""The cache of one layer under a plan: what local KV heads may forget is really gone.

A Transformers ``Cache`` is a list of layer caches; :func:`plugins.runtime` fills an empty one with these. Each holds

    full KV heads    every token,                   [batch, full KV heads, tokens, head_dim]
    local KV heads   sinks and window, a ring,      [batch, local KV heads, sinks + window, head_dim]
    index keys       Wk k of every token,           [batch, retrieval heads, tokens, rank], or in fp8 rank + 1 bytes
    index means      of a coarse level,             [batch, retrieval heads, blocks, rank]
    dropped          where the window compensates: sums of what local heads no longer see, float32,
                     [batch, KV heads, head_dim], a key and a value a KV head that a local head reads

Keys keep the rotary embedding of their original position. Token numbers count real tokens per row (padding is -1), so
left or right padding changes nothing. Token t of the ring lives in slot t if t < sinks, else sinks + (t - sinks) mod
window. Until every row has more than max(min_context, sinks + window) tokens nothing is forgotten, because below
``min_context`` local heads are dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsec.plan import Window
from sparsec.plugins.compensation import Dropped, ends_of


class LocalStore:
    """Keys and values of local KV heads, evicted to sinks and window; where it compensates, the sums of the evicted."""

    def __init__(self, window: Window, min_context: int) -> None:
        self.window = window
        self.min_context = min_context
        self.keys: Tensor | None = None  # [batch, local KV heads, slots, head_dim]
        self.values: Tensor | None = None
        self.pos: Tensor | None = None  # [batch, slots] token numbers, -1: empty or padding
        self.ring = False  # slots follow the ring's order, not time
        self.dropped: Dropped | None = None

    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored, in no order of time: keys, values, token numbers."""
        if self.keys is None or self.values is None or self.pos is None:
            raise ValueError("nothing is stored yet")
        return self.keys, self.values, self.pos

    def joined(self, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored and the new tokens, in order of time: keys, values, token numbers. Nothing is stored."""
        if self.keys is None:
            return k, v, pos
        keys, values, old = self.stored()
        if self.ring:
            old, order = old.sort(dim=-1, stable=True)
            keys, values = _take(keys, order), _take(values, order)
        return torch.cat((keys, k), 2), torch.cat((values, v), 2), torch.cat((old, pos), 1)

    def write_one(self, k: Tensor, v: Tensor, pos: Tensor) -> bool:
        """Overwrite the slot of the one oldest token of each row; False if this is not a full ring yet."""
        if not self.ring or bool((pos < 0).any()):
            return False
        keys, values, old = self.stored()
        self._sum_dropped(keys, values, old, pos)
        slot = self._slot(pos)  # [batch, 1]
        at = slot[:, None, :, None].expand(k.shape)
        keys.scatter_(2, at, k)
        values.scatter_(2, at, v)
        old.scatter_(1, slot, pos)
        return True

    def store(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """Keep what later queries may see of ``joined``'s answer."""
        capacity = self.window.sinks + self.window.size
        lengths = pos.amax(1) + 1  # [batch] real tokens of each row so far
        if pos.shape[1] <= capacity or int(lengths.min()) <= self.min_context:
            self.keys, self.values, self.pos, self.ring = k, v, pos, False
            return
        self._sum_dropped(k, v, pos, lengths[:, None] - 1)
        live = (pos >= 0) & ((pos < self.window.sinks) | (pos >= lengths[:, None] - self.window.size))
        # Where each slot's token is now; the last column swallows what is forgotten.
        source = torch.full((pos.shape[0], capacity + 1), -1, dtype=torch.long, device=pos.device)
        slot = torch.where(live, self._slot(pos), capacity)
        source.scatter_(1, slot, torch.arange(pos.shape[1], device=pos.device).expand_as(pos))
        source = source[:, :capacity]
        at = source.clamp_min(0)
        self.keys, self.values = _take(k, at), _take(v, at)
        self.pos = torch.where(source >= 0, pos.gather(1, at), -1)
        self.ring = True

    def _sum_dropped(self, k: Tensor, v: Tensor, pos: Tensor, last: Tensor) -> None:
        """Add what the rows ``last``, [batch, 1], drop of what is stored."""
        if self.window.compensate:
            dropped = self.dropped or Dropped.none(k, k.shape[1], self.window.sinks)
            self.dropped = dropped.through(k, v, pos, ends_of(last, self.window, self.min_context))[2]

    def _slot(self, pos: Tensor) -> Tensor:
        sinks, size = self.window.sinks, self.window.size
        return torch.where(pos < sinks, pos, sinks + (pos - sinks) % size)


class PlanLayer(CacheLayerMixin):
    """What Transformers asks of a layer's cache under a plan. The attention function reads and writes it."""

    length: int  # columns seen, padding included

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: stores are made with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values, unchanged: they are only passed on."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what generate() counts, not what is resident."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover everything seen; the attention function turns them into token numbers."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes resident: keys, values, index keys and sums as allocated."""
        return sum(getattr(owner, name).untyped_storage().nbytes() for owner, name in self._held())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        self._map(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def crop(self, max_length: int) -> None:
        """Evicted tokens cannot come back."""
        raise ValueError(
            "a sparsec cache cannot be cropped, local heads have forgotten: run assisted decoding on the dense model"
        )

    def _held(self) -> list[tuple[Any, str]]:
        """Every tensor that is held, as its owner and its name there."""
        raise NotImplementedError

    def _map(self, change: Any) -> None:
        for owner, name in self._held():
            setattr(owner, name, change(getattr(owner, name)))


class SparseLayer(PlanLayer):
    """One layer's cache of the reference: it grows with every call."""

    def __init__(self, window: Window | None, min_context: int) -> None:
        super().__init__()
        self.length = 0
        self.full_keys: Tensor | None = None
        self.full_values: Tensor | None = None
        self.index_keys: Tensor | None = None
        self.index_means: Tensor | None = None
        self.dropped: Dropped | None = None  # by local query heads on full KV heads
        self.local = LocalStore(window, min_context) if window else None

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.full_keys = self.full_values = self.index_keys = self.index_means = self.dropped = None
        if self.local is not None:
            self.local = LocalStore(self.local.window, self.local.min_context)

    def _held(self) -> list[tuple[Any, str]]:
        """Every tensor that is held, as its owner and its name there."""
        owners: list[tuple[Any, tuple[str, ...]]] = [(self, ("full_keys", "full_values", "index_keys", "index_means"))]
        if self.local is not None:
            owners.append((self.local, ("keys", "values", "pos")))
        for dropped in (self.dropped, self.local.dropped if self.local is not None else None):
            if dropped is not None:
                owners.append((dropped, ("keys", "values", "upto")))
        return [(owner, name) for owner, names in owners for name in names if getattr(owner, name) is not None]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of [batch, heads, tokens, dim] by [batch, chosen] token index."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
