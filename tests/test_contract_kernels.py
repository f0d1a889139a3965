"""The execution contract on Triton's kernels: what the reference computes, they compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract_plans import PLANS, TOTAL, decode_steps, make_plan, make_tensors, sharp_model
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from sparsec.calibrate.decode_bytes import resident_bytes
from sparsec.errors import UsageError
from sparsec.plugins.kernels import support
from sparsec.plugins.kernels.support import chosen, reason_against
from sparsec.plugins.runtime import (
    applied,
    kv_bytes,
    new_cache,
    rows_as,
    use_kernels,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return sharp_model()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 97, (2, TOTAL), generator=torch.Generator().manual_seed(1))


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # a CPU runs them in Triton's interpreter


@torch.no_grad()
def generated(model: Any, ids: Tensor, mask: Tensor | None, kernels: Any, chunks: list[int]) -> tuple[Tensor, Any]:
    """Logits of a prompt in chunks and three decode steps, and the cache."""
    cache, at, logits = new_cache(model, kernels), 0, []
    for rows in [*chunks, 1, 1, 1]:
        until = slice(at, at + rows)
        more: dict[str, Any] = {}
        if mask is not None:
            seen = mask[:, : at + rows]
            more = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp_min(0)[:, at:]}
        kind: Any = "prefill" if at < sum(chunks) else "decode"
        with rows_as(kind):
            logits.append(model(ids[:, until], past_key_values=cache, use_cache=True, **more).logits)
        at += rows
    return torch.cat(logits, 1), cache


ON_KERNELS = {
    **{name: PLANS[name] for name in ("shared index", "a set a head", "blocks", "after RoPE", "no selector")},
    **{name: PLANS[name] for name in ("a set a KV head", "a set a KV head, query blocks")},
    **{name: PLANS[name] for name in ("crossing while decoding", "query blocks")},
    "query blocks of which some rows vote": PLANS["query blocks of which some rows vote"],
    "index keys in fp8": PLANS["index keys in fp8"],
    "a coarse level": make_plan(granularity="block", coarse={"min_context": 28, "one_in": 3}),
    "a coarse level, a set a head": PLANS["a coarse level, a set a head"],
    "index keys in fp8, blocks": make_plan(
        granularity="block", prefill="selector", query_block=8, index_dtype="fp8", min_keep=6
    ),
    "query blocks behind a dense beginning": make_plan(min_context=12, prefill="selector", query_block=4),
}


@pytest.mark.parametrize("name", ON_KERNELS)
def test_kernels_equal_the_reference_under_a_plan(name: str, model: Any) -> None:
    """Prompt in chunks, so that the ring is read back; one of two sequences is padded on the left."""
    pytest.importorskip("triton")
    plan, model = ON_KERNELS[name], copy.deepcopy(model).to(DEVICE)
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with applied(model, plan, make_tensors(plan)):
        true, _ = generated(model, ids, mask, "reference", [16, 8, 3])
        found, cache = generated(model, ids, mask, "triton", [16, 8, 3])
    real = mask[:, : true.shape[1]].bool()
    assert torch.allclose(found[real], true[real], atol=2e-5), float((found - true)[real].abs().max())
    assert kv_bytes(cache) > 0
    assert cache.get_seq_length() == 30


def test_steps_as_a_graph_write_what_single_calls_write(model: Any) -> None:
    from sparsec.plugins.kernels.graph import DecodeGraph

    plan, model = ON_KERNELS["shared index"], copy.deepcopy(model).to(DEVICE)
    ids = torch.randint(1, 97, (1, 20), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    with applied(model, plan, make_tensors(plan)), torch.no_grad():
        cache, reference = new_cache(model, "triton"), new_cache(model, "reference")
        token = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        model(ids, past_key_values=reference, use_cache=True)
        steps, found, true = DecodeGraph(model, cache, token, room=3), [], []
        for _ in range(3):
            found.append(int(steps()))
            token = model(token, past_key_values=reference, use_cache=True).logits[:, -1:].argmax(-1)
            true.append(int(token))
        assert found == true
        assert cache.get_seq_length() == 23
        others = DecodeGraph(model, cache, token, room=1)
        model(token, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="something else"):
            others()
        with pytest.raises(ValueError, match="full"):
            steps()
        with pytest.raises(ValueError, match="new_cache"):
            DecodeGraph(model, reference, token, room=1)


def test_who_runs_what(model: Any) -> None:
    pytest.importorskip("triton")
    plan = PLANS["blocks"]
    cpu = torch.device("cpu")
    assert chosen("reference", plan, DEVICE, torch.float32) is False
    assert chosen("triton", plan, DEVICE, torch.float32) is True
    assert chosen("auto", plan, cpu, torch.float32) is False
    assert "float64" in str(reason_against(plan, DEVICE, torch.float64))
    for name, words in (("compensated", "compensates"), ("query blocks, a set a head", "blocks of 2, 4, 8")):
        with applied(model, PLANS[name], make_tensors(PLANS[name])), pytest.raises(UsageError, match=words):
            use_kernels(model, "triton")


def test_auto_says_once_why_the_reference_runs(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    plan = make_plan(compensate=True, window=5)  # of this test alone: a reason is said once a process
    support._warn.cache_clear()
    for _ in range(2):
        assert chosen("auto", plan, torch.device("cuda"), torch.float32) is False
    assert [record.message for record in caplog.records] == [
        "sparsec runs the reference, which is slow: "
        "the plan's window compensates for what it drops: only the reference does that"
    ]


def test_a_filled_cache_of_another_kind_is_refused(model: Any) -> None:
    """A layer called by itself, past the hook that fills caches: attention over the new rows alone would be wrong."""
    with applied(model, PLANS["no selector"], make_tensors(PLANS["no selector"])):
        hidden = torch.randn(1, 4, model.config.hidden_size)
        rope = model.model.rotary_emb(hidden, torch.arange(4)[None])
        cache = DynamicCache(config=model.config)
        with pytest.raises(ValueError, match="no plan filled"):
            model.model.layers[0](hidden, past_key_values=cache, position_embeddings=rope)


def test_several_decode_rows_at_once_are_the_references_business(model: Any) -> None:
    pytest.importorskip("triton")
    plan, model = PLANS["no selector"], copy.deepcopy(model).to(DEVICE)
    ids = torch.randint(1, 97, (1, 12)).to(DEVICE)
    with applied(model, plan, make_tensors(plan)):
        cache = new_cache(model, "triton")
        with rows_as("prefill"):
            model(ids[:, :8], past_key_values=cache, use_cache=True)
        with rows_as("decode"), pytest.raises(ValueError, match="reference"):
            model(ids[:, 8:], past_key_values=cache, use_cache=True)


def test_index_keys_in_fp8_take_a_byte_a_number_and_one_for_the_scale(model: Any, ids: Tensor) -> None:
    pytest.importorskip("triton")
    held = {}
    for dtype in ("model", "fp8"):
        plan, on = make_plan(index_dtype=dtype), copy.deepcopy(model).to(DEVICE)
        heads = sum(len(layer.retrieval) for layer in plan.layers if layer.index == "full")
        with applied(on, plan, make_tensors(plan)):
            for kernels in ("reference", "triton"):
                cache = new_cache(on, kernels)  # type: ignore[arg-type]
                decode_steps(on, ids[:, :42].to(DEVICE), 41, cache)
                held[dtype, kernels] = kv_bytes(cache)
    assert held["model", "reference"] - held["fp8", "reference"] == 2 * heads * 42 * (4 * 4 - 5)
    slots = 2048 + 1
    assert held["model", "triton"] - held["fp8", "triton"] == 2 * heads * slots * (4 * 4 - 5)
    assert resident_bytes(make_plan(index_dtype="fp8"), 42, 4)["index"] == heads * 42 * 5
