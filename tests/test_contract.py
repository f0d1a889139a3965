"""The execution contract, row by row, against an independent reference (contract_plans.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_plans import (
    ANY_CHUNK,
    PLANS,
    PROMPT,
    SHAPE,
    SINKS,
    TOTAL,
    WINDOW,
    decode_steps,
    make_plan,
    make_tensors,
    reference,
    sharp_model,
)
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import sparsec
from sparsec.plan import Plan
from sparsec.plugins.runtime import (
    added_tensors,
    applied,
    install,
    kv_bytes,
    new_cache,
    rows_as,
    uninstall,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return sharp_model()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 97, (2, TOTAL), generator=torch.Generator().manual_seed(1))


# Prefill and decode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_prefill_and_decode_equal_the_reference(name: str, model: Any, ids: Tensor) -> None:
    plan = PLANS[name]
    tensors = make_tensors(plan)
    with reference(model, plan, tensors, PROMPT):
        expected = model(ids, use_cache=False).logits
    dense = model(ids, use_cache=False).logits
    with applied(model, plan, tensors):
        found = decode_steps(model, ids, PROMPT, new_cache(model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - dense).abs().max() > 1e-2  # the plan did something


@pytest.mark.parametrize("name", PLANS)
def test_a_chunk_of_decode_rows_equals_single_steps(name: str, model: Any, ids: Tensor) -> None:
    plan = PLANS[name]
    with applied(model, plan, make_tensors(plan)):
        steps = decode_steps(model, ids, PROMPT, new_cache(model))[:, PROMPT:]
        cache = new_cache(model)
        model(ids[:, :PROMPT], past_key_values=cache)
        with rows_as("decode"):
            chunk = model(ids[:, PROMPT:], past_key_values=cache).logits
    torch.testing.assert_close(chunk, steps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ANY_CHUNK)
@pytest.mark.parametrize("size", [1, 3, 7, 8, 13, 39])
def test_prefill_does_not_depend_on_the_chunk_size(size: int, name: str, model: Any, ids: Tensor) -> None:
    prefill_in_chunks(PLANS[name], size, model, ids)


@pytest.mark.parametrize("size", [8, 16, 24])
def test_query_blocks_do_not_depend_on_chunks_that_begin_with_one(size: int, model: Any, ids: Tensor) -> None:
    prefill_in_chunks(PLANS["query blocks"], size, model, ids)


def prefill_in_chunks(plan: Plan, size: int, model: Any, ids: Tensor) -> None:
    """In one call, and in calls of so many tokens: the same."""
    with applied(model, plan, make_tensors(plan)), rows_as("prefill"):
        whole = model(ids, use_cache=False).logits
        cache, parts = new_cache(model), []
        for start in range(0, TOTAL, size):
            parts.append(model(ids[:, start : start + size], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_identity_plan_equals_dense_in_prefill_and_decode(model: Any, ids: Tensor) -> None:
    dense = model(ids, use_cache=False).logits
    plan = make_plan(index=("full", "full", "none", "full"), window=TOTAL, top_p=1.0)
    with applied(model, plan, make_tensors(plan)):
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decode_steps(model, ids, PROMPT, new_cache(model)), dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids, use_cache=False).logits, dense)  # and uninstalled without trace


def test_min_context_as_long_as_the_text_is_dense(model: Any, ids: Tensor) -> None:
    dense = model(ids, use_cache=False).logits
    plan = make_plan(min_context=TOTAL)
    with applied(model, plan, make_tensors(plan)):
        torch.testing.assert_close(decode_steps(model, ids, PROMPT, new_cache(model)), dense, atol=1e-5, rtol=1e-5)


PADDED = {
    "selected": make_plan(min_context=12),
    "compensated": make_plan(min_context=12, compensate=True),
    "query blocks": make_plan(min_context=12, prefill="selector", query_block=4),
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("pads", [(5, 0), (0, 3), (11, 4)])
def test_padding_on_the_left_changes_nothing(pads: tuple[int, int], name: str, model: Any, ids: Tensor) -> None:
    plan = PADDED[name]
    most = max(pads)
    padded = torch.zeros(2, most + TOTAL, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, count in enumerate(pads):  # rows of different lengths: what is cut off is at the end
        padded[row, most - most + count : count + TOTAL] = ids[row]
        padded[row, count + TOTAL :] = 5
        mask[row, count:] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with applied(model, plan, make_tensors(plan)):
        alone = [decode_steps(model, ids[row : row + 1], PROMPT - 11, new_cache(model)) for row in range(2)]
        together = []
        for row in range(2):
            prompt = PROMPT - 11 + pads[row]
            inputs = {"attention_mask": mask[row : row + 1], "position_ids": positions[row : row + 1]}
            together.append(decode_steps(model, padded[row : row + 1], prompt, new_cache(model), **inputs))
    for row in range(2):
        found = together[row][:, pads[row] : pads[row] + TOTAL]
        torch.testing.assert_close(found, alone[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PADDED)
def test_a_batch_of_unequal_prompts_generates_what_each_does_alone(name: str, model: Any, ids: Tensor) -> None:
    plan = PADDED[name]
    first, second = ids[:1, :37], ids[1:, :25]
    batch = torch.zeros(2, 37, dtype=torch.long)
    mask = torch.zeros_like(batch)
    batch[0], mask[0] = first[0], 1
    batch[1, 12:], mask[1, 12:] = second[0], 1
    with applied(model, plan, make_tensors(plan)):
        both = model.generate(batch, attention_mask=mask, max_new_tokens=16, do_sample=False)
        for row, prompt in enumerate((first, second)):
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
            assert torch.equal(both[row, -16:], alone[0, -16:])


@pytest.mark.parametrize(
    "plan",
    [make_plan(), make_plan(compensate=True), make_plan(prefill="selector", query_block=1)],
    ids=["windowed", "compensated", "single queries"],
)
def test_padding_in_the_middle_of_a_conversation_changes_nothing(plan: Plan, model: Any, ids: Tensor) -> None:
    row = ids[:1]
    gap = torch.cat((row[:, :30], torch.zeros(1, 7, dtype=torch.long), row[:, 30:]), 1)
    mask = torch.ones_like(gap)
    mask[:, 30:37] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with applied(model, plan, make_tensors(plan)), rows_as("prefill"):
        plain = model(row, use_cache=False).logits
        cache = new_cache(model)
        for start, stop in ((0, 37), (37, 50), (50, 67)):
            out = model(
                gap[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
            )
    torch.testing.assert_close(out.logits[:, -17:], plain[:, -17:], atol=1e-4, rtol=1e-4)


# Memory ----------------------------------------------------------------------------------------------------------


def test_local_kv_heads_hold_sinks_and_window_only(model: Any, ids: Tensor) -> None:
    plan = make_plan(index=("none",) * 4, heads=((0,) * 6,) * 4)
    with applied(model, plan):
        cache = new_cache(model)
        decode_steps(model, ids, PROMPT, cache)
        for layer in cache.layers:
            assert layer.full_keys is None
            assert layer.local.keys.shape == (2, 3, SINKS + WINDOW, 16)
            held = layer.local.pos[0].sort().values.tolist()
            assert held == [0, 1, *range(TOTAL - WINDOW, TOTAL)]
        assert cache.get_seq_length() == TOTAL
        per_token = 2 * 3 * 16 * 4 * 2 * SHAPE.layers  # keys and values, heads, dim, bytes, rows
        positions = 2 * (SINKS + WINDOW) * 8 * SHAPE.layers
        assert kv_bytes(cache) == (SINKS + WINDOW) * per_token + positions


def test_bytes_follow_the_plan_head_by_head(model: Any, ids: Tensor) -> None:
    plan = make_plan()
    with applied(model, plan, make_tensors(plan)):
        cache = new_cache(model)
        decode_steps(model, ids, PROMPT, cache)
        for layer, planned in zip(cache.layers, plan.layers, strict=True):
            local = planned.local_kv_heads(SHAPE.group)
            full = SHAPE.kv_heads - len(local)
            assert (layer.full_keys is None) == (full == 0)
            if full:
                assert layer.full_keys.shape == (2, full, TOTAL, 16)
            assert (layer.index_keys is not None) == (planned.index == "full")
            if planned.index == "full":
                assert layer.index_keys.shape == (2, len(planned.retrieval), TOTAL, 4)


# GQA -------------------------------------------------------------------------------------------------------------


def permuted(model: Any, order: list[int]) -> Any:
    """The same function with KV heads (and their query heads) in another order."""
    other = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    query = [2 * kv + place for kv in order for place in range(2)]
    for block in other.model.layers:
        attention = block.self_attn
        for name, heads in (("q_proj", query), ("k_proj", order), ("v_proj", order)):
            weight = getattr(attention, name).weight
            weight.copy_(weight.view(-1, 16, weight.shape[1])[heads].flatten(0, 1))
        output = attention.o_proj.weight
        output.copy_(output.view(output.shape[0], -1, 16)[:, query].flatten(1))
    return other


def test_permuted_groups_with_the_plan_permuted_alike_give_the_same(model: Any, ids: Tensor) -> None:
    order = [2, 0, 1]
    query = [2 * kv + place for kv in order for place in range(2)]
    plan = make_plan()
    tensors = make_tensors(plan)
    moved = plan.edit(
        layers=[{"heads": [layer.heads[h] for h in query], "index": layer.index} for layer in plan.layers]  # type: ignore[index]
    )
    renamed = {}
    for i, layer in enumerate(plan.layers):
        if layer.index == "full":
            rows = [layer.retrieval.index(h) for h in query if h in layer.retrieval]
            for part in ("q_proj", "k_proj"):
                name = f"model.layers.{i}.self_attn.indexer.{part}.weight"
                renamed[name] = tensors[name][rows]
    other = permuted(model, order)
    with applied(model, plan, tensors), applied(other, moved, renamed):
        expected = decode_steps(model, ids, PROMPT, new_cache(model))
        found = decode_steps(other, ids, PROMPT, new_cache(other))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with applied(other, plan, tensors):
        wrong = decode_steps(other, ids, PROMPT, new_cache(other))
    assert (wrong - expected).abs().max() > 1e-2


# Transformers' way of doing things -------------------------------------------------------------------------------


def test_generate_equals_a_loop_of_steps(model: Any, ids: Tensor) -> None:
    plan = make_plan()
    prompt = ids[:, :30]
    with applied(model, plan, make_tensors(plan)):
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
        cache, tokens = new_cache(model), prompt
        logits = model(tokens, past_key_values=cache).logits
        for _ in range(20):
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
            logits = model(tokens[:, -1:], past_key_values=cache).logits
    assert torch.equal(found, tokens)


def test_several_turns_on_one_cache_equal_one_long_conversation(model: Any, ids: Tensor) -> None:
    plan = make_plan()
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    with applied(model, plan, make_tensors(plan)):
        cache = DynamicCache(config=model.config)  # the caller's own object
        first = model.generate(ids[:1, :20], past_key_values=cache, **options).sequences
        assert cache.get_seq_length() == 25
        second_in = torch.cat((first, ids[:1, 20:30]), 1)
        second = model.generate(second_in, past_key_values=cache, **options).sequences
        again, tokens = new_cache(model), second[:, :-1]
        with rows_as("prefill"):
            model(tokens[:, :20], past_key_values=again)
        for i in range(20, 25):
            model(tokens[:, i : i + 1], past_key_values=again)
        logits = [model(tokens[:, 25:36], past_key_values=again).logits[:, -1:]]
        for i in range(36, tokens.shape[1]):
            logits.append(model(tokens[:, i : i + 1], past_key_values=again).logits)
    assert torch.equal(torch.cat(logits, 1).argmax(-1), second[:, -6:])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5, "temperature": 0.9},
        {"num_return_sequences": 3, "do_sample": True},
        {"prefill_chunk_size": 7, "do_sample": False},
    ],
    ids=["beams", "sampling", "several samples", "chunked prefill"],
)
def test_generation_options_work_as_with_an_identity_plan(options: dict[str, Any], model: Any, ids: Tensor) -> None:
    prompt = ids[:, :29]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, **options}
    plan = make_plan(index=("full", "full", "none", "full"), window=TOTAL, top_p=1.0)
    torch.manual_seed(5)
    expected = model.generate(prompt, **arguments)
    with applied(model, plan, make_tensors(plan)):
        torch.manual_seed(5)
        assert torch.equal(model.generate(prompt, **arguments), expected)
    with applied(model, make_plan(), make_tensors(make_plan())):
        assert model.generate(prompt, **arguments).shape == expected.shape


def test_what_a_plan_cannot_run_is_refused_with_a_reason(model: Any, ids: Tensor) -> None:
    plan = make_plan()
    with applied(model, plan, make_tensors(plan)):
        with pytest.raises(ValueError, match="2-D padding masks"):
            model(ids, attention_mask=torch.zeros(2, 1, TOTAL, TOTAL), use_cache=False)
        with pytest.raises(ValueError, match="not packed"):
            model(ids, position_ids=torch.arange(30).repeat(2)[None], use_cache=False)
        with pytest.raises(ValueError, match="default cache"):
            model.generate(ids, max_new_tokens=2, cache_implementation="static")
        cache = new_cache(model)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(5)
    dense_cache = DynamicCache(config=model.config)
    model(ids, past_key_values=dense_cache)
    with applied(model, plan, make_tensors(plan)), pytest.raises(ValueError, match="filled by a dense model"):
        model(ids[:, :1], past_key_values=dense_cache)


# Save and load ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, Tensor, Tensor]:
    """An artifact's model files, inputs, and logits under the plan and dense."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3,
        head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    folder = make_checkpoint(config)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(3, 250, (1, TOTAL))
    dense = model(tokens, use_cache=False).logits
    plan = make_plan()
    install(model, plan, make_tensors(plan))
    sparse = decode_steps(model, tokens, PROMPT, new_cache(model))
    model.save_pretrained(tmp_path / "saved")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    torch.save({"tokens": tokens, "sparse": sparse, "dense": dense}, tmp_path / "expected.pt")
    uninstall(model)
    return tmp_path / "saved", tmp_path / "expected.pt", sparse, dense


def run_python(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "how", ["sparsec.load(sys.argv[1]).model", "AutoModelForCausalLM.from_pretrained(sys.argv[1])"]
)
def test_a_fresh_process_computes_the_same(saved: Any, how: str) -> None:
    folder, expected, *_ = saved
    code = f"""
import sys, torch, sparsec
from transformers import AutoModelForCausalLM
model, expected = {how}, torch.load(sys.argv[2])
tokens, cache = expected["tokens"], sparsec.new_cache(model)
with torch.no_grad():
    found = [model(tokens[:, :{PROMPT}], past_key_values=cache).logits]
    for i in range({PROMPT}, {TOTAL}):
        found.append(model(tokens[:, i : i + 1], past_key_values=cache).logits)
print(float((torch.cat(found, 1) - expected["sparse"]).abs().max()))
"""
    assert float(run_python(code, folder, expected)) < 1e-5


def test_stock_transformers_opens_an_artifact_as_the_dense_model(saved: Any) -> None:
    folder, expected, sparse, dense = saved
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model, expected = AutoModelForCausalLM.from_pretrained(sys.argv[1]), torch.load(sys.argv[2])
assert "sparsec" not in sys.modules
with torch.no_grad():
    print(float((model(expected["tokens"]).logits - expected["dense"]).abs().max()))
"""
    assert float(run_python(code, folder, expected)) < 1e-5
    assert (sparse - dense).abs().max() > 1e-3


def test_the_facade_loads_lazily() -> None:
    code = "import sys, sparsec; print('torch' in sys.modules, 'click' in sys.modules); sparsec.load"
    assert run_python(code).split() == ["False", "False"]
    assert set(sparsec.__all__) == {name for name in sparsec.__all__ if getattr(sparsec, name, None) is not None}


def test_added_tensors_round_trip(model: Any) -> None:
    plan = make_plan()
    tensors = make_tensors(plan)
    with applied(model, plan, tensors):
        found = added_tensors(model)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
