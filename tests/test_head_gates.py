"""Gates between full and windowed heads: what they mix, what they add up to, and that a planted head is found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract_plans import sharp_model

from sparsec.calibrate import head_gates
from sparsec.calibrate.head_gates import NAME, budgeted, learn_gates
from sparsec.calibrate.questions import Windows
from sparsec.errors import TrainingError
from sparsec.events import silent
from sparsec.passes.split import by_layer, split_plan
from sparsec.plan import Plan, Window
from sparsec.plugins.families import attention_modules, shape_of
from sparsec.plugins.runtime import applied

LENGTH = 96
GIVEN: dict[str, Any] = {"rows": 24, "seed": 0, "listen": silent}


def plans(model: Any) -> tuple[Plan, Plan]:
    dense = Plan.dense(shape_of(model.config), "test")
    return dense, split_plan(dense, {}, Window(size=12, sinks=2), None)


@pytest.fixture(name="model")
def make_model() -> Any:
    return sharp_model()


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def windows(count: int, seed: int = 0) -> Windows:
    """Every other one with answers near its end."""
    asked = torch.arange(count) % 2 == 1
    return Windows(ids(count, seed), asked, asked[:, None] & (torch.arange(LENGTH) >= LENGTH - 12))


def test_gates_mix_what_will_run(model: Any) -> None:
    dense, local = plans(model)
    kept = [(0, 1), (2, 0), (2, 3)]
    values = torch.zeros(dense.model.layers, dense.model.heads)
    for layer, head in kept:
        values[layer, head] = 1
    rows = torch.arange(LENGTH)
    with torch.no_grad():
        true = model.get_decoder()(input_ids=ids(1), use_cache=False).last_hidden_state[0]
        with applied(model, split_plan(dense, by_layer(kept), local.window, None)):
            split = model.get_decoder()(input_ids=ids(1), use_cache=False).last_hidden_state[0]
        with head_gates._gated(model):
            for mixing, expected in (
                (head_gates._Mixing(local, None), true),
                (head_gates._Mixing(local, torch.ones_like(values)), true),
                (head_gates._Mixing(local, values), split),
            ):
                found = head_gates._hidden(model, ids(1), rows, mixing)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation != NAME
    assert not any("sparsec_mixing" in vars(module) for module in attention_modules(model))


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_gates_add_up_and_so_does_their_gradient(temperature: float) -> None:
    raw = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gates = budgeted(raw, 8, temperature)
    assert float(gates.detach().sum()) == pytest.approx(8, abs=1e-3)
    (gradient,) = torch.autograd.grad(gates.sum(), raw)
    assert gradient.abs().max() < 1e-4, "what one gate gains the others lose"


def test_heads_that_matter_stay_open(model: Any) -> None:
    """All heads but two write next to nothing: the gates of those two are worth opening."""
    _, local = plans(model)
    shape = local.model
    planted = {(1, 2), (3, 1)}
    with torch.no_grad():
        for layer, module in enumerate(attention_modules(model)):
            for head in range(shape.heads):
                if (layer, head) not in planted:
                    module.o_proj.weight[:, head * shape.head_dim : (head + 1) * shape.head_dim] *= 0.02
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    gates = learn_gates(model, windows(60, seed=2), local, count=2, unit=1, **GIVEN)
    best = gates.scores.flatten().topk(2).indices.tolist()
    assert {(at // shape.heads, at % shape.heads) for at in best} == planted
    assert len(gates.text) == len(gates.questions) == 30
    assert gates.questions[-1] < gates.questions[0]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])


def test_whole_groups_and_layers_that_are_not_split(model: Any) -> None:
    _, local = plans(model)
    layers = [layer.model_dump() for layer in local.layers]
    layers[1]["heads"] = None
    gates = learn_gates(model, windows(4, seed=3), local.edit(layers=layers), count=2, unit=local.model.group, **GIVEN)
    assert gates.scores.shape == (local.model.layers, local.model.kv_heads)
    assert (gates.scores[1] == -math.inf).all()
    assert torch.isfinite(gates.scores[[0, 2, 3]]).all()


def test_a_loss_that_is_not_finite_says_what_to_do(model: Any) -> None:
    _, local = plans(model)
    with torch.no_grad():
        model.get_decoder().norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="choose=needles"):
        learn_gates(model, windows(2), local, count=2, unit=1, **GIVEN)
    assert model.config._attn_implementation != NAME
