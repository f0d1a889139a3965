"""Routing at run time: who runs what, what is written, and that what is sent away is really not computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Phi3Config, Qwen3Config

from sparsec.errors import PlanError, SourceError, UsageError
from sparsec.plan import Plan
from sparsec.plugins import runtime as runtime_of_plans
from sparsec.plugins.families import base_plan, unit_modules
from sparsec.plugins.kernels.support import interpreted
from sparsec.plugins.routed_units import Forecaster, Router, forecaster_shapes, is_added, router_shapes
from sparsec.plugins.routing import UnitRuntime, install_routing
from sparsec.plugins.runtime import added_tensors, applied, new_cache, rows_as, stepping, tensor_names, use_kernels
from sparsec.plugins.step import Step

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GEMMA = {"head_dim": 12, "sliding_window": 16, "layer_types": ["sliding_attention"] + ["full_attention"] * 2}
# Norms on q and k; those and norms behind the units, and a layer of its own windows; one projection for q, k and v.
FAMILIES = {
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12),
    "gemma3_text": lambda: Gemma3TextConfig(**SIZES, **GEMMA),
    "phi3": lambda: Phi3Config(**SIZES, partial_rotary_factor=0.5),
}
TOKENS = 40
SINKS = 2


def routed(plan: Plan, width: int, **changes: Any) -> Plan:
    """``plan`` with all units routed that can be."""
    fixed = plan.attention_fixed()
    layers = range(plan.model.layers)
    routing = {
        "width": width,
        "rank": 4,
        "activation": "silu",
        "hidden": 3,
        "threshold": 0.0,
        "sinks": SINKS,
        "special": (),
        "attention": [i for i in layers if i not in fixed],
        "mlp": list(layers),
        **changes,
    }
    return plan.edit(routing=routing)


def drawn(plan: Plan, bias: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """Random forecasters, indexers and routers; ``bias`` moves all scores."""
    rng = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=rng) * 0.3 for name, shape in tensor_names(plan).items()}
    for name, tensor in found.items():
        if name.endswith("router.linear.bias"):
            tensor.fill_(bias)
        if ".router." in name and name.endswith("weight"):
            tensor.mul_(3)
    return found


@pytest.fixture(params=["plain", "kernels"], autouse=True)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this file twice: by PyTorch's indexing, and on Triton's kernels in its interpreter."""
    if request.param == "plain":
        return
    pytest.importorskip("triton")
    if not interpreted():
        pytest.skip("the models here are on the CPU: Triton has to interpret")

    def install(*args: Any) -> list[UnitRuntime]:
        found = install_routing(*args)
        for runtime in found:
            runtime.kernels = True
        return found

    monkeypatch.setattr(runtime_of_plans, "install_routing", install)


@pytest.fixture(scope="module")
def model(small_llama: Callable[..., Any]) -> Any:
    return small_llama(layers=4)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 60, (3, TOKENS), generator=torch.Generator().manual_seed(5))


PLANS: dict[str, Callable[[Plan], Plan]] = {
    "dense": lambda plan: plan,
    "windows and selectors": lambda plan: plan.edit(
        window={"size": 8, "sinks": 2},
        selector={
            "rank": 3, "rope": "post", "top_p": 0.8, "granularity": "token", "block": 1, "sinks": 1, "recent": 2,
            "scope": "layer",
        },
        min_context=10,
        layers=[
            {"heads": (0, 0, 0, 0)},
            {"heads": (1, 0, 0, 0), "index": "full"},
            {"heads": (1, 1, 0, 1), "index": "shared"},
            {"heads": (1, 1, 1, 1)},
        ],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest, model: Any) -> Plan:
    made = PLANS[request.param](base_plan(model.config, "test"))
    return routed(made, model.config.hidden_size)


def logits_of(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **{"use_cache": False, **kwargs}).logits
    return found


def paths(model: Any, ids: Tensor, decode: bool = False, **kwargs: Any) -> dict[tuple[int, str], Tensor]:
    """Which tokens run, unit by unit."""
    seen: dict[tuple[int, str], Tensor] = {}
    step = Step(decode=decode, observe_paths=lambda layer, unit, run: seen.__setitem__((layer, unit), run))
    with stepping(step):
        logits_of(model, ids, **kwargs)
    return seen


@contextmanager
def counting(model: Any, plan: Plan) -> Iterator[dict[tuple[int, str], list[int]]]:
    """How many tokens each projection of each routed unit is given."""
    given: dict[tuple[int, str], list[int]] = {}
    hooks = []
    for layer in range(plan.model.layers):
        block = model.model.layers[layer]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            part = getattr(block.self_attn, name)
            hooks.append(part.register_forward_pre_hook(_noting(given, (layer, name))))
        for name in ("gate_proj", "up_proj", "down_proj"):
            hooks.append(getattr(block.mlp, name).register_forward_pre_hook(_noting(given, (layer, name))))
    yield given
    for hook in hooks:
        hook.remove()


def _noting(given: dict[tuple[int, str], list[int]], key: tuple[int, str]) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        given.setdefault(key, []).append(args[0].shape[:-1].numel())

    return hook


def masked_reference(model: Any, plan: Plan, tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The same by masks: every unit runs whole under the plan without routing, and outputs are mixed afterwards."""
    from sparsec.plugins.routed_units import parts_of

    assert plan.routing is not None
    hooks = []
    keep = torch.arange(ids.shape[1])[None] < SINKS

    def mixing(layer: int, unit: Any) -> Any:
        forecaster, router = parts_of(plan.routing, layer, unit, tensors)

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            run = ((router(x) >= 0) | keep)[..., None]
            first = output[0] if isinstance(output, tuple) else output
            mixed = torch.where(run, first, forecaster(x))
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return hook

    for layer, unit in plan.routing.units:
        module = unit_modules(model, unit)[layer]
        hooks.append(module.register_forward_hook(mixing(layer, unit), with_kwargs=True))
    rest = {name: tensor for name, tensor in tensors.items() if ".indexer." in name}
    with applied(model, plan.edit(routing=None), rest):
        found = logits_of(model, ids)
    for hook in hooks:
        hook.remove()
    return found


def test_gathering_equals_masking(model: Any, plan: Plan, ids: Tensor) -> None:
    tensors = drawn(plan)
    wanted = masked_reference(model, plan, tensors, ids)
    with applied(model, plan, tensors):
        torch.testing.assert_close(logits_of(model, ids), wanted, atol=2e-5, rtol=1e-4)


def test_nothing_routed_is_the_model_without_routing(model: Any, plan: Plan, ids: Tensor) -> None:
    rest = {name: tensor for name, tensor in drawn(plan).items() if ".indexer." in name}
    with applied(model, plan.edit(routing=None), rest):
        wanted = logits_of(model, ids)
    with applied(model, plan, drawn(plan, bias=1e6)):
        torch.testing.assert_close(logits_of(model, ids), wanted, atol=0, rtol=0)


def test_what_is_sent_away_is_not_computed(model: Any, plan: Plan, ids: Tensor) -> None:
    with applied(model, plan, drawn(plan)):
        ran = paths(model, ids)
        with counting(model, plan) as given:
            logits_of(model, ids)
    assert len({int(run.sum()) for run in ran.values()}) > 2, "the draw must route"
    for (layer, unit), run in ran.items():
        for name in ("q_proj", "o_proj") if unit == "attention" else ("gate_proj", "up_proj", "down_proj"):
            assert given[layer, name] == [int(run.sum())], (layer, name)
        if unit == "attention":
            assert given[layer, "k_proj"] == given[layer, "v_proj"] == [ids.numel()]


def test_prefill_and_decode_steps_equal_one_pass(model: Any, plan: Plan, ids: Tensor) -> None:
    prompt = 24
    with applied(model, plan, drawn(plan)):
        cache = new_cache(model)
        with rows_as("prefill"):
            first = logits_of(model, ids[:, :prompt], past_key_values=cache, use_cache=True)
        steps = [
            logits_of(model, ids[:, t : t + 1], past_key_values=cache, use_cache=True) for t in range(prompt, TOKENS)
        ]
        with stepping(Step(decode=True, prompt=prompt)):
            wanted = logits_of(model, ids)
    torch.testing.assert_close(torch.cat([first, *steps], 1), wanted, atol=3e-5, rtol=1e-4)


def test_chunked_prefill_equals_one_pass(model: Any, plan: Plan, ids: Tensor) -> None:
    with applied(model, plan, drawn(plan)):
        wanted = logits_of(model, ids)
        cache, parts = new_cache(model), []
        for start, stop in ((0, 1), (1, 17), (17, TOKENS)):
            with rows_as("prefill"):
                parts.append(logits_of(model, ids[:, start:stop], past_key_values=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=2e-5, rtol=1e-4)


def test_neighbours_and_padding_change_no_path(model: Any, plan: Plan, ids: Tensor) -> None:
    short = TOKENS - 9
    with applied(model, plan, drawn(plan)):
        alone = paths(model, ids[:1, :short])
        for side in ("left", "right"):
            batch, mask = ids.clone(), torch.ones_like(ids)
            where = slice(9, None) if side == "left" else slice(0, short)
            batch[0], mask[0] = 0, 0
            batch[0, where], mask[0, where] = ids[0, :short], 1
            together = paths(model, batch, attention_mask=mask)
            for key, run in alone.items():
                assert torch.equal(together[key][0, where], run[0]), (side, key)
                assert int(together[key][0].sum()) == int(run.sum()), "padding runs nothing"
            torch.testing.assert_close(
                logits_of(model, batch, attention_mask=mask)[0, where],
                logits_of(model, ids[:1, :short])[0],
                atol=2e-5,
                rtol=1e-4,
            )


def test_sinks_and_special_tokens_run_everything(model: Any, ids: Tensor) -> None:
    plan = routed(base_plan(model.config, "test"), model.config.hidden_size, special=(int(ids[0, 20]),))
    with applied(model, plan, drawn(plan, bias=-1e6)):
        for run in paths(model, ids).values():
            assert torch.equal(run, (torch.arange(TOKENS) < SINKS) | (ids == ids[0, 20]))
        with pytest.raises(ValueError, match="pass input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))


def test_a_decode_step_that_agrees_reads_no_weights(model: Any, plan: Plan, ids: Tensor) -> None:
    assert plan.routing is not None
    with applied(model, plan, drawn(plan, bias=-1e6)):
        cache = new_cache(model)
        logits_of(model, ids, past_key_values=cache, use_cache=True)
        with counting(model, plan) as given:
            logits_of(model, ids[:, :1], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == TOKENS + 1
    for layer, unit in plan.routing.units:
        mine = ("q_proj", "o_proj") if unit == "attention" else ("gate_proj", "up_proj", "down_proj")
        assert not any((layer, name) in given for name in mine)
        if unit == "attention":
            assert given[layer, "k_proj"] == [len(ids)], "keys and values are written all the same"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unit_that_has_learnt_forgets_what_it_was(dtype: torch.dtype) -> None:
    unit = Forecaster({name: torch.ones(shape) for name, shape in forecaster_shapes(6, 2).items()}, "silu")
    router = Router({name: torch.ones(shape) for name, shape in router_shapes(6, 3).items()})
    x = torch.ones(4, 6, dtype=dtype)
    for part in (unit, router):
        before = part(x)
        part.requires_grad_(True)
        part(x).float().sum().backward()
        with torch.no_grad():
            for weight in part.parameters():
                weight.mul_(2)
        part.requires_grad_(False)
        assert (part(x) > before).all()


def test_rank_zero_skips(model: Any, ids: Tensor) -> None:
    plan = routed(base_plan(model.config, "test"), model.config.hidden_size, rank=0, sinks=0)
    with applied(model, plan, drawn(plan, bias=-1e6)):
        wanted = model.lm_head(model.model.norm(model.get_input_embeddings()(ids)))
        torch.testing.assert_close(logits_of(model, ids), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gathers_as_it_masks(name: str) -> None:
    torch.manual_seed(0)
    family = AutoModelForCausalLM.from_config(FAMILIES[name]()).eval().requires_grad_(False)
    ids = torch.randint(3, 64, (2, TOKENS))
    plan = routed(base_plan(family.config, "test"), family.config.hidden_size)
    tensors = drawn(plan)
    wanted = masked_reference(family, plan, tensors, ids)
    with applied(family, plan, tensors):
        torch.testing.assert_close(logits_of(family, ids), wanted, atol=2e-5, rtol=1e-4)


def test_uninstall_leaves_the_dense_model(model: Any, plan: Plan, ids: Tensor) -> None:
    wanted, names = logits_of(model, ids), [name for name, _ in model.named_modules()]
    tensors = drawn(plan)
    with applied(model, plan, tensors):
        found = added_tensors(model)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert all(is_added(name) for name in tensors)
    assert torch.equal(logits_of(model, ids), wanted)
    assert [name for name, _ in model.named_modules()] == names
    assert not any("forward" in vars(module) for module in model.modules())


def test_plans_without_routing_are_written_as_before(model: Any, plan: Plan) -> None:
    bare = plan.edit(routing=None)
    assert "routing" not in bare.to_json()
    assert Plan.parse(plan.to_json()) == plan
    assert plan.digest != bare.digest
    assert not plan.is_dense


def test_what_cannot_be_routed_is_refused_in_one_line(model: Any, dsa_config: Callable[..., Any]) -> None:
    dense = base_plan(model.config, "test")
    mixed = PLANS["windows and selectors"](dense)
    with pytest.raises(PlanError, match="attention of layer 1 is routed: layers above read its index set"):
        routed(mixed, 48, attention=[1])
    with pytest.raises(PlanError, match="the model does not have: it has 4"):
        routed(dense, 48, mlp=[7])
    with pytest.raises(PlanError, match="not ascending"):
        routed(dense, 48, mlp=[1, 0])
    wrong = routed(dense, 40)
    with (
        pytest.raises(PlanError, match="hidden states of 40, the model's have 48"),
        applied(model, wrong, drawn(wrong)),
    ):
        pass
    experts = AutoModelForCausalLM.from_config(dsa_config("glm_moe_dsa"))
    with pytest.raises(SourceError, match="mixtures of experts"):
        unit_modules(experts, "mlp")


def test_kernels_say_that_they_do_not_route(model: Any, plan: Plan) -> None:
    with (
        applied(model, plan, drawn(plan)),
        pytest.raises(UsageError, match=r"the plan routes tokens|need a CUDA GPU|Triton"),
    ):
        use_kernels(model, "triton")
