"""Model families as a table: where a decoder keeps the parts that passes and the runtime need.

Captured q, k and v come from Transformers' attention interface, after q/k-norm and rotary embedding, so fused
projections, norms, biases and scales need no row here. To add a family, add its row and run
``pytest tests/test_families.py``: it rebuilds every layer's attention output from what was captured.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from torch import nn

from sparsec.errors import SourceError
from sparsec.plan import Dsa, ModelShape, Plan, Unit


@dataclass(frozen=True)
class Family:
    """Dotted paths from the causal-LM model (layers, norm) or from a decoder layer (the others)."""

    model_type: str
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    output: str = "self_attn.o_proj"
    attention_norm: str = "input_layernorm"
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    # How q, k and v are projected: three layers, or one whose rows are those of q, of k and of v.
    qkv: Literal["split", "fused"] = "split"
    # Of families with indexers of their own (DSA): how rotary dimensions are paired in an indexer. Attention itself,
    # whose keys are latents (MLA), pairs neighbours in both.
    dsa: Literal["half", "interleaved"] | None = None


FAMILIES = {
    row.model_type: row
    for row in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("gemma3_text", mlp_norm="pre_feedforward_layernorm"),
        Family("phi3", qkv="fused"),
        Family("deepseek_v32", dsa="half"),
        Family("glm_moe_dsa", dsa="interleaved"),
    )
}


def family_of(config: Any) -> Family:
    """The table's row for a model config.

    Raises:
        SourceError: the family is not in the table.
    """
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        raise SourceError(
            f"model family {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)} "
            "(a new one is a row in plugins/families.py)"
        ) from None


def shape_of(config: Any) -> ModelShape:
    """The attention shape; head_dim is read, not divided out: many models set it apart from hidden_size."""
    latent = family_of(config).dsa is not None
    heads = config.num_attention_heads
    return ModelShape(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        # There, head_dim is that of the rotary part alone.
        head_dim=config.qk_head_dim if latent else getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def base_plan(config: Any, producer: str) -> Plan:
    """The plan of the unchanged model: dense, its own sliding layers left alone; or its own indexers, as they are."""
    shape = shape_of(config)
    if family_of(config).dsa is None:
        return Plan.dense(shape, producer, native_local_layers(config))
    dsa = Dsa(top_k=config.index_topk, heads=config.index_n_heads, dim=config.index_head_dim)
    # Only glm_moe_dsa's own code knows layers without an indexer.
    kinds = tuple(getattr(config, "indexer_types", None) or ("full",) * shape.layers)
    return Plan.indexing(shape, producer, dsa, kinds)


def sliding_window_is_whole(config: Any) -> bool:
    """A sliding window at least as long as the model reads hides nothing: the layer is dense."""
    window = getattr(config, "sliding_window", None)
    return window is None or window >= config.max_position_embeddings


def native_local_layers(config: Any) -> tuple[int, ...]:
    """Layers that the model itself runs with a sliding window; sparsec leaves them alone."""
    count = config.num_hidden_layers
    if sliding_window_is_whole(config) or getattr(config, "use_sliding_window", True) is False:
        return ()
    types = getattr(config, "layer_types", None)
    if types is None:
        return tuple(range(count))
    return tuple(i for i in range(count) if types[i] == "sliding_attention")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal-LM model, first to last."""
    layers: nn.ModuleList = attrgetter(family_of(model.config).layers)(model)
    return layers


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention module of every decoder layer."""
    path = attrgetter(family_of(model.config).attention)
    return [path(layer) for layer in decoder_layers(model)]


def unit_modules(model: nn.Module, unit: Unit) -> list[nn.Module]:
    """The module of one unit, attention or MLP, of every decoder layer.

    What follows a unit (gemma3's norms) is no part of it.

    Raises:
        SourceError: the family's units cannot be routed one by one.
    """
    row = family_of(model.config)
    if row.dsa is not None:
        raise SourceError(
            f"tokens of {row.model_type} cannot be routed, its MLPs are mixtures of experts with routers of their own: "
            "leave informed-routing out"
        )
    path = attrgetter(row.attention if unit == "attention" else row.mlp)
    return [path(layer) for layer in decoder_layers(model)]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the head."""
    module: nn.Module = attrgetter(family_of(model.config).norm)(model)
    return module


def lm_head(model: nn.Module) -> nn.Module:
    """The projection to vocabulary logits."""
    module: nn.Module = attrgetter(family_of(model.config).head)(model)
    return module
