"""What passes measure with: detection scores, the indexer fit, the loss of decode rows, replay from a boundary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsec.calibrate.capture import Captured, capture
from sparsec.calibrate.decode import decode_rows
from sparsec.calibrate.fit_windows import JUMPS, stretched, text_rows
from sparsec.calibrate.indexer_fit import (
    Forced,
    LayerSample,
    closed_form,
    kl,
    mean_kl,
    sample_window,
    scores,
    train,
)
from sparsec.calibrate.needles import NeedleDocument
from sparsec.calibrate.patterns import share, with_pattern
from sparsec.calibrate.replay import Replay
from sparsec.calibrate.retrieval_heads import needle_mass, stability, top_heads
from sparsec.calibrate.selector_stats import SelectorStats
from sparsec.calibrate.shared_fit import assigned, mean_multi_layer, multi_layer_loss, readers, train_shared
from sparsec.events import silent
from sparsec.plan import Plan
from sparsec.plugins.families import shape_of
from sparsec.plugins.runtime import applied, install, tensor_names, uninstall


@pytest.fixture(scope="module")
def model(small_llama: Callable[..., Any]) -> Any:
    return small_llama()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 60, (96,), generator=torch.Generator().manual_seed(1))


def plan_of(model: Any, heads: tuple[int, ...] = (1, 0, 0, 1), **selector: Any) -> Plan:
    options = {"rank": 8, "rope": "pre", "top_p": 0.7, "granularity": "token", "block": 4, "sinks": 1, "recent": 2}
    return Plan.dense(shape_of(model.config), "test").edit(
        layers=[{"heads": heads, "index": "full"}] * 4,
        window={"size": 16, "sinks": 1},
        selector={**options, **selector},
    )


def tensors_of(plan: Plan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: 0.2 * torch.randn(size, generator=generator) for name, size in tensor_names(plan).items()}


# Detection -------------------------------------------------------------------------------------------------------


def test_needle_mass_is_the_attention_of_later_rows_on_the_earlier_copy(model: Any, tokens: Tensor) -> None:
    document = NeedleDocument(tokens, ((range(20, 26), range(80, 86)), (range(40, 44), range(90, 94))))
    found = needle_mass(model, [document], shape_of(model.config), silent)[0]
    model.set_attn_implementation("eager")
    weights = model(tokens[None], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    for layer in range(4):
        for head in range(4):
            a = weights[layer][0, head]
            expected = (a[80:86, 20:26].sum(-1).mean() + a[90:94, 40:44].sum(-1).mean()) / 2
            assert found[layer, head] == pytest.approx(float(expected), abs=1e-5)


def test_ties_go_to_the_lower_layer_and_head_and_forbidden_layers_are_left_out() -> None:
    scores = torch.tensor([[0.5, 0.5], [0.5, 0.9], [1.0, 1.0]])
    assert top_heads(scores, 2, torch.tensor([True, True, False])) == [(0, 0), (1, 1)]


def test_stability_is_one_for_equal_halves_and_low_for_unrelated_ones() -> None:
    allowed = torch.ones(10, dtype=torch.bool)
    half = torch.rand(10, 8, generator=torch.Generator().manual_seed(0))
    assert stability(half.repeat(4, 1, 1), 12, allowed) == {"spearman": pytest.approx(1.0), "jaccard": 1.0}
    noise = stability(torch.rand(4, 10, 8, generator=torch.Generator().manual_seed(1)), 12, allowed)
    assert noise["jaccard"] < 0.5
    assert abs(noise["spearman"]) < 0.5


# The indexer fit -------------------------------------------------------------------------------------------------

HEADS = {1: (0, 3), 2: (2,)}
NONE = Forced(0, 0, lump=False)


def sampled(model: Any, tokens: Tensor, rope: str, mined: int = 0) -> dict[int, LayerSample]:
    generator = torch.Generator().manual_seed(0)
    rows = text_rows(96, 16, 64, generator)
    return sample_window(
        model, plan_of(model), HEADS, tokens, rows,
        rope=rope, mined=mined, forced=Forced(1, 4), generator=generator,
    )  # fmt: skip


def test_a_full_rank_closed_form_after_rope_is_exact(model: Any, tokens: Tensor) -> None:
    sample = sampled(model, tokens, "post")[1]
    wq, wk = closed_form([sample], 16, NONE)
    # Least squares for independent q and k is exact in expectation only; a small sample leaves a little.
    assert (
        float(kl(sample, sample.scale * torch.eye(16).repeat(2, 1, 1), torch.eye(16).repeat(2, 1, 1), 0, NONE)) < 1e-5
    )
    zq = torch.einsum("hmd,hrd->hmr", sample.q_in, wq)
    zk = torch.einsum("hnd,hrd->hnr", sample.k_in, wk)
    guess = (zq @ zk.transpose(-1, -2)).flatten()
    truth = (sample.q @ sample.k.transpose(-1, -2) * sample.scale).flatten()
    assert float(torch.corrcoef(torch.stack((guess, truth)))[0, 1]) > 0.8


@pytest.mark.parametrize("lump", [False, True])
def test_kl_is_forward_teacher_first_over_causal_keys(lump: bool, model: Any, tokens: Tensor) -> None:
    sample = sampled(model, tokens, "pre")[1]
    forced = Forced(2, 5, lump)
    generator = torch.Generator().manual_seed(4)
    wq, wk = (0.2 * torch.randn(2, 8, 16, generator=generator) for _ in range(2))
    expected = 0.0
    for head in range(2):
        for place, row in enumerate(sample.rows[:64].tolist()):
            logits = (sample.k[head, : row + 1] @ sample.q[head, place]) * sample.scale
            scores = (sample.k_in[head, : row + 1] @ wk[head].T) @ (wq[head] @ sample.q_in[head, place])
            p, s = logits.double().softmax(0), scores.double().softmax(0)
            if lump:
                held = torch.tensor([j < 2 or row - j < 5 for j in range(row + 1)])
                p, s = (torch.cat((x[~held], x[held].sum()[None])) for x in (p, s))
            expected += float((p * (p / s).log()).sum()) / 64
    assert float(kl(sample, wq, wk, 0, forced)) == pytest.approx(expected, rel=1e-4)


def test_training_lowers_the_divergence_and_keeps_the_best(model: Any, tokens: Tensor) -> None:
    windows = [sampled(model, tokens, "pre")]
    forced = Forced(1, 4)
    start = {i: closed_form([windows[0][i]], 8, forced) for i in HEADS}
    before = mean_kl(windows, start, forced)
    trained, losses = train(windows, start, forced=forced, steps=60, lr=5e-3, seed=0, listen=silent)
    assert len(losses) == 60
    assert mean_kl(windows, trained, forced) < before
    kept, _ = train(windows, trained, forced=forced, steps=20, lr=1e3, seed=0, listen=silent)
    assert math.isfinite(mean_kl(windows, kept, forced))


def test_mined_rows_are_those_with_the_sharpest_far_attention(model: Any, tokens: Tensor) -> None:
    plain, mined = sampled(model, tokens, "post"), sampled(model, tokens, "post", mined=10)

    def peak(sample: LayerSample, row: int) -> float:
        at = sample.rows.tolist().index(row)
        weights = (sample.k[:, : row + 1] @ sample.q[:, at, :, None])[..., 0].mul(sample.scale).softmax(-1)
        return float(weights[:, 1 : max(1, row - 3)].max()) if row > 4 else 0.0

    for layer in HEADS:
        added = set(mined[layer].rows.tolist()) - set(plain[layer].rows.tolist())
        assert added
        everything = sampled(model, tokens, "post", mined=96)[layer]
        peaks = {row: peak(everything, row) for row in everything.rows.tolist()}
        best = sorted(peaks, key=lambda row: -peaks[row])[:10]
        assert added <= set(best)


def test_stretched_positions_reach_the_end_in_a_few_jumps() -> None:
    for seed in range(20):
        found = stretched(100, 1000, torch.Generator().manual_seed(seed))
        steps = found.diff()
        assert (int(found[0]), int(found[-1])) == (0, 999)
        assert int(steps.min()) >= 1
        assert 1 <= int((steps > 1).sum()) <= JUMPS


def test_a_text_with_jumps_is_one_sequence_at_those_positions(model: Any, tokens: Tensor) -> None:
    positions = stretched(96, 256, torch.Generator().manual_seed(0))
    seen: list[Captured] = []
    capture(model, tokens[None], seen.append, positions)
    for each in seen:
        k, v = (x.repeat_interleave(2, 1) for x in (each.k, each.v))
        logits = each.q @ k.transpose(-1, -2) * each.scale
        weights = logits.masked_fill(torch.ones(96, 96).triu(1).bool(), float("-inf")).softmax(-1)
        torch.testing.assert_close(each.output, (weights @ v).transpose(1, 2), atol=1e-5, rtol=1e-4)
    cos, sin = model.model.rotary_emb(seen[0].q, positions[None])
    torch.testing.assert_close(seen[0].rope[0], cos)
    torch.testing.assert_close(seen[0].rope[1], sin)


# Indexers that serve several layers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(model: Any, tokens: Tensor) -> tuple[list[dict[int, LayerSample]], Plan, dict[int, tuple[Tensor, Tensor]]]:
    """Layer 0 serves 1 and 3, layer 2 itself alone; two retrieval heads each."""
    plan = with_pattern(plan_of(model), {0: "full", 1: "shared", 2: "full", 3: "full"})
    plan = plan.edit(layers=[{"heads": (1, 0, 0, 1), "index": index} for index in ("full", "shared", "shared", "full")])
    generator = torch.Generator().manual_seed(0)
    heads = dict.fromkeys(range(4), (0, 3))
    rows = text_rows(96, 16, 64, generator)
    window = sample_window(
        model, plan, heads, tokens, rows, rope="post", mined=0, forced=Forced(1, 4), generator=generator
    )
    weights = {i: closed_form([window[i]], 8, Forced(1, 4)) for i in (0, 3)}
    return [window], plan, weights


@pytest.mark.parametrize("lump", [False, True])
def test_the_multi_layer_loss_has_the_gradient_of_the_mean_target(lump: bool, shared: Any) -> None:
    (window,), plan, weights = shared
    forced = Forced(2, 5, lump)
    served = assigned([window], weights, plan, forced)
    assert readers(plan) == {0: [0, 1, 2], 3: [3]}
    wq, wk = (w.clone().requires_grad_() for w in weights[0])
    multi_layer_loss(window, (wq, wk), served[0], 0, 0, forced).backward()

    again = [w.detach().clone().requires_grad_() for w in (wq, wk)]
    said = scores(window[0], *again, 0)
    rows = window[0].rows[:64]
    seen = torch.arange(96)[None] <= rows[:, None]
    held = forced.mask(rows, 96) if lump else torch.zeros(len(rows), 96, dtype=torch.bool)
    total = torch.zeros(())
    for row in range(2):
        targets = [
            (sample.q[head, :64] @ sample.k[head].T * sample.scale).masked_fill(~seen, float("-inf")).softmax(-1)
            for layer, owners in served[0].items()
            for sample in [window[layer]]
            for head in range(2)
            if int(owners[head]) == row
        ]
        mean = torch.stack(targets).mean(0)
        s = said[row].masked_fill(~seen, float("-inf")).softmax(-1)
        parts = [(mean.masked_fill(held, 0.0), s.masked_fill(held, 0.0))]
        if lump:
            parts.append(((mean * held).sum(-1, keepdim=True), (s * held).sum(-1, keepdim=True)))
        for p, q in parts:
            each = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log()), 0.0)
            total = total + len(targets) * each.sum(-1).mean()
    total.backward()
    torch.testing.assert_close(again[0].grad, wq.grad, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(again[1].grad, wk.grad, atol=1e-5, rtol=1e-3)


def test_training_shared_indexers_lowers_what_they_miss_of_all_they_serve(shared: Any) -> None:
    windows, plan, weights = shared
    forced = Forced(1, 4)
    served = assigned(windows, weights, plan, forced)
    before = mean_multi_layer(windows, weights, served, forced)
    trained, after, losses = train_shared(
        windows, weights, plan, forced=forced, steps=61, lr=5e-3, seed=0, listen=silent
    )
    assert len(losses) == 61
    assert trained.keys() == after.keys() == {0, 3}
    assert mean_multi_layer(windows, trained, after, forced) < 0.9 * before


# Decode rows -----------------------------------------------------------------------------------------------------


def test_a_selector_that_keeps_all_finds_all_mass(model: Any, tokens: Tensor) -> None:
    plan = plan_of(model, top_p=1.0)
    stats = SelectorStats()
    with applied(model, plan, tensors_of(plan)):
        losses, resident = decode_rows(model, tokens, 64, stats)
    assert losses.shape == (31,)
    assert resident > 0
    summary = stats.summary()
    assert summary["recall_mean"] == pytest.approx(1.0, abs=1e-5)
    assert summary["kept_mean"] == summary["context_mean"] == pytest.approx(80.5)
    assert summary["heads"] == len(stats.table()) == 8


def test_dense_decode_rows_equal_a_plain_forward(model: Any, tokens: Tensor) -> None:
    logits = model(tokens[None], use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[64:-1], tokens[65:], reduction="none")
    torch.testing.assert_close(decode_rows(model, tokens, 64)[0], expected, atol=1e-5, rtol=1e-5)


# Replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_replay_from_the_changed_layer_equals_running_everything(layer: int, model: Any, tokens: Tensor) -> None:
    plan = with_pattern(plan_of(model), dict.fromkeys(range(4), "full"))
    tensors = tensors_of(plan)
    changed = share(plan, layer)
    kept = {name: tensors[name] for name in tensor_names(changed)}
    with applied(model, changed, kept):
        expected = decode_rows(model, tokens, 64)[0]
    install(model, plan, tensors)
    replay = Replay(model, tokens, 64)
    before = replay.losses
    install(model, changed, kept)
    state = replay.run(layer)
    found = state.losses
    assert torch.equal(found, replay.run(0).losses)
    for higher in range(layer, 4):  # what is known of a run may be gone on from at any layer
        assert torch.equal(replay.run(higher, state).losses, found)
    uninstall(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(found, before)
