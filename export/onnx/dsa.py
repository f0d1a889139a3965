"""Models with indexers of their own (DSA) as they are traced: attention on latents, and how their keys are chosen.

Attention is traced in its absorbed form, by the model's own weights: queries are brought to the latents, of which
there is one a token for all heads, and what they read is brought back. It means the same as keys and values of every
head, and a decode row reads the latents that it chose and no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.export.onnx.attention import STORES, Call, append, node
from sparsec.plan import Dsa, Plan
from sparsec.plugins.dsa import index_keys, index_queries, rotated
from sparsec.plugins.families import attention_modules, family_of

INDEX, LATENTS = STORES[4:]
MASKED = "masked: {} score every token and drop what is left out, no time is saved"


def shapes(plan: Plan, number: int, config: Any, batch: Any, slots: Any) -> dict[str, tuple[Any, ...]]:
    """The stores of a layer: latents with the rotary part of the key behind them, and index keys of full layers."""
    assert plan.dsa is not None
    found = {LATENTS: (batch, 1, slots, config.kv_lora_rank + config.qk_rope_head_dim)}
    if plan.layers[number].index == "full":
        found[INDEX] = (batch, 1, slots, plan.dsa.dim)
    return found


def masked(dsa: Dsa) -> str | None:
    """What of a plan costs what it would without, as a note; None: nothing."""
    names = [name for name, there in (("HISA", dsa.hisa), ("MISA", dsa.misa)) if there is not None]
    return MASKED.format(" and ".join(names)) if names else None


@contextmanager
def latents_traced(model: Any) -> Iterator[None]:
    """Inside the block attention and mixtures of experts of such a model are traced so; nothing is done to others."""
    own: dict[nn.Module, Any] = {}
    if model.sparsec_plan.dsa is not None:
        own |= dict.fromkeys(attention_modules(model), _attention)
        own |= dict.fromkeys((module for module in model.modules() if _mixes(module)), _experts)
    for module, traced in own.items():
        object.__setattr__(module, "forward", partial(traced, module))
    try:
        yield
    finally:
        for module in own:
            del module.__dict__["forward"]


def _mixes(module: nn.Module) -> bool:
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in ("gate_up_proj", "down_proj"))


def _experts(module: Any, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """x: [tokens, width]; experts, weights: [tokens, experts a token]."""
    return node("Experts", (x, experts, weights, module.gate_up_proj, module.down_proj), x.shape, x.dtype)


def _attention(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
) -> tuple[Tensor | None, ...]:
    """An attention module's forward; hidden_states: [batch, rows, hidden]."""
    call: Call = module.sparsec.call
    number: int = module.sparsec.number
    batch, rows = hidden_states.shape[:2]
    rank, plain = module.kv_lora_rank, module.qk_nope_head_dim
    q_latent = module.q_a_layernorm(module.q_a_proj(hidden_states))
    q = module.q_b_proj(q_latent).view(batch, rows, module.num_heads, -1)
    new, k_rotary = module.kv_a_proj_with_mqa(hidden_states).split([rank, module.qk_rope_head_dim], -1)
    k_rotary = rotated(k_rotary[:, :, None], position_embeddings, True)
    latent = torch.cat((module.kv_a_layernorm(new)[:, :, None], k_rotary), -1).transpose(1, 2)
    store = append(number, call, LATENTS, latent)
    keep = _kept(module, call, hidden_states, q_latent, position_embeddings)

    both = module.kv_b_proj.weight.view(module.num_heads, -1, rank)  # [heads, plain + v_head_dim, rank]
    absorbed = q[..., :plain].transpose(1, 2) @ both[:, :plain]
    turned = rotated(q[..., plain:], position_embeddings, True).transpose(1, 2)
    row = torch.cat((absorbed, turned), -1)  # [batch, heads, rows, rank + rotary]
    places: dict[str, Any] = {"kv_heads": [0]} if call.decode else {}
    name = "ChosenDecode" if call.decode else "KeptAttention"
    read = node(name, (row, store, store, keep), row.shape, row.dtype, scale=module.scaling, **places)
    found = read[..., :rank] @ both[:, plain:].transpose(1, 2)
    out = module.o_proj(found.transpose(1, 2).reshape(batch, rows, -1))
    # glm_moe_dsa hands sets from layer to layer and wants one back; here they are the call's.
    return (out, None, None) if "prev_topk_indices" in kwargs else (out, None)


def _kept(module: Any, call: Call, hidden: Tensor, q_latent: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """What each row keeps, chosen here or read of the full layer below: bool [batch, rows, slots]."""
    runtime = module.sparsec
    source = runtime.plan.index_source(runtime.number)
    if source not in call.kept:
        interleaved = family_of(module.config).dsa == "interleaved"
        weights = dict(module.indexer.named_parameters())
        key = index_keys(weights, hidden, rope, interleaved).to(hidden.dtype)
        index = append(source, call, INDEX, key[:, None])
        q, w = index_queries(weights, hidden, q_latent, rope, interleaved)
        call.kept[source] = chosen(q, w, index, call.lengths, runtime.plan.dsa)
    return call.kept[source]


def chosen(q: Tensor, w: Tensor, index: Tensor, lengths: Tensor, dsa: Dsa) -> Tensor:
    """The nodes by which rows choose, as :func:`~sparsec.plugins.dsa_choice.choose` does.

    Args:
        q: float32 [batch, rows, indexer heads, dim]; w: float32 [batch, rows, indexer heads]; scales inside.
        index: [batch, 1, slots, dim], the rows' own keys among them.
        lengths: int64 [batch], tokens before the call.
        dsa: how.

    Returns:
        bool [batch, rows, slots].
    """
    size = (*q.shape[:2], index.shape[2])

    def scores(name: str, *inputs: Tensor, **attributes: Any) -> Tensor:
        return node(name, inputs, size, torch.float32, **attributes)

    every = scores("IndexScores", q, w, index, lengths)
    found, hisa, misa = every, dsa.hisa, dsa.misa
    if misa is not None:
        heads = {"block": misa.block, "heads": misa.heads}
        best = node("RouteHeads", (q, w, index, lengths), (*q.shape[:2], misa.heads), torch.int64, **heads)
        routed = q.gather(2, best[..., None].expand(-1, -1, -1, dsa.dim))
        found = scores("IndexScores", routed, w.gather(-1, best), index, lengths)
    if hisa is not None:
        found = scores("InBlocks", q, w, index, found, lengths, block=hisa.block, top_blocks=hisa.top_blocks)
        if hisa.min_context:
            found = scores("ShortRows", found, every, lengths, min_context=hisa.min_context)
    if misa is not None:
        if misa.candidates is not None:
            found = scores("Rescore", found, every, candidates=misa.candidates)
        if misa.min_context:
            found = scores("ShortRows", found, every, lengths, min_context=misa.min_context)
    return node("TopTokens", (found,), size, torch.bool, top_k=dsa.top_k)
