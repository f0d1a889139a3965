"""Every supported family: what is captured rebuilds the layer's attention, and an identity plan is the dense model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from sparsec.calibrate import head_gates
from sparsec.calibrate.capture import Captured, capture
from sparsec.calibrate.questions import Windows
from sparsec.errors import PlanError, SourceError
from sparsec.events import silent
from sparsec.passes.split import split_plan
from sparsec.plan import Plan, Window
from sparsec.plugins.families import (
    FAMILIES,
    attention_modules,
    base_plan,
    decoder_layers,
    family_of,
    final_norm,
    lm_head,
    native_local_layers,
    shape_of,
)
from sparsec.plugins.runtime import applied, check, new_cache, tensor_names

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama with an explicit head_dim": lambda: LlamaConfig(**SIZES, head_dim=12),
    "llama with YaRN": lambda: LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12),
    "gemma3_text": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=12,
        query_pre_attn_scalar=20,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "phi3": lambda: Phi3Config(**SIZES, partial_rotary_factor=0.5),
}
TOKENS = 48


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "q_norm", "k_norm", "bias")):
            weight.copy_(torch.randn_like(weight) * 0.4)
    return made


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def test_the_table_finds_every_part(model: Any) -> None:
    assert len(decoder_layers(model)) == len(attention_modules(model)) == shape_of(model.config).layers
    assert final_norm(model) is model.model.norm
    assert lm_head(model) is model.lm_head
    for layer in decoder_layers(model):
        for path in vars(family_of(model.config)).values():
            if isinstance(path, str) and path.startswith(("self_attn", "mlp", "input_", "post_", "pre_")):
                assert layer.get_submodule(path) is not None


def test_captured_q_k_v_rebuild_the_attention_output(model: Any, ids: Tensor) -> None:
    outputs: dict[int, Tensor] = {}
    hooks = [
        module.o_proj.register_forward_pre_hook(lambda m, args, i=i: outputs.__setitem__(i, args[0]))  # type: ignore[misc]
        for i, module in enumerate(attention_modules(model))
    ]
    seen: dict[int, Captured] = {}
    capture(model, ids, lambda c: seen.__setitem__(c.layer, c))
    for hook in hooks:
        hook.remove()
    native = native_local_layers(model.config)
    assert len(seen) == 3
    for i, layer in seen.items():
        group = layer.q.shape[1] // layer.k.shape[1]
        k, v = layer.k.repeat_interleave(group, 1), layer.v.repeat_interleave(group, 1)
        distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
        hidden = (distance < 0) | ((distance >= 16) if i in native else (distance < 0))
        weights = (layer.q @ k.transpose(-1, -2) * layer.scale).masked_fill(hidden, float("-inf")).softmax(-1)
        rebuilt = (weights @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(rebuilt, outputs[i], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("unit", [1, 2])
def test_gates_that_are_shut_or_open_are_the_split(model: Any, ids: Tensor, unit: int) -> None:
    dense = base_plan(model.config, "test")
    local = split_plan(dense, {}, Window(size=8, sinks=2), None)
    last = local.model.layers - 1  # none of the model's own sliding ones
    with applied(model, split_plan(dense, {last: tuple(range(unit))}, Window(size=8, sinks=2), None)):
        true = model.get_decoder()(input_ids=ids[:1], use_cache=False).last_hidden_state[0]
    values = torch.zeros(local.model.layers, local.model.heads // unit)
    values[last, 0] = 1
    with head_gates._gated(model):
        found = head_gates._hidden(model, ids[:1], torch.arange(TOKENS), head_gates._Mixing(local, values))
    torch.testing.assert_close(found, true, atol=1e-4, rtol=1e-4)
    windows = Windows(ids, torch.tensor([False, True]), torch.zeros_like(ids, dtype=torch.bool))
    gates = head_gates.learn_gates(model, windows, local, count=2, unit=unit, rows=8, seed=0, listen=silent)
    native = native_local_layers(model.config)
    assert all(bool(torch.isfinite(row).all()) == (i not in native) for i, row in enumerate(gates.scores))


def test_turning_back_gives_what_the_rotary_embedding_received(
    model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    modeling = importlib.import_module(type(attention_modules(model)[0]).__module__)
    received: list[tuple[Tensor, Tensor]] = []
    rotate = modeling.apply_rotary_pos_emb

    def note(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        received.append((q, k))
        return rotate(q, k, *args, **kwargs)

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", note)
    found: list[tuple[Tensor, Tensor]] = []
    capture(model, ids, lambda c: found.append(c.before_rope()))
    for (q, k), (q_before, k_before) in zip(received, found, strict=True):
        torch.testing.assert_close(q_before, q, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(k_before, k, atol=1e-3, rtol=1e-3)


def identity(config: Any) -> Plan:
    shape, native = shape_of(config), native_local_layers(config)
    dense = Plan.dense(shape, "test", native)
    layers = [{"heads": None} if i in native else {"heads": (1, 0, 1, 0), "index": "full"} for i in range(shape.layers)]
    selector = {
        "rank": 4, "rope": "pre", "top_p": 1.0, "granularity": "token", "block": 8, "sinks": 2, "recent": 4,
    }  # fmt: skip
    return dense.edit(layers=layers, selector=selector, window={"size": 128, "sinks": 2})


def test_identity_plan_equals_dense(model: Any, ids: Tensor) -> None:
    plan = identity(model.config)
    tensors = {name: torch.randn(size) for name, size in tensor_names(plan).items()}
    dense = model(ids, use_cache=False).logits
    with applied(model, plan, tensors):
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-4, rtol=1e-4)
        cache = new_cache(model)
        parts = [model(ids[:, :40], past_key_values=cache).logits]
        for i in range(40, TOKENS):
            parts.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(parts, 1), dense, atol=1e-4, rtol=1e-4)


def test_layers_that_are_local_by_nature_are_left_alone() -> None:
    config = CONFIGS["gemma3_text"]()
    assert native_local_layers(config) == (0,)
    model = AutoModelForCausalLM.from_config(config)
    plan = identity(config)
    changed = plan.edit(layers=[{"heads": (0, 0, 0, 0)}, *(layer.model_dump() for layer in plan.layers[1:])])
    with pytest.raises(PlanError, match="layer 0, which the model itself runs with a sliding window"):
        check(model, changed, {})


def test_a_window_longer_than_the_model_reads_is_no_window() -> None:
    assert native_local_layers(MistralConfig(**SIZES, sliding_window=4096)) == ()
    assert native_local_layers(MistralConfig(**SIZES, sliding_window=64)) == (0, 1, 2)


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(SourceError, match=r"'gpt2' is not supported; supported: llama, .*phi3"):
        shape_of(GPT2Config())
    # Those with indexers of their own: tests/test_dsa.py.
    own = {name for name, family in FAMILIES.items() if family.dsa is not None}
    assert own == {"deepseek_v32", "glm_moe_dsa"}
    assert set(FAMILIES) - own == {"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"}


def test_a_whole_sliding_window_runs_under_a_plan(make_checkpoint: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, sliding_window=4096)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = torch.randint(3, 64, (1, 20))
    dense = model(ids, use_cache=False).logits
    with applied(model, Plan.dense(shape_of(config), "test")):
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-5, rtol=1e-5)
