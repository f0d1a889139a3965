"""Runs a plan on a model with indexers of its own (DeepSeek sparse attention): sharing, HISA, MISA.

The model's classes stay. Each attention module's indexer answers as the plan says, by its own weights or with the set
of the nearest full layer below for the same forward call; attention is on the chosen tokens, seen by
``Step.observe``. The cache is Transformers' own: a shared layer puts no index key into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sparsec.errors import PlanError
from sparsec.plan import Plan
from sparsec.plugins.dsa_choice import choose
from sparsec.plugins.families import attention_modules, family_of
from sparsec.plugins.masked import ROWS
from sparsec.plugins.step import Selection, Step

NAME = "sparsec_dsa"
Rope = tuple[Tensor, Tensor]
PARTS = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")


@dataclass
class DsaRuntime:
    """A layer's plan, and this call's step."""

    plan: Plan
    number: int
    step: Step | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Where the step keeps this layer's set: int32 [batch, rows, top_k]."""
        return self.plan.index_source(self.number), 0


class SharedIndex(nn.Module):
    """A shared layer's answer, with no weights: what the nearest full layer below chose in this call."""

    def __init__(self, runtime: DsaRuntime) -> None:
        super().__init__()
        self.runtime = runtime

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The set, [batch, rows, top_k]."""
        assert self.runtime.step is not None
        return self.runtime.step.index_sets[self.runtime.key]


def check(model: nn.Module, plan: Plan) -> None:
    """The plan names indexers where the model has them, and choosing as many tokens as they do.

    Raises:
        PlanError: it does not.
    """
    config: Any = model.config
    if (plan.dsa is None) != (family_of(config).dsa is None):
        raise PlanError(f"plan and model do not agree that {config.model_type} has indexers of its own: compile again")
    if plan.dsa is None:
        return
    sizes = (plan.dsa.top_k, plan.dsa.heads, plan.dsa.dim)
    if sizes != (config.index_topk, config.index_n_heads, config.index_head_dim):
        raise PlanError("the plan's indexers are not the model's: use the checkpoint it was compiled from")
    for number, module in enumerate(attention_modules(model)):
        if plan.layers[number].index == "full" and not has_indexer(module):
            raise PlanError(f"layer {number} is to choose keys, the model has no indexer there: compile again")


def has_indexer(module: Any) -> bool:
    """Of its own, with weights."""
    return module.indexer is not None and not isinstance(module.indexer, SharedIndex)


def install(model: nn.Module, plan: Plan) -> None:
    """Let the model's indexers answer as the plan says. Weights are not touched."""
    interleaved = family_of(model.config).dsa == "interleaved"
    for number, module in enumerate(attention_modules(model)):
        runtime = DsaRuntime(plan, number)
        object.__setattr__(module, "sparsec", runtime)
        indexer, shared = module.indexer, SharedIndex(runtime)
        if indexer is None:
            module.indexer = shared
        else:
            own = plan.layers[number].index == "full"
            object.__setattr__(indexer, "forward", _Own(indexer, runtime, interleaved) if own else shared.forward)


def uninstall(model: nn.Module) -> None:
    """Back to the model's own ways."""
    for module in attention_modules(model):
        if isinstance(module.indexer, SharedIndex):
            del module.indexer
            module.indexer = None  # type: ignore[assignment]
        else:
            module.indexer.__dict__.pop("forward", None)


@dataclass
class _Own:
    """A full layer's answer."""

    indexer: Any
    runtime: DsaRuntime
    interleaved: bool

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: Rope,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        weights = dict(self.indexer.named_parameters())
        q, w = index_queries(weights, hidden_states, q_resid, position_embeddings, self.interleaved)
        k = index_keys(weights, hidden_states, position_embeddings, self.interleaved)
        if past_key_values is not None:
            k = past_key_values.update_indexer(k, self.indexer.layer_idx)
        visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        dsa, step = self.runtime.plan.dsa, self.runtime.step
        assert dsa is not None
        visible = visible.expand(q.shape[0], -1, -1)
        found = choose(q, k, w, visible, dsa)
        if step is not None:
            step.index_sets[self.runtime.key] = found
            if step.beside is not None:
                step.index_sets[self.runtime.number, 1] = choose(q, k, w, visible, step.beside)
        return found


def index_queries(
    weights: Mapping[str, Any], hidden: Tensor, q_latent: Tensor, rope: Rope, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Queries and head weights of an indexer, scales inside, float32; differentiable in ``weights``.

    Args:
        weights: its parameters by name (:data:`PARTS`).
        hidden: [batch, rows, hidden], as attention receives them; q_latent: [batch, rows, q_lora_rank].
        rope: cos and sin, [batch, rows, rotary dim].
        interleaved: rotary dimensions are paired with their neighbour, not with the other half.

    Returns:
        q [batch, rows, heads, dim] and w [batch, rows, heads].
    """
    dim, mixed = weights["wk.weight"].shape[0], weights["weights_proj.weight"]
    q = F.linear(q_latent, weights["wq_b.weight"])
    q = q.view(*q.shape[:2], -1, dim)
    w = F.linear(hidden.to(mixed.dtype), mixed)
    return rotated(q, rope, interleaved).float() * dim**-0.5, w.float() * q.shape[2] ** -0.5


def index_keys(weights: Mapping[str, Any], hidden: Tensor, rope: Rope, interleaved: bool) -> Tensor:
    """Its keys, [batch, tokens, dim]; see :func:`index_queries`."""
    k = F.linear(hidden, weights["wk.weight"])
    k = F.layer_norm(k, k.shape[-1:], weights["k_norm.weight"], weights["k_norm.bias"], 1e-6)
    return rotated(k[:, :, None], rope, interleaved)[:, :, 0]


def rotated(x: Tensor, rope: Rope, interleaved: bool) -> Tensor:
    """The rotary embedding on the first dimensions of [batch, tokens, heads, dim]."""
    size = rope[0].shape[-1]
    cos, sin = (table[:, :, None, : size // 2] for table in rope)
    part, rest = x[..., :size], x[..., size:]
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    # A score sums over all dimensions, so queries and keys may leave the pairs in any order that both use.
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def dsa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: exact attention on the tokens that the indexer chose.

    Args:
        module: the attention module; ``module.sparsec`` is its :class:`DsaRuntime`.
        query, key: [batch, heads, rows or tokens, qk dim]; value: [batch, heads, tokens, v dim].
        attention_mask: bool [batch, 1, rows, tokens], causal and padding.
        indices: int32 [batch, rows, top_k].

    Returns:
        [batch, rows, heads, v dim] and None for the weights.

    Raises:
        ValueError: no plan on the model.
    """
    runtime: DsaRuntime | None = getattr(module, "sparsec", None)
    if runtime is None or indices is None or attention_mask is None:
        raise ValueError("attn_implementation='sparsec_dsa' needs a plan: load the artifact with sparsec.load(path)")
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    visible = visible.expand(query.shape[0], -1, -1, -1)
    keep = kept(indices, visible)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    for seen in _observed(runtime, query, key, keep, visible, scale):
        assert runtime.step is not None
        assert runtime.step.observe is not None
        runtime.step.observe(seen)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, scale=scale)
    return found.transpose(1, 2), None


def kept(indices: Tensor, visible: Tensor) -> Tensor:
    """An index set, [batch, rows, top_k], as bool [batch, 1, rows, keys]; a row keeps nothing that it does not see."""
    return torch.zeros_like(visible).scatter_(-1, indices[:, None].long(), True) & visible


def _observed(
    runtime: DsaRuntime, q: Tensor, k: Tensor, keep: Tensor, visible: Tensor, scale: float
) -> Iterator[Selection]:
    """Decode rows, tile by tile, for who asked to see them."""
    step = runtime.step
    if step is None or step.observe is None or not step.decode:
        return
    rows, keys = keep.shape[2:]
    other = step.index_sets.get((runtime.key[0], 1))
    beside = kept(other, visible) if other is not None else None
    real = visible[:, 0, -1]
    k_pos = torch.where(real, real.long().cumsum(1) - 1, -1)
    for start in range(step.prompt, rows, ROWS):
        part = slice(start, min(start + ROWS, rows))
        seen = keys - rows + part.stop
        yield Selection(
            runtime.number,
            tuple(range(q.shape[1])),
            q[:, :, part],
            k[:, :, :seen],
            keep[:, :, part, :seen],
            visible[:, :, part, :seen],
            scale,
            runtime.plan,
            k_pos[:, keys - rows + part.start : seen],
            k_pos[:, :seen],
            beside=beside[:, :, part, :seen] if beside is not None else None,
        )


AttentionInterface.register(NAME, dsa_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
