"""Head scores on repeated tokens, and the compensation token: sums, chunks, wrap-around, padding, gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.needles import FIRST
from sparsec.calibrate.repeats import Repeats, echo_and_induction, ordinary_tokens, repeat_scores, repeats
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.explain import artifact_data, artifact_text
from sparsec.compiler.pipeline import Job, compile_model
from sparsec.compiler.recipe import make_recipe
from sparsec.compiler.registry import known_passes, make_passes
from sparsec.errors import CalibrationError, PlanError, UsageError
from sparsec.events import silent
from sparsec.passes.base import Program
from sparsec.plan import Plan, Window
from sparsec.plugins.cache import LocalStore
from sparsec.plugins.compensation import compensated
from sparsec.plugins.families import shape_of
from sparsec.plugins.load import load
from sparsec.plugins.runtime import applied, kv_bytes, new_cache, rows_as, stepping
from sparsec.plugins.step import Step

# Scores ----------------------------------------------------------------------------------------------------------


def attention(length: int, target: Any) -> Tensor:
    """[1, length, length]: each row gives half of its weight to token 0 and half to ``target(row)``."""
    weights = torch.zeros(1, length, length)
    weights[0, :, 0] = 0.5
    for t in range(length):
        weights[0, t, target(t)] += 0.5
    return weights


def test_echo_and_induction_are_told_apart_on_a_hand_made_attention() -> None:
    first, period, length = 3, 5, 18  # three copies
    rows = torch.arange(first + period, length)
    for back, expected in ((period, (0.5, 0.0)), (period - 1, (0.0, 0.5)), (2, (0.0, 0.0))):
        weights = attention(length, lambda t, back=back: max(0, t - back))
        found = echo_and_induction(weights[:, rows], rows, first, period)
        assert [float(each.mean()) for each in found] == list(expected)


def test_all_earlier_copies_count_and_what_stands_before_the_first_does_not() -> None:
    first, period, length = 3, 5, 18
    weights = torch.full((1, length, length), 0.01)
    rows = torch.tensor([8, 12, 13, 17])  # the second copy's first and last token, then the third's
    echo, induction = echo_and_induction(weights[:, rows], rows, first, period)
    torch.testing.assert_close(echo[0], torch.tensor([0.01, 0.01, 0.02, 0.02]))
    torch.testing.assert_close(induction, echo)


def test_scores_of_a_model_are_those_of_its_attention_weights() -> None:
    model = small_model()
    tokens = torch.randint(1, 90, (6 + 3 * 9,), generator=torch.Generator().manual_seed(0))
    tokens[15:24] = tokens[24:33] = tokens[6:15]
    found = repeat_scores(model, [Repeats(tokens, 6, 9)], shape_of(model.config), silent)[:, 0]
    model.set_attn_implementation("eager")
    weights = model(tokens[None], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    for layer, seen in enumerate(weights):
        for head in range(6):
            echo = sum(
                float(seen[0, head, t, t - 9] + (seen[0, head, t, t - 18] if t >= 24 else 0)) for t in range(15, 33)
            )
            behind = sum(
                float(seen[0, head, t, t - 8] + (seen[0, head, t, t - 17] if t >= 24 else 0)) for t in range(15, 33)
            )
            assert found[:, layer, head].tolist() == pytest.approx([echo / 18, behind / 18], abs=1e-5)


def test_sequences_repeat_different_ordinary_tokens(tiny_deep: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_deep)
    ordinary = ordinary_tokens(tokenizer)
    assert len(ordinary) == 256
    assert not set(ordinary) & set(tokenizer.all_special_ids)
    made = repeats(tokenizer, period=40, copies=3, draws=3, seed=5)
    for each in made:
        body = each.tokens[each.first :].view(3, 40)
        assert torch.equal(body[0], body[1])
        assert torch.equal(body[0], body[2])
        assert len(each.tokens[: each.first + 40].unique()) == FIRST + 40
        assert set(each.tokens.tolist()) <= set(ordinary)
        assert each.document().pairs == ((range(64, 104), range(144, 184)),)
    assert len({tuple(each.tokens.tolist()) for each in made}) == 3
    again = repeats(tokenizer, period=40, copies=3, draws=1, seed=5)
    assert torch.equal(again[0].tokens, made[0].tokens)
    with pytest.raises(CalibrationError, match="need 264 ordinary tokens, the vocabulary has 256: set a smaller"):
        repeats(tokenizer, period=200, copies=2, draws=1, seed=0)


# The pass --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tiny_deep: Path) -> Program:
    model = AutoModelForCausalLM.from_pretrained(tiny_deep).eval().requires_grad_(False)
    return Program(model, Plan.dense(shape_of(model.config), "test"), {}, seed=1)


@pytest.fixture(scope="module")
def calibration(tiny_deep: Path) -> Calibration:
    return Calibration(read_corpus(), AutoTokenizer.from_pretrained(tiny_deep))


def razor(**options: Any) -> Any:
    return known_passes()["razor"].model_validate({"window": 32, "draws": 2, "copies": 3, **options})


def test_kept_are_the_best_of_both_scores(program: Program, calibration: Calibration) -> None:
    result = razor(induction=0.25, echo=0.125).run(program, calibration)
    kept = {(layer, head) for layer, plan in enumerate(result.plan.layers) for head in plan.retrieval}
    for name, count in (("induction", 4), ("echo", 2)):
        scores = torch.tensor(result.measured[name]["scores"])
        chosen = {tuple(head) for head in result.measured[name]["kept"]}
        assert len(chosen) == count
        assert min(scores[at] for at in chosen) >= scores.flatten().sort(descending=True).values[count - 1] - 1e-6
        assert chosen <= kept
    assert len(kept) == result.measured["kept_heads"] <= 6
    assert result.plan.window == Window(size=32, sinks=4, compensate=True)
    assert not result.plan.indexed()
    assert result.measured["period"] == 40


def test_whole_kv_heads_are_kept_or_freed(program: Program, calibration: Calibration) -> None:
    plan = razor(granularity="kv_head", compensation=False).run(program, calibration).plan
    assert not plan.window.compensate
    for layer in plan.layers:
        assert len(layer.local) == plan.model.group * len(layer.local_kv_heads(plan.model.group))


def test_what_does_not_fit_or_keeps_nothing_is_refused(program: Program, calibration: Calibration) -> None:
    with pytest.raises(CalibrationError, match="the model reads 1024: set a smaller window, period or copies"):
        razor(copies=30).run(program, calibration)
    with pytest.raises(UsageError, match="no head would be kept: use the pass window"):
        make_passes({"razor": {"induction": 0, "echo": 0}})
    split = razor().run(program, calibration).plan
    for name in ("razor", "window"):  # rtpurbo goes on from a split: tests/test_start.py
        with pytest.raises(PlanError, match=f"{name} starts from a dense plan, this one already has local heads"):
            known_passes()[name]().run(Program(program.model, split, {}), calibration)


@pytest.mark.parametrize("pair", [("razor", "window"), ("razor", "rtpurbo"), ("window", "rtpurbo")])
def test_passes_that_split_exclude_each_other(pair: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="exclude each other: drop one"):
        make_passes({name: {} for name in pair})


def test_an_artifact_says_how_its_heads_were_found(tiny_deep: Path, tmp_path: Path) -> None:
    gate = {"context": 256, "max_loss": 1}
    options = {"window": 32, "draws": 2, "copies": 3, "induction": 0.25, "echo": 0.1}
    out, recipe = tmp_path / "out", make_recipe({"passes": {"razor": options}, "gate": gate})
    compile_model(Job(str(tiny_deep), out, recipe, tmp_path / "cache"))
    model, _ = load(out)
    assert model.sparsec_plan.window.compensate
    report = (out / "report.html").read_text(encoding="utf-8")
    for words in (
        "2, each 3 times 40 random tokens",
        "induction heads",
        "echo heads",
        "The dense model itself continues only",  # a random model copies nothing, and that is said
        "the mean of all others stands for them",
    ):
        assert words in report, words
    assert "one token more, the mean of all that left the window" in artifact_text(out, artifact_data(out))


# The compensation token ------------------------------------------------------------------------------------------

WINDOW, SINKS, TOTAL = 6, 2, 47
HEADS = ((1, 0, 0, 0, 0, 0), (0,) * 6)  # a local head beside a retrieval head, and evicted KV heads


def small_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=16, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.mul_(6)
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 97, (2, TOTAL), generator=torch.Generator().manual_seed(1))


def plan_of(model: Any, min_context: int = 0, **window: Any) -> Plan:
    return Plan.dense(shape_of(model.config), "test").edit(
        layers=[{"heads": heads} for heads in HEADS],
        window={"size": WINDOW, "sinks": SINKS, "compensate": True, **window},
        min_context=min_context,
    )


def by_hand(q: Tensor, k: Tensor, v: Tensor, t: int, min_context: int) -> Tensor:
    """Row t of one head in float64: q [dim], k and v [tokens, dim]."""
    gone = [] if t < min_context else list(range(SINKS, t - WINDOW + 1))
    seen = [j for j in range(t + 1) if j not in gone]
    logits = [float(q.double() @ k[j].double()) * 0.25 for j in seen]
    values = [v[j].double() for j in seen]
    if gone:
        logits.append(float(q.double() @ k[gone].double().mean(0)) * 0.25 + math.log(len(gone)))
        values.append(v[gone].double().mean(0))
    return torch.softmax(torch.tensor(logits, dtype=torch.float64), 0) @ torch.stack(values)


@pytest.mark.parametrize("min_context", [0, 20])
@pytest.mark.parametrize("chunks", [(47,), (30, 1, 1, 15), (5, 40, 2), (1,) * 47])
def test_a_layer_equals_rows_written_out(chunks: tuple[int, ...], min_context: int, model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, heads, TOTAL, 16, generator=generator) for heads in (4, 2, 2))
    heads, plan = torch.tensor([0, 0, 1, 1]), plan_of(model, min_context)
    expected = torch.stack(
        [
            torch.stack([by_hand(q[0, h, t], k[0, h // 2], v[0, h // 2], t, min_context) for t in range(TOTAL)])
            for h in range(4)
        ]
    )
    pos = torch.arange(TOTAL)[None]
    found, dropped, start = [], None, 0
    for size in chunks:
        stop = start + size
        part, dropped = compensated(
            q[:, :, start:stop],
            k[:, :, :stop],
            v[:, :, :stop],
            heads,
            pos[:, start:stop],
            pos[:, :stop],
            plan,
            0.25,
            dropped,
        )
        found.append(part)
        start = stop
    torch.testing.assert_close(torch.cat(found, 2)[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_store_keeps_the_sums_of_what_it_forgets(model: Any) -> None:
    window = Window(size=WINDOW, sinks=SINKS, compensate=True)
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(2, 3, TOTAL, 16, generator=generator) for _ in range(2))
    pos = torch.arange(TOTAL).repeat(2, 1)
    pos[1] = (pos[1] - 9).clamp_min(-1)  # the second row begins with padding
    store, start = LocalStore(window, min_context=12), 0
    for size in (9, 14, 1, 1, 1, 5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4):
        part = slice(start, start + size)
        if not (size == 1 and store.write_one(k[:, :, part], v[:, :, part], pos[:, part])):
            store.store(*store.joined(k[:, :, part], v[:, :, part], pos[:, part]))
        start += size
        for row in range(2):
            length = int(pos[row, :start].max()) + 1
            gone = range(SINKS, length - WINDOW) if store.ring else range(0)
            at = [j + (9 if row else 0) for j in gone]
            if store.dropped is not None:
                torch.testing.assert_close(store.dropped.keys[row], k[row][:, at].sum(1), atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(store.dropped.values[row], v[row][:, at].sum(1), atol=1e-5, rtol=1e-5)
                assert int(store.dropped.upto[row]) == max(SINKS, length - WINDOW)
            held = {int(j) for j in store.pos[row] if j >= 0}
            assert held == set(range(length)) - set(gone)
    assert start == TOTAL
    assert store.ring
    assert store.keys.shape[2] == WINDOW + SINKS


def test_the_sums_are_counted_and_follow_their_sequences(model: Any, ids: Tensor) -> None:
    with applied(model, plan_of(model)):
        cache = new_cache(model)
        model(ids, past_key_values=cache)
        compensating = kv_bytes(cache)
        first = cache.layers[0]
        assert first.dropped.keys.shape == (2, 1, 16)  # of the one full KV head that a local head reads
        assert first.local.dropped.keys.shape == (2, 2, 16)
        swapped = ids.flip(0)
        cache.reorder_cache(torch.tensor([1, 0]))
        follow = model(ids[:, :1], past_key_values=cache).logits
        other = new_cache(model)
        model(swapped, past_key_values=other)
        torch.testing.assert_close(follow, model(ids[:, :1], past_key_values=other).logits, atol=1e-5, rtol=1e-5)
        cache.layers[0].reset()
        assert cache.layers[0].nbytes == 0
    with applied(model, plan_of(model, compensate=False)):
        cache = new_cache(model)
        model(ids, past_key_values=cache)
        kv_heads, sequences = 3, 2
        assert compensating - kv_bytes(cache) == 2 * sequences * (2 * kv_heads * 16 * 4) + (2 + 1) * sequences * 8


def test_what_the_cache_holds_does_not_matter_where_nothing_is_stored(model: Any, ids: Tensor) -> None:
    """A call that only reads the cache sees what one that writes it sees, and leaves the sums alone."""
    with applied(model, plan_of(model)), rows_as("prefill"):
        cache = new_cache(model)
        model(ids[:, :30], past_key_values=cache)
        before = [layer.local.dropped.upto.clone() for layer in cache.layers]
        for size in (1, 9):
            with stepping(Step(decode=False, commit=False)):
                read = model(ids[:, 30 : 30 + size], past_key_values=cache).logits
            assert all(torch.equal(layer.local.dropped.upto, b) for layer, b in zip(cache.layers, before, strict=True))
            whole = model(ids[:, : 30 + size], use_cache=False).logits[:, 30:]
            torch.testing.assert_close(read, whole, atol=1e-4, rtol=1e-4)


def test_a_ragged_batch_padded_on_both_sides_equals_each_row_alone(model: Any, ids: Tensor) -> None:
    plan = plan_of(model, min_context=12)
    inputs = torch.zeros(2, 50, dtype=torch.long)
    inputs[0, 3:47] = ids[0, :44]
    inputs[1, 20:50] = ids[1, :30]
    mask = (inputs > 0).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with applied(model, plan), rows_as("prefill"):
        alone = [model(ids[:1, :44], use_cache=False).logits, model(ids[1:, :30], use_cache=False).logits]
        cache, parts = new_cache(model), []
        for start, stop in ((0, 25), (25, 26), (26, 27), (27, 50)):
            parts.append(
                model(
                    inputs[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                ).logits
            )
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[:1, 3:47], alone[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1:, 20:50], alone[1], atol=1e-4, rtol=1e-4)


def test_long_prompts_run_in_tiles(model: Any) -> None:
    """More rows than a tile holds, against the same rows one chunk at a time."""
    ids = torch.randint(1, 97, (1, 1100), generator=torch.Generator().manual_seed(4))
    with applied(model, plan_of(model, min_context=9)), rows_as("prefill"):
        whole = model(ids, use_cache=False).logits
        cache = new_cache(model)
        parts = [model(ids[:, start : start + 90], past_key_values=cache).logits for start in range(0, 1100, 90)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_window_as_long_as_the_text_is_dense(model: Any, ids: Tensor) -> None:
    dense = model(ids, use_cache=False).logits
    with applied(model, plan_of(model, size=TOTAL)):
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_the_compensation_token(model: Any) -> None:
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, heads, 16, 16, generator=generator).requires_grad_() for heads in (2, 1, 1))
    pos, heads, plan = torch.arange(16)[None], torch.tensor([0, 0]), plan_of(model)

    def loss(k: Tensor, v: Tensor) -> Tensor:
        return compensated(q, k, v, heads, pos, pos, plan, 0.25, None)[0][:, :, -1].square().sum()

    found = torch.autograd.grad(loss(k, v), (k, v))
    for place, grad in enumerate(found):
        assert float(grad[0, 0, 5].abs().sum()) > 0  # a dropped token
        step = torch.zeros_like(k)
        step[0, 0, 5, 3] = 1e-2
        moved = [(k + step, v), (k, v + step)][place], [(k - step, v), (k, v - step)][place]
        slope = ((loss(*moved[0]) - loss(*moved[1])) / 2e-2).detach()
        assert float(slope) == pytest.approx(float(grad[0, 0, 5, 3]), abs=2e-3)
