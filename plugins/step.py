"""What the layers of one forward call share, what an observer sees of them, and a layer's plan worked out once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsec.plan import Dsa, LayerPlan, Plan
from sparsec.plugins.cache import SparseLayer
from sparsec.plugins.masked import Picked
from sparsec.plugins.selector import Indexer

if TYPE_CHECKING:
    from sparsec.plugins.kernels.blocks import Lists
    from sparsec.plugins.kernels.cache import KernelLayer, Tables
    from sparsec.plugins.kernels.picked import Listed


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
    plan: Plan
    q_pos: Tensor  # [batch, rows] token numbers, -1 padding
    k_pos: Tensor  # [batch, keys]
    scores: Callable[[], Tensor] | None = None  # of decode rows, before softmax and mask; None in a shared layer
    beside: Tensor | None = None  # as ``keep``: what Step.beside would keep

    def weights(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The true attention of these rows over all that they see: [batch, heads, rows, keys], float32."""
        logits = (self.q[:, :, rows].float() @ self.k.float().transpose(-1, -2)) * self.scale
        return logits.masked_fill(~self.visible[:, :, rows], float("-inf")).softmax(-1)


@dataclass
class Step:
    """What the layers of one forward call share. Made anew for every call, so no index set outlives its query."""

    decode: bool
    prompt: int = 0  # where decode: the call's first so many rows are prefill rows all the same
    commit: bool = True  # False: the cache is read, not written
    observe: Callable[[Selection], None] | None = None
    observe_prefill: Callable[[Selection], None] | None = None  # prefill rows, where the selector chooses for them
    # By layer and the tile's first column of ``positions``: kept keys, or of prefill rows kept key blocks.
    index_sets: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    beside: Dsa | None = None  # observers also see what a model's own indexers would choose in this way
    positions: Tensor | None = None  # [batch, keys] token numbers, -1 padding
    keep: Tensor | None = None  # bool [batch, rows]: tokens that no router sends away
    real: Tensor | None = None  # bool [batch, rows]: False is padding, which runs nothing; None: there is none
    observe_paths: Callable[[int, str, Tensor], None] | None = None  # layer, unit, bool [batch, rows]: runs it
    padded: bool | None = None  # some of them are
    masks: dict[Any, Tensor] = field(default_factory=dict)  # of whole prompts' windows
    # On the kernels, by layer: what a decode row keeps by, and the blocks that a prompt's groups keep.
    kernel_sets: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    kernel_lists: dict[int, list[Lists]] = field(default_factory=dict)


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
    order: Tensor | None  # each head's place among evicted, windowed and retrieval heads in a row; None: its number
    evicted_on: Tensor  # each evicted head's place among the local KV heads
    windowed_on: Tensor  # and of the others among the full ones
    retrieval_on: Tensor
    retrieval_kv: tuple[int, ...]  # the KV head that each of them reads
    picked: Picked | Listed | None = None  # this call's query rows, where they are not the last ones (routing.py)
    away: Tensor | None = None  # bool [batch, rows]: decode rows of this call that were routed away
    rope: tuple[Tensor, Tensor] | None = None  # this call's cos, sin
    cache: SparseLayer | KernelLayer | None = None  # this call's cache
    step: Step | None = None
    tables: Tables | None = None  # of the kernels: which heads they run


def layer_runtime(plan: Plan, number: int, indexer: Indexer | None, device: torch.device) -> LayerRuntime:
    """Sort a layer's heads by what they need."""
    layer, group = plan.layers[number], plan.model.group
    local_kv = layer.local_kv_heads(group)
    full_kv = tuple(k for k in range(plan.model.kv_heads) if k not in local_kv)

    def tensor(heads: tuple[int, ...]) -> Tensor:
        return torch.tensor(heads, dtype=torch.long, device=device)

    evicted = tuple(h for h in layer.local if h // group in local_kv)
    windowed = tuple(h for h in layer.local if h // group in full_kv)
    row = (*evicted, *windowed, *layer.retrieval)
    return LayerRuntime(
        plan=plan,
        number=number,
        layer=layer,
        indexer=indexer,
        local_kv=tensor(local_kv),
        full_kv=tensor(full_kv),
        evicted=tensor(evicted),
        windowed=tensor(windowed),
        retrieval=tensor(layer.retrieval),
        order=tensor(tuple(map(row.index, range(len(row))))) if row != tuple(range(len(row))) else None,
        evicted_on=tensor(tuple(local_kv.index(h // group) for h in evicted)),
        windowed_on=tensor(tuple(full_kv.index(h // group) for h in windowed)),
        retrieval_on=tensor(tuple(full_kv.index(h // group) for h in layer.retrieval)),
        retrieval_kv=tuple(h // group for h in layer.retrieval),
    )


def token_numbers(mask: Tensor | None, batch: int, total: int, device: torch.device) -> Tensor:
    """Number the real tokens of each row from 0; padding is -1. [batch, total]."""
    if mask is None:
        return torch.arange(total, device=device).expand(batch, total)
    if mask.shape[1] != total:
        raise ValueError(f"the attention mask covers {mask.shape[1]} tokens, cache and input hold {total}")
    real = mask.to(device=device, dtype=torch.long)
    return torch.where(real > 0, real.cumsum(1) - 1, -1)
