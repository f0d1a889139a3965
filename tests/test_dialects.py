"""Other engines' files: what a plan says in them comes back, and what they say is recognised."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsec.errors import ArtifactError
from sparsec.export.compare import plan_rows
from sparsec.export.dialects import DIALECTS
from sparsec.export.dialects.files import read_files, write_files
from sparsec.export.dialects.foreign import Foreign, starting_plan
from sparsec.layout import read_plan
from sparsec.plan import ModelShape, Plan

FUZZED = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def splits(draw: Any, whole_groups: bool = False) -> Plan:
    """A plan with local heads."""
    layers, kv_heads, group = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = ModelShape(model_type="llama", layers=layers, heads=kv_heads * group, kv_heads=kv_heads, head_dim=8)
    heads = []
    for _ in range(layers):
        kinds = draw(st.lists(st.integers(0, 1), min_size=kv_heads, max_size=kv_heads))
        row = [kind for kind in kinds for _ in range(group)]
        heads.append(row if whole_groups else draw(st.permutations(row)))
    window = {"size": draw(st.integers(1, 9000)), "sinks": draw(st.integers(0, 64))}
    least = draw(st.integers(0, 20000)) if not whole_groups else 0
    return Plan.dense(shape, "test").edit(layers=[{"heads": row} for row in heads], window=window, min_context=least)


def same_split(plan: Plan, again: Plan) -> None:
    assert [layer.heads for layer in again.layers] == [layer.heads for layer in plan.layers]
    if any(layer.local for layer in plan.layers):
        assert again.window == plan.window
    assert again.min_context == plan.min_context


@FUZZED
@given(splits())
def test_headwise_comes_back(plan: Plan) -> None:
    files = json.loads(json.dumps(DIALECTS["headwise"].encode(plan)))  # type: ignore[misc]
    assert [name for name, each in DIALECTS.items() if each.recognise(files)] == ["headwise"]
    same_split(plan, starting_plan(DIALECTS["headwise"].decode(files, None), plan.model, "test"))


@FUZZED
@given(splits(whole_groups=True))
def test_duo_comes_back_where_groups_are_whole(plan: Plan) -> None:
    files = DIALECTS["duo"].encode(plan)  # type: ignore[misc]
    assert [name for name, each in DIALECTS.items() if each.recognise(files)] == ["duo"]
    for shape in (None, plan.model):
        same_split(plan, starting_plan(DIALECTS["duo"].decode(files, shape), plan.model, "test"))


@FUZZED
@given(splits())
def test_duo_keeps_no_less_than_the_plan(plan: Plan) -> None:
    files = DIALECTS["duo"].encode(plan)  # type: ignore[misc]
    again = starting_plan(DIALECTS["duo"].decode(files, plan.model), plan.model, "test")
    assert all(
        set(layer.retrieval) <= set(other.retrieval) for layer, other in zip(plan.layers, again.layers, strict=True)
    )


@FUZZED
@given(st.lists(st.sampled_from("FS"), max_size=12))
def test_indexcache_comes_back_in_every_spelling(letters: list[str]) -> None:
    pattern = "F" + "".join(letters)
    kinds = tuple({"F": "full", "S": "shared"}[letter] for letter in pattern)
    shape = ModelShape(model_type="glm_moe_dsa", layers=len(kinds), heads=2, kv_heads=2, head_dim=8)
    plan = Plan.dense(shape, "test").edit(
        layers=[{"heads": (1, 1), "index": kind} for kind in kinds], dsa={"top_k": 8, "heads": 2, "dim": 8}
    )
    keys = DIALECTS["indexcache"].encode(plan)["config.json"]  # type: ignore[misc]
    for left_out in ((), ("index_topk_pattern",), ("index_topk_pattern", "indexer_types")):
        config = {key: value for key, value in keys.items() if key not in left_out}
        if DIALECTS["indexcache"].recognise({"config.json": config}):
            assert DIALECTS["indexcache"].decode({"config.json": config}, shape).pattern == pattern


def test_what_a_format_cannot_say_is_refused() -> None:
    shape = ModelShape(model_type="llama", layers=2, heads=2, kv_heads=1, head_dim=8)
    native = Plan.dense(shape, "test", native=(1,))
    for name in ("headwise", "duo"):
        with pytest.raises(ArtifactError, match="runs as the model made it"):
            DIALECTS[name].encode(native)  # type: ignore[misc]
        with pytest.raises(ArtifactError, match="the plan has no local heads"):
            DIALECTS[name].encode(Plan.dense(shape, "test"))  # type: ignore[misc]
    with pytest.raises(ArtifactError, match="layer 0 has no index"):
        DIALECTS["indexcache"].encode(native)  # type: ignore[misc]
    with pytest.raises(ArtifactError, match="splits 1 layers of 2 heads, the model has 2 of 2"):
        starting_plan(Foreign("duo", "", heads=((1, 0),), window=4, sinks=1), shape, "test")
    with pytest.raises(ArtifactError, match="how long a local head's window is"):
        starting_plan(Foreign("duo", "", heads=((1, 0), (0, 0))), shape, "test")


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "headwise": ({"config.json": {"headwise_config": {"sink_token_num": 4, "swa_token_num": 8192,
        "seqlen_threshold": 16384, "0": [1, 0], "1": [0, 0]}}}, "1 of 4 query heads are retrieval heads"),
    "duo": ({"full_attention_heads.tsv": "0.93\t0.1\n0\t1\n", "config.json": {"sink_size": 64, "recent_size": 256}},
        "2 of 4 KV heads keep every token"),
    "minference": ({"best.json": [{"0": ["vertical_and_slash", 1000, 6096, 0.9], "1": ["stream_llm", 4, 512, 1.0]}]},
        "patterns for prompts: 1 stream_llm, 1 vertical_and_slash"),
    "indexcache": ({"config.json": {"index_topk_freq": 4, "index_skip_topk_offset": 3, "num_hidden_layers": 8}},
        "4 of 8 layers have an indexer: FFFSSSFS"),
    "modelopt": ({"config.json": {"sparse_attention_config": {"config_groups": {"group_0": {"algorithm": "skip_softmax",
        "targets": ["LlamaAttention"]}}, "producer": {"name": "modelopt", "version": "0.47"}}}},
        "skip_softmax on LlamaAttention, by modelopt 0.47"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_foreign_files_are_recognised_and_explained(cli: Any, tmp_path: Path, name: str) -> None:
    files, words = FILES[name]
    write_files(tmp_path / "theirs", files)
    assert [each for each, dialect in DIALECTS.items() if dialect.recognise(read_files(tmp_path / "theirs"))] == [name]
    done = cli("inspect", tmp_path / "theirs")
    assert done.status == 0, done.err
    assert done.out.split() == [name, *words.split()]
    (found,) = json.loads(cli("inspect", tmp_path / "theirs", "--json").out)
    assert found["dialect"] == name


def test_other_meanings_of_the_key_are_not_taken_for_it() -> None:
    for other in ({"use_sparse_attention": True, "sparse_topk_blocks": 16}, {"algorithm": "rocketkv"}):
        files = {"config.json": {"sparse_attention_config": other}}
        assert not any(dialect.recognise(files) for dialect in DIALECTS.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "1", "swa_token_num"]), inner),
    max_leaves=8,
)


@FUZZED
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damaged_files_are_an_error_or_read(name: str, data: Any) -> None:
    files = json.loads(json.dumps(FILES[name][0]))
    holder = files[next(iter(files))]
    if isinstance(holder, dict):
        holder = holder.get("headwise_config", holder.get("sparse_attention_config", holder))
        holder[data.draw(st.sampled_from(sorted(holder)))] = data.draw(JSON)
    elif isinstance(holder, list):
        holder[0][data.draw(st.sampled_from(["0", "1", "x"]))] = data.draw(JSON)
    else:
        files[next(iter(files))] = data.draw(st.text(max_size=20))
    for dialect in DIALECTS.values():
        if dialect.recognise(files):
            with suppress(ArtifactError):
                assert dialect.decode(files, None).says


def test_an_artifact_is_exported_and_compared(cli: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    for name in ("headwise", "duo"):
        done = cli("export", tiny_artifact, "--to", name, "-o", tmp_path / name)
        assert done.status == 0, done.err
        assert DIALECTS[name].recognise(read_files(tmp_path / name))
    plan = read_plan(tiny_artifact)
    again = starting_plan(DIALECTS["headwise"].decode(read_files(tmp_path / "headwise"), None), plan.model, "test")
    same_split(plan, again)
    assert "exists: choose another folder" in cli("export", tiny_artifact, "--to", "duo", "-o", tmp_path / "duo").line
    wrong = cli("export", tiny_artifact, "--to", "headwize", "-o", tmp_path / "x")
    assert wrong.status == 2
    assert "headwise" in wrong.line
    rows = plan_rows(plan, again)
    assert {row[0] for row in rows} >= {"passes", "selector.rank"}
    assert plan_rows(plan, plan) == []
    done = cli("diff", tiny_artifact, tiny_artifact)
    assert done.status == 0, done.err
    assert "The plans are the same." in done.out
    assert "bits per byte after rtpurbo" in done.out
    assert json.loads(cli("diff", tiny_artifact, tiny_artifact, "--json").out)["same_text"] is True
