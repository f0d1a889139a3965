"""What is said of selectors: recall with and without sinks, tokens against blocks, the oracle, and bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sparsec.calibrate.decode import decode_rows
from sparsec.calibrate.decode_bytes import Read, break_even, read_bytes, resident_bytes
from sparsec.calibrate.selector_stats import SAMPLED, SelectorStats
from sparsec.compiler.explain import artifact_data, artifact_text
from sparsec.plan import ModelShape, Plan, Selector
from sparsec.plugins.cache import SparseLayer
from sparsec.plugins.families import shape_of
from sparsec.plugins.runtime import applied, kv_bytes, new_cache, tensor_names
from sparsec.plugins.selector import causal, select
from sparsec.plugins.step import Selection

SELECTOR: dict[str, Any] = {
    "rank": 4, "rope": "pre", "top_p": 0.9, "granularity": "token", "block": 8, "sinks": 2, "recent": 4,
}  # fmt: skip
SHAPE = ModelShape(model_type="llama", layers=2, heads=4, kv_heads=2, head_dim=16)
KEYS = 64


def plan_of(heads: tuple[tuple[int, ...], ...] = ((1, 0, 0, 0), (0, 0, 0, 0)), **selector: Any) -> Plan:
    return Plan.dense(SHAPE, "test").edit(
        layers=[{"heads": h, "index": "full" if any(h) else "none"} for h in heads],
        window={"size": 12, "sinks": 2},
        selector={**SELECTOR, **selector},
    )


def seen(plan: Plan, true: Tensor, scores: Tensor, rows: int = 1, **given: Any) -> Selection:
    """The last rows of a context of KEYS tokens. true, scores: logits [heads, keys], the same for every row."""
    heads = plan.layers[0].retrieval
    k = torch.eye(KEYS)[None, None].expand(1, len(heads), KEYS, KEYS)
    q_pos = torch.arange(KEYS - rows, KEYS)[None]
    k_pos = torch.arange(KEYS)[None]
    assert plan.selector is not None
    of_rows = scores[None, :, None].expand(1, -1, rows, -1)
    values: dict[str, Any] = {
        "layer": 0,
        "heads": heads,
        "q": true[None, :, None].expand(1, -1, rows, -1),
        "k": k,
        "keep": select(of_rows, q_pos, k_pos, plan.selector, plan.min_context),
        "visible": causal(q_pos, k_pos),
        "scale": 1.0,
        "plan": plan,
        "q_pos": q_pos,
        "k_pos": k_pos,
        "scores": lambda: of_rows,
    }
    return Selection(**values | given)


def spread(**masses: float) -> Tensor:
    """Logits of one head whose attention is ``k<token>`` as given, the rest spread evenly over all other tokens."""
    given = {int(name[1:]): mass for name, mass in masses.items()}
    rest = (1 - sum(given.values())) / (KEYS - len(given))
    return torch.tensor([given.get(token, max(rest, 1e-9)) for token in range(KEYS)]).log()[None]


def one(selection: Selection) -> dict[str, Any]:
    stats = SelectorStats()
    stats(selection)
    [row] = stats.table()
    return row


# Hand-made distributions -----------------------------------------------------------------------------------------


def test_one_key_with_all_mass_is_found_in_seven_tokens() -> None:
    true = spread(k30=1.0 - 1e-7)
    row = one(seen(plan_of(), true, true))
    assert (row["layer"], row["head"]) == (0, 0)
    assert row["kept_mean"] == row["oracle_kept_mean"] == 2 + 4 + 1  # sinks, recent tokens, and the one
    assert row["other_kept_mean"] == 8 + 8 + 8  # as blocks of 8: of the sinks, the recent tokens, and the one
    for figure in ("recall_mean", "sinkless_mean", "far_mean", "other_recall_mean", "oracle_recall_mean"):
        assert row[figure] == pytest.approx(1.0, abs=1e-5), figure


def test_a_selector_that_looks_elsewhere_finds_nothing_but_what_is_forced() -> None:
    row = one(seen(plan_of(), spread(k30=0.8, k0=0.12), spread(k20=1.0 - 1e-7)))
    rest = 0.08 / 62  # of every other token
    assert row["recall_mean"] == pytest.approx(0.12 + (1 + 4 + 1) * rest, abs=1e-5)
    assert row["sinkless_mean"] == pytest.approx(5 * rest / (0.8 + 61 * rest), abs=1e-5)
    assert row["far_mean"] == pytest.approx(rest / (0.8 + 57 * rest), abs=1e-5)
    assert row["far_mass_mean"] == pytest.approx(0.8 + 57 * rest, abs=1e-5)
    # A perfect indexer keeps token 30 and then the sink, which is forced.
    assert row["oracle_recall_mean"] == pytest.approx(0.92 + 5 * rest, abs=1e-5)
    assert row["oracle_kept_mean"] == 7


def test_flat_attention_needs_all_tokens_and_blocks_cost_nothing_more() -> None:
    flat = torch.zeros(1, KEYS)
    row = one(seen(plan_of(top_p=0.5), flat, flat + torch.linspace(0, 0.1, KEYS)))
    assert row["oracle_kept_mean"] == KEYS  # all tie
    assert 32 <= row["kept_mean"] <= 32 + 6
    assert row["recall_mean"] == pytest.approx(row["kept_mean"] / KEYS)
    assert row["sinkless_mean"] == pytest.approx((row["kept_mean"] - 2) / (KEYS - 2))
    assert row["far_mean"] == pytest.approx((row["kept_mean"] - 6) / (KEYS - 6))
    assert row["far_mass_mean"] == pytest.approx((KEYS - 6) / KEYS)


def test_a_heavy_sink_hides_what_is_lost() -> None:
    """T-8: the sink alone reaches top-p, the far token is never chosen, and plain recall still looks fine."""
    true = spread(k0=0.95, k30=0.04)
    row = one(seen(plan_of(), true, true))
    assert row["kept_mean"] == 6
    assert row["recall_mean"] > 0.95
    assert row["sinkless_mean"] < 0.05
    assert row["far_mean"] == pytest.approx(0.0, abs=1e-6)
    assert row["far_mass_mean"] == pytest.approx(0.05, abs=2e-3)


@pytest.mark.parametrize("run", ["token", "block"])
def test_scattered_keys_cost_a_block_each(run: str) -> None:
    """T-23: what is run and what the other granularity would keep, whichever is run."""
    true = spread(**{f"k{k}": 0.19 for k in (12, 20, 28, 36, 44)})
    row = one(seen(plan_of(granularity=run), true, true))
    tokens, blocks = 5 + 6, 5 * 8 + 2 * 8
    kept, other = (tokens, blocks) if run == "token" else (blocks, tokens)
    assert (row["kept_mean"], row["other_kept_mean"]) == (kept, other)
    assert row["recall_mean"] <= row["other_recall_mean"] if run == "token" else row["recall_mean"] >= 0.95
    assert row["oracle_kept_mean"] == kept


def test_rows_without_anything_beyond_the_forced_tokens_do_not_count() -> None:
    true = spread(k30=0.5)
    stats = SelectorStats()
    stats(seen(plan_of(recent=KEYS), true, true))
    [row] = stats.table()
    assert row["far_mean"] is None
    assert row["far_mass_mean"] == 0
    assert stats.summary()["sinkless_mean"] == pytest.approx(1.0)


def test_quantiles_are_the_worst_rows() -> None:
    stats = SelectorStats()
    good, bad = spread(k30=0.95), spread(k31=0.95)
    for number in range(100):
        stats(seen(plan_of(), good if number % 10 else bad, good))
    [row] = stats.table()
    assert row["recall_p5"] < 0.1
    assert row["recall_mean"] == pytest.approx(0.9 * 0.955 + 0.1 * 0.005, abs=2e-3)
    assert row["kept_p95"] == row["kept_mean"] == 7


def test_padded_rows_are_left_out() -> None:
    true = spread(k30=0.95)
    plan = plan_of()
    whole = seen(plan, true, true, rows=4)
    padded = seen(plan, true, true, rows=4, q_pos=whole.q_pos.clone())
    padded.q_pos[0, 1] = -1
    padded.visible = causal(padded.q_pos, padded.k_pos)
    stats = SelectorStats()
    stats(padded)
    assert stats.summary()["rows"] == 3
    assert stats.summary()["recall_mean"] == pytest.approx(one(whole)["recall_mean"], abs=1e-3)


def test_other_and_oracle_are_read_on_spaced_rows_the_last_among_them() -> None:
    rows = KEYS
    true = torch.zeros(1, KEYS)
    stats = SelectorStats()
    stats(seen(plan_of(top_p=1.0), true, true, rows=rows))
    assert stats.summary()["sampled_rows"] == rows <= SAMPLED
    from sparsec.calibrate.selector_stats import _sampled

    for many in (1, 127, 128, 129, 300, 512):
        taken = list(range(many))[_sampled(many)]
        assert taken[-1] == many - 1
        assert len(taken) <= SAMPLED


# On a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(small_llama: Callable[..., Any]) -> Any:
    return small_llama(layers=3, heads=6, kv_heads=3, positions=512)


def split(model: Any, index: tuple[str, ...] = ("full", "none", "full"), **more: Any) -> Plan:
    heads = ((1, 1, 0, 0, 1, 0), (0,) * 6, (0, 0, 0, 0, 1, 1))
    window = {"size": 12, "sinks": 2, **more.pop("window", {})}
    return Plan.dense(shape_of(model.config), "test").edit(
        layers=[{"heads": h, "index": i} for h, i in zip(heads, index, strict=True)],
        window=window,
        selector={**SELECTOR, "top_p": 0.6, **more.pop("selector", {})},
        **more,
    )


def tensors_of(plan: Plan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: 0.2 * torch.randn(size, generator=generator) for name, size in tensor_names(plan).items()}


def tokens(length: int) -> Tensor:
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(1))


def measured(model: Any, plan: Plan, observe: Callable[[Selection], None], length: int = 160) -> int:
    with applied(model, plan, tensors_of(plan)):
        return decode_rows(model, tokens(length), length // 2, observe)[1]


def test_what_it_says_is_what_the_layers_did(model: Any) -> None:
    plan, stats = split(model), SelectorStats()
    tiles: list[Selection] = []

    def both(selection: Selection) -> None:
        tiles.append(selection)
        stats(selection)

    measured(model, plan, both)
    rows = {(row["layer"], row["head"]): row for row in stats.table()}
    assert sorted(rows) == [(0, 0), (0, 1), (0, 4), (2, 4), (2, 5)]
    for tile in tiles:
        for place, head in enumerate(tile.heads):
            recalls, sinkless, kept, blocks = [], [], [], []
            for row in range(tile.q.shape[2]):
                context = int(tile.q_pos[0, row]) + 1
                true = ((tile.k[0, place, :context] @ tile.q[0, place, row]) * tile.scale).softmax(-1)
                keep = tile.keep[0, place, row, :context]
                recalls.append(float(true[keep].sum()))
                sinkless.append(float(true[2:][keep[2:]].sum() / true[2:].sum()))
                kept.append(int(keep.sum()))
                assert tile.scores is not None
                scores = tile.scores()[0, place, row, :context].softmax(-1)
                mass = torch.tensor([float(part.sum()) for part in scores.split(8)])
                order, total, taken = mass.sort(descending=True).indices.tolist(), 0.0, set(range(8))
                edge = 0.0
                for block in order:
                    if total >= 0.6 and mass[block] < edge * (1 - 1e-4):  # ties at the edge stay
                        break
                    taken |= set(range(8 * block, min(8 * block + 8, context)))
                    total, edge = total + float(mass[block]), edge if total >= 0.6 else float(mass[block])
                blocks.append(len(taken | set(range((context - 4) // 8 * 8, context))))
            found = rows[tile.layer, head]
            assert found["recall_mean"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-5)
            assert found["sinkless_mean"] == pytest.approx(sum(sinkless) / len(sinkless), abs=1e-5)
            assert found["kept_mean"] == pytest.approx(sum(kept) / len(kept))
            assert found["other_kept_mean"] == pytest.approx(sum(blocks) / len(blocks))
            assert found["oracle_recall_mean"] > found["recall_mean"]


def test_a_layer_that_shares_is_measured_with_the_set_that_it_reads(model: Any) -> None:
    plan, stats = split(model, ("full", "none", "shared"), selector={"scope": "layer"}), SelectorStats()
    measured(model, plan, stats)
    rows = stats.table()
    assert {row["layer"] for row in rows} == {0, 2}
    assert len({row["kept_mean"] for row in rows}) == len({row["other_kept_mean"] for row in rows}) == 1
    assert len({row["recall_mean"] for row in rows}) == len(rows)


def test_a_plan_without_a_selector_has_nothing_to_say(model: Any) -> None:
    stats = SelectorStats()
    measured(model, split(model, ("none",) * 3), stats)
    assert stats.summary() == {}
    assert stats.table() == stats.reads() == []


# Bytes -----------------------------------------------------------------------------------------------------------


def by_kind(model: Any, plan: Plan, length: int) -> dict[str, int]:
    with applied(model, plan, tensors_of(plan)):
        cache = new_cache(model)
        for at in range(0, length, 7):
            model(tokens(length)[None, at : at + 7], past_key_values=cache)
    found = {"full": 0, "local": 0, "index": 0, "sums": 0}
    for layer in cache.layers:
        assert isinstance(layer, SparseLayer)
        for owner, name in layer._held():
            kind = "index" if name == "index_keys" else "full" if owner is layer else "sums"
            kind = "local" if owner is layer.local else kind
            found[kind] += getattr(owner, name).untyped_storage().nbytes()
    assert sum(found.values()) == kv_bytes(cache)
    return found


@pytest.mark.parametrize("length", [9, 14, 15, 60])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"index": ("full", "none", "shared"), "selector": {"scope": "layer"}},
        {"index": ("none",) * 3},
        {"index": ("none",) * 3, "window": {"compensate": True}},
        {"min_context": 40},
    ],
    ids=["indexers", "shared", "no selector", "compensated", "short contexts dense"],
)
def test_resident_bytes_are_those_of_the_cache(model: Any, changed: dict[str, Any], length: int) -> None:
    plan = split(model, **changed)
    found = resident_bytes(plan, length, 4)
    dense = DynamicCache(config=model.config)
    model(tokens(length)[None], past_key_values=dense)
    assert found.pop("dense") == kv_bytes(dense)
    assert found == by_kind(model, plan, length)


def test_a_step_reads_index_keys_and_the_union_of_what_a_kv_heads_query_heads_keep() -> None:
    plan = plan_of(((1, 1, 0, 1), (0, 0, 1, 0)))
    pair = 2 * 16 * 2
    read = read_bytes(plan, 1000, {0: 70 + 30, 1: 50}, itemsize=2)
    assert read.index == (3 + 1) * 4 * 2 * 1000
    assert read.kept == 150 * pair
    assert read.dense == (2 + 1) * 1000 * pair
    shared = plan.edit(
        layers=[plan.layers[0].model_dump(), {**plan.layers[1].model_dump(), "index": "shared"}],
        selector={**SELECTOR, "scope": "layer"},
    )
    assert read_bytes(shared, 1000, {0: 100, 1: 50}, itemsize=2).index == 3 * 4 * 2 * 1000
    with pytest.raises(ValueError, match="indexers"):
        read_bytes(Plan.dense(SHAPE, "test"), 10, {}, 2)


def test_what_a_step_reads_is_counted_from_the_kept_sets(model: Any) -> None:
    plan, stats = split(model, min_context=100), SelectorStats()
    tiles: list[Selection] = []

    def both(selection: Selection) -> None:
        tiles.append(selection)
        stats(selection)

    measured(model, plan, both)
    total = contexts = 0.0
    for tile in tiles:
        for row in range(tile.q.shape[2]):
            t = int(tile.q_pos[0, row])
            if t < 100:
                continue
            sets = {head: set(tile.keep[0, p, row].nonzero()[:, 0].tolist()) for p, head in enumerate(tile.heads)}
            window = {*range(t - 11, t + 1), 0, 1}
            # Layer 0: KV head 0 is read by heads 0 and 1, KV head 2 by 4 and by the local head 5.
            reads = [sets[0] | sets[1], sets[4] | window] if tile.layer == 0 else [sets[4] | sets[5]]
            total += sum(map(len, reads))
            contexts += t + 1 if tile.layer == 0 else 0
    rows = 160 - 100
    read = stats.summary()["read"]
    assert read["kept"] == pytest.approx(total / rows * 2 * 16 * 4)
    assert read["context"] == pytest.approx(contexts / rows)
    assert read["index"] == pytest.approx(5 * 4 * 4 * contexts / rows)
    assert read["dense"] == pytest.approx(3 * 2 * 16 * 4 * contexts / rows)
    parts = stats.reads()
    assert [part.context for part in parts] == sorted(part.context for part in parts)
    assert len(parts) == 2  # half octaves: up to 128 and beyond


def test_a_compile_writes_all_of_it_and_inspect_shows_it(tiny_artifact: Path) -> None:
    data = artifact_data(tiny_artifact)
    plan, gate = Plan.parse(data["plan"]), data["measurements"]["gate"]
    found = next(p["measured"]["selector"] for p in data["measurements"]["passes"] if p["name"] == "rtpurbo")
    assert len(found["heads"]) == found["summary"]["heads"] == sum(len(layer.retrieval) for layer in plan.layers)
    contexts = [read["context"] for read in found["reads"]]
    assert [one["context"] for one in found["contexts"]] == [128, 256, 512]
    assert min(contexts) < 128
    assert max(contexts) > 384
    assert found["break_even"]["bound"] in ("about", "at most", "above")
    # The cache's own count, at the end of the gate's windows, is the sum of the kinds.
    held = resident_bytes(plan, gate["context"], 4)
    assert gate["dense"]["kv_bytes"] == held.pop("dense")
    assert gate["artifact"]["kv_bytes"] == sum(held.values())
    assert gate["selector"]["read"]["index"] > 0
    text = artifact_text(tiny_artifact, data)
    assert "recall of true attention mass: all, no sinks, no forced token" in text
    assert "break-even of what a decode step reads: " in text
    rows = [line.split() for line in text.split("perfect  recall\n")[1].splitlines()[1:]]
    listed = [(int(row[0]), int(row[1])) for row in rows[: len(found["heads"])]]
    assert listed == [(head["layer"], head["head"]) for head in found["heads"]]


def test_an_older_artifact_is_still_inspected(tiny_artifact: Path) -> None:
    data = artifact_data(tiny_artifact)
    for each in data["measurements"]["passes"]:
        if each["name"] == "rtpurbo":
            del each["measured"]["selector"]["contexts"]
    assert "measured by an older sparsec" in artifact_text(tiny_artifact, data)


def reads(*pairs: tuple[float, float]) -> list[Read]:
    """Contexts and what is saved there."""
    return [Read(context, index=10.0, kept=90.0 - gain, dense=100.0) for context, gain in pairs]


@pytest.mark.parametrize(
    ("points", "tokens_", "bound"),
    [
        (reads((1000, -10), (2000, 10)), 1500, "about"),
        (reads((2000, 30), (1000, -10)), 1250, "about"),
        (reads((1000, 5), (2000, -10), (3000, 10)), 2500, "about"),
        (reads((1000, 1), (2000, 10)), 1000, "at most"),
        (reads((1000, -10), (2000, 0)), 2000, "above"),
    ],
    ids=["between", "any order", "the last crossing", "pays already", "does not pay"],
)
def test_break_even_is_where_the_saving_stays(points: list[Read], tokens_: float, bound: str) -> None:
    assert break_even(points) == {"tokens": pytest.approx(tokens_), "bound": bound}


def test_break_even_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="measured contexts"):
        break_even([])


def test_the_selector_of_a_plan_is_not_changed_by_measuring(model: Any) -> None:
    plan, stats = split(model), SelectorStats()
    before = Selector(**plan.selector.model_dump()) if plan.selector else None
    measured(model, plan, stats)
    assert plan.selector == before
    assert stats.summary()["granularity"] == "token"
