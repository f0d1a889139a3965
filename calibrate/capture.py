"""What attention sees: q, k, v of every layer of a dense forward, after q/k-norm and rotary embedding.

Captured at Transformers' attention interface, the one place that all families pass through (a hook
on ``q_proj`` misses norms and fused projections).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparsec.plugins.families import attention_modules
from sparsec.plugins.selector import unrotate

NAME = "sparsec_capture"


@dataclass(frozen=True)
class Captured:
    """One layer of one forward call."""

    layer: int
    q: Tensor  # [batch, heads, tokens, head_dim], post-RoPE
    k: Tensor  # [batch, KV heads, tokens, head_dim], post-RoPE
    v: Tensor
    scale: float
    rope: tuple[Tensor, Tensor]
    output: Tensor  # [batch, tokens, heads, head_dim]

    def before_rope(self) -> tuple[Tensor, Tensor]:
        """q and k as the rotary embedding received them, float32."""
        return unrotate(self.q, *self.rope), unrotate(self.k, *self.rope)


def _forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    output, weights = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    note, layer, rope = module.sparsec_capture  # type: ignore[misc]
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    note(Captured(layer, query, key, value, scale, rope, output))
    return output, weights


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def capturing(model: Any, note: Callable[[Captured], None]) -> Iterator[None]:
    """Inside the block every attention call of ``model`` is reported to ``note``, layer by layer."""
    dense = model.config._attn_implementation
    hooks = []

    def remember(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            object.__setattr__(module, "sparsec_capture", (note, layer, kwargs.get("position_embeddings")))

        return hook

    for layer, module in enumerate(attention_modules(model)):
        hooks.append(module.register_forward_pre_hook(remember(layer), with_kwargs=True))
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in attention_modules(model):
            module.__dict__.pop("sparsec_capture", None)
        model.set_attn_implementation(dense)


@torch.no_grad()
def capture(model: Any, tokens: Tensor, note: Callable[[Captured], None], positions: Tensor | None = None) -> None:
    """Run the decoder (no head) over [batch, length] token ids and report every layer.

    positions: [length], ascending, where they are not 0, 1, 2 and so on.
    """
    ids = tokens.to(model.device)
    placed = {}
    if positions is not None:
        # The mask says that all is one sequence: Transformers takes a jump in the positions for the next one's start.
        placed = {"position_ids": positions.to(ids.device)[None], "attention_mask": torch.ones_like(ids)}
    with capturing(model, note):
        model.get_decoder()(input_ids=ids, use_cache=False, **placed)
