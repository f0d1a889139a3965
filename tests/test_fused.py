"""Layers fused by torch.compile: the same values and gradients, few compilations, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_plans import PLANS, make_tensors, sharp_model
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsec.plugins.fused import fused_layers
from sparsec.plugins.runtime import applied, new_cache, stepping
from sparsec.plugins.step import Step

# Dynamo asks every tensor for its gradient, and PyTorch warns of that itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
TRACED = "aot_eager"  # traced, differentiated and split as always, run without a C++ compiler


@pytest.fixture(name="model")
def make_model() -> Any:
    return sharp_model()


def compiled() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", ["a set a head", "shared index"])
def test_values_and_gradients(model: Any, name: str) -> None:
    torch._dynamo.reset()
    plan, ids = PLANS[name], torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    found = []
    with applied(model, plan, make_tensors(plan)):
        model.requires_grad_(True)
        for fused in (False, True):
            model.zero_grad(set_to_none=True)
            before = compiled()
            with stepping(Step(decode=True, prompt=30)):
                if fused:
                    with fused_layers(model, backend=TRACED):
                        logits = model(ids, use_cache=False).logits
                        again = model(ids, use_cache=False).logits
                    assert torch.equal(logits, again)
                    assert 0 < compiled() - before <= 8, "layers are not compiled one by one"
                else:
                    logits = model(ids, use_cache=False).logits
            logits.logsumexp(-1).sum().backward()
            found.append([logits.detach(), *(w.grad for w in model.parameters() if w.grad is not None)])
        model.requires_grad_(False)
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_steps_on_a_cache(model: Any) -> None:
    torch._dynamo.reset()
    plan, ids = PLANS["a set a head"], torch.randint(1, 97, (1, 24), generator=torch.Generator().manual_seed(2))
    with applied(model, plan, make_tensors(plan)), torch.no_grad():
        caches = [new_cache(model, "reference") for _ in range(2)]
        for cache in caches:
            model(ids[:, :20], past_key_values=cache, use_cache=True)
        for at in range(20, 24):
            token = ids[:, at : at + 1]
            true = model(token, past_key_values=caches[0], use_cache=True).logits
            with fused_layers(model, caches[1], backend=TRACED):
                logits = model(token, past_key_values=caches[1], use_cache=True).logits
            torch.testing.assert_close(logits, true, rtol=1e-4, atol=1e-5)
        assert "update" not in vars(caches[1])


def test_nothing_stays(model: Any) -> None:
    plan = PLANS["a set a head"]
    with applied(model, plan, make_tensors(plan)):
        before = ALL_ATTENTION_FUNCTIONS["sparsec"]
        with fused_layers(model, backend=TRACED):
            assert ALL_ATTENTION_FUNCTIONS["sparsec"] is not before
        assert ALL_ATTENTION_FUNCTIONS["sparsec"] is before
        assert all(layer._compiled_call_impl is None for layer in model.get_decoder().layers)
        with pytest.raises(RuntimeError, match="stop"):
            _stopped(model)
        assert ALL_ATTENTION_FUNCTIONS["sparsec"] is before
        assert all(layer._compiled_call_impl is None for layer in model.get_decoder().layers)
    assert AttentionInterface()["sparsec"] is before


def _stopped(model: Any) -> None:
    with fused_layers(model, backend=TRACED):
        raise RuntimeError("stop")


def test_what_cannot_be_compiled_runs_as_before(model: Any) -> None:
    torch._dynamo.reset()
    plan, ids = PLANS["a set a head"], torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(3))

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    with applied(model, plan, make_tensors(plan)), torch.no_grad():
        true = model(ids, use_cache=False).logits
        with fused_layers(model, backend=broken):
            assert torch.equal(model(ids, use_cache=False).logits, true)
