"""The dense side of ``sparsec bench``: PyTorch's fastest attention, with a cache allocated ahead.

On a GPU every backend that PyTorch has is tried, for the prompt and for the steps apart; the fastest of each counts and
is named, and what could not run is said. Transformers would make masks there, which rule the fastest backends out, and
copy KV heads: :func:`plain_attention` does neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin, DynamicCache

PLAIN = "sparsec_plain"
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class DenseLayer(CacheLayerMixin):
    """Keys and values of one layer, allocated ahead: [batch, KV heads, room, head_dim]."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first tokens say batch, heads, dtype and device."""
        batch, heads, _, dim = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.room, dim)
        self.values = value_states.new_empty(batch, heads, self.room, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, without a copy."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.length + key_states.shape[2]
        self.keys[:, :, self.length : stop] = key_states
        self.values[:, :, self.length : stop] = value_states
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover everything."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No more than was allocated."""
        return self.room


def dense_cache(model: Any, room: int) -> DynamicCache:
    """An empty cache with room for so many tokens."""
    cache = DynamicCache(config=model.config)
    cache.layer_class_to_replicate = None
    cache.layers = [DenseLayer(room) for _ in range(model.config.num_hidden_layers)]
    return cache


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of new rows over all keys by the backend at hand: no mask is made, no KV head copied.

    Transformers' attention interface: query [batch, heads, rows, head_dim], key and value [batch, KV heads, keys,
    head_dim]. Rows behind a filled cache run on flash attention, whose causal mask ends at the last key. For models
    without sliding windows of their own.
    """
    rows = query.shape[2]
    if 1 < rows < key.shape[2]:
        call = torch.ops.aten._scaled_dot_product_flash_attention
        return call(query, key, value, 0.0, True, scale=scaling)[0].transpose(1, 2), None
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=rows > 1, scale=scaling, enable_gqa=True
    )
    return found.transpose(1, 2), None


AttentionInterface.register(PLAIN, plain_attention)  # and no mask of that name, so that none is made
