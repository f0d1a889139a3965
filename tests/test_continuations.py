"""Continuations scored in batches, as generating them token by token would have seen them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sparsec.plan import Plan
from sparsec.plugins.continuations import Window, scored_logits
from sparsec.plugins.families import shape_of
from sparsec.plugins.runtime import applied, new_cache, rows_as, tensor_names


@pytest.fixture(scope="module")
def model(small_llama: Callable[..., Any]) -> Any:
    return small_llama(layers=3)


@pytest.fixture(scope="module")
def plan(model: Any) -> Plan:
    return Plan.dense(shape_of(model.config), "test").edit(
        layers=[
            {"heads": (1, 0, 0, 0), "index": "full"},
            {"heads": (0, 0, 0, 0), "index": "none"},
            {"heads": (0, 0, 1, 1), "index": "full"},
        ],
        window={"size": 8, "sinks": 1},
        selector={"rank": 8, "rope": "pre", "top_p": 0.5, "granularity": "token", "block": 4, "sinks": 1, "recent": 2},
    )


@pytest.fixture(scope="module")
def tensors(plan: Plan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: 0.2 * torch.randn(size, generator=generator) for name, size in tensor_names(plan).items()}


def ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


LONG, SHORT = ids(70, 1), ids(12, 2)
BATCH = [
    Window(LONG, prompt=50, scored=20),
    Window((*LONG[:50], *SHORT[:3]), prompt=50, scored=3),  # the same prompt, another continuation
    Window(SHORT, prompt=11, scored=1),  # a prefill row alone
    Window(SHORT, prompt=1, scored=11),
    Window(ids(40, 3), prompt=30, scored=25),  # part of the prompt is scored too
]


def step_by_step(model: Any, window: Window) -> Tensor:
    """The prompt in one call, then one call a token."""
    tokens = torch.tensor([window.tokens])
    cache = new_cache(model) if getattr(model, "sparsec_plan", None) else DynamicCache(config=model.config)
    with rows_as("prefill"):
        rows = [model(tokens[:, : window.prompt], past_key_values=cache).logits]
    for at in range(window.prompt, tokens.shape[1] - 1):
        rows.append(model(tokens[:, at : at + 1], past_key_values=cache).logits)
    return torch.cat(rows, 1)[0, -window.scored :]


def test_a_padded_batch_equals_each_window_step_by_step(model: Any, plan: Plan, tensors: dict[str, Tensor]) -> None:
    with applied(model, plan, tensors):
        found = scored_logits(model, BATCH)
        for window, logits in zip(BATCH, found, strict=True):
            assert logits.shape == (window.scored, 60)
            torch.testing.assert_close(logits, step_by_step(model, window), atol=2e-4, rtol=1e-4)


def test_without_a_plan_it_is_one_dense_pass(model: Any) -> None:
    for window, logits in zip(BATCH, scored_logits(model, BATCH), strict=True):
        expected = model(torch.tensor([window.tokens[:-1]]), use_cache=False).logits[0, -window.scored :]
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_prefill_rows_alone_would_give_other_logits(model: Any, plan: Plan, tensors: dict[str, Tensor]) -> None:
    window = BATCH[0]
    with applied(model, plan, tensors):
        found = scored_logits(model, [window])[0]
        prefill = model(torch.tensor([window.tokens[:-1]]), use_cache=False).logits[0, -window.scored :]
    torch.testing.assert_close(found[0], prefill[0], atol=2e-4, rtol=1e-4)  # the prompt's last row is a prefill row
    assert (found[1:] - prefill[1:]).abs().amax(-1).min() > 1e-2


def test_one_prompt_is_read_once(model: Any, plan: Plan, tensors: dict[str, Tensor], monkeypatch: Any) -> None:
    shapes = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, **given: shapes.append(given["input_ids"].shape) or forward(self, **given)
    )
    with applied(model, plan, tensors):
        scored_logits(model, [Window((*LONG[:50], a, b), prompt=50, scored=2) for a in range(3) for b in range(2)])
    assert shapes == [(1, 50), (6, 1)]


@pytest.mark.parametrize(
    ("prompt", "scored"), [(0, 3), (5, 1), (4, 0), (3, 1), (2, 5)], ids=["0", "all", "none", "gap", "first token"]
)
def test_windows_that_cannot_be_scored_are_refused(prompt: int, scored: int) -> None:
    with pytest.raises(ValueError, match=r"scored|score"):
        Window((1, 2, 3, 4, 5), prompt=prompt, scored=scored)
