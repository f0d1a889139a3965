"""The plan: what is valid, what its digest covers, and what its errors say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from sparsec.errors import ArtifactError, PlanError
from sparsec.layout import PLAN_KEY, read_plan
from sparsec.plan import Coarse, ModelShape, Plan
from sparsec.plugins.index_keys import index_bytes, index_read
from sparsec.plugins.runtime import check, tensor_names

SHAPE = {"model_type": "llama", "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8}
SELECTOR = {
    "rank": 4,
    "rope": "pre",
    "top_p": 0.9,
    "granularity": "token",
    "block": 64,
    "sinks": 4,
    "recent": 8,
    "scope": "layer",
}


def data(**changes: Any) -> dict[str, Any]:
    """A plan that uses everything: a layer of the model's own, a dense one, a full and a shared index."""
    plan = {
        "producer": "sparsec 0",
        "model": SHAPE,
        "window": {"size": 16, "sinks": 4},
        "selector": SELECTOR,
        "min_context": 20,
        "layers": [
            {"heads": None},
            {"heads": [1, 0, 1, 0], "index": "full"},
            {"heads": [0, 0, 0, 1], "index": "shared"},
            {"heads": [1, 1, 1, 1]},
        ],
        "passes": [{"name": "rtpurbo", "config": {"ratio": 0.15}}],
    }
    return plan | changes


def layers(**changes: Any) -> list[Any]:
    """The layers of ``data`` with some replaced, named l0 to l3."""
    return [changes.get(f"l{i}", layer) for i, layer in enumerate(data()["layers"])]


def test_what_came_later_is_written_only_where_it_says_something() -> None:
    plan = Plan.parse(data())
    assert plan.to_json()["selector"].keys() & {"vote_every", "index_dtype", "coarse"} == set()
    levels = {"granularity": "block", "coarse": {"min_context": 100, "one_in": 8}}
    for more in ({"index_dtype": "fp8"}, levels):
        other = Plan.parse(data(selector={**SELECTOR, **more}))
        assert Plan.parse(other.to_json()) == other
        assert other.digest != plan.digest


@pytest.mark.parametrize("wrong", [{"granularity": "token"}, {"granularity": "block", "top_p": 1.0}])
def test_a_coarse_level_needs_blocks_to_choose(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="a coarse level needs"):
        Plan.parse(data(selector={**SELECTOR, **wrong, "coarse": {"min_context": 100}}))


def test_bytes_of_index_keys() -> None:
    selector = Plan.parse(data(selector={**SELECTOR, "granularity": "block"})).selector
    assert selector is not None
    fp8 = selector.model_copy(update={"index_dtype": "fp8"})
    assert (index_bytes(selector, 1000, 2), index_bytes(fp8, 1000, 2)) == (1000 * 4 * 2, 1000 * 5)
    levels = fp8.model_copy(update={"coarse": Coarse(min_context=640, one_in=4)})
    assert index_bytes(levels, 1000, 2) == 1000 * 5 + 15 * 4 * 2
    assert index_read(levels, 640, 2) == 640 * 5
    assert index_read(levels, 1000, 2) == 250 * 5 + 15 * 4 * 2


def test_json_gives_an_equal_plan_back() -> None:
    plan = Plan.parse(data())
    assert Plan.parse(json.loads(json.dumps(plan.to_json()))) == plan
    assert Plan.parse(plan.to_json()).digest == plan.digest
    assert plan.to_json() == json.loads(json.dumps(plan.to_json()))


@pytest.mark.parametrize("seed", range(20))
def test_any_plan_survives_json_and_shared_layers_read_a_full_one_below(seed: int) -> None:
    rng = random.Random(seed)
    count, kv_heads, group = rng.randint(1, 9), rng.randint(1, 3), rng.randint(1, 4)
    drawn: list[dict[str, Any]] = []
    for _ in range(count):
        heads = [rng.randint(0, 1) for _ in range(kv_heads * group)]
        kinds = ["none", "full"] + ["shared"] * any(layer["index"] == "full" for layer in drawn)
        drawn.append({"heads": heads, "index": rng.choice(kinds) if any(heads) else "none"})
    shape = {**SHAPE, "layers": count, "heads": kv_heads * group, "kv_heads": kv_heads}
    plan = Plan.parse(data(model=shape, layers=drawn))
    again = Plan.parse(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest
    assert len(plan.pattern) == len(plan.indexed())
    for i in plan.indexed():
        below = plan.index_source(i)
        assert below <= i
        assert plan.layers[below].index == "full"
        assert all(plan.layers[j].index != "full" for j in range(below + 1, i + 1))
    for layer in plan.layers:
        assert sorted(layer.retrieval + layer.local) == list(range(plan.model.heads))
        for kv in range(kv_heads):
            whole = set(range(kv * group, (kv + 1) * group)) <= set(layer.local)
            assert (kv in layer.local_kv_heads(group)) == whole


def test_what_runs_is_read_off_the_plan() -> None:
    plan = Plan.parse(data())
    assert plan.indexed() == (1, 2)
    assert plan.pattern == "FS"
    assert plan.index_source(2) == 1
    assert plan.layers[1].retrieval == (0, 2)
    assert plan.layers[1].local == (1, 3)
    assert plan.layers[2].local_kv_heads(plan.model.group) == (0,)
    assert plan.layers[0].retrieval == plan.layers[0].local == ()
    assert not plan.is_dense


def test_a_dense_plan_leaves_every_head_and_the_models_own_layers_alone() -> None:
    plan = Plan.dense(ModelShape(**SHAPE), "sparsec 0", native=(2,))
    assert plan.is_dense
    assert plan.layers[2].heads is None
    assert plan.layers[0].retrieval == (0, 1, 2, 3)
    assert plan.pattern == ""
    assert tensor_names(plan) == {}


def test_a_plan_does_not_change() -> None:
    plan = Plan.parse(data())
    with pytest.raises(ValidationError):
        plan.min_context = 0  # type: ignore[misc]
    edited = plan.edit(min_context=0)
    assert (plan.min_context, edited.min_context) == (20, 0)


def test_an_edit_is_validated() -> None:
    with pytest.raises(PlanError, match="has local heads, but the plan has no window"):
        Plan.parse(data()).edit(window=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {**SHAPE, "head_dim": 16}},
        {"window": {"size": 17, "sinks": 4}},
        {"window": {"size": 16, "sinks": 5}},
        {"selector": {**SELECTOR, "rank": 5}},
        {"selector": {**SELECTOR, "rope": "post"}},
        {"selector": {**SELECTOR, "top_p": 0.91}},
        {"selector": {**SELECTOR, "granularity": "block"}},
        {"selector": {**SELECTOR, "recent": 9}},
        {"min_context": 21},
        {"layers": layers(l3={"heads": [1, 1, 1, 0]})},
        {"layers": layers(l2={"heads": [0, 0, 0, 1], "index": "full"})},
        {"layers": layers(l0={"heads": [1, 1, 1, 1]})},
    ],
)
def test_the_digest_changes_with_what_runs(changes: dict[str, Any]) -> None:
    assert Plan.parse(data(**changes)).digest != Plan.parse(data()).digest


@pytest.mark.parametrize("changes", [{"producer": "sparsec 9"}, {"passes": []}])
def test_the_digest_ignores_who_made_it(changes: dict[str, Any]) -> None:
    assert Plan.parse(data(**changes)).digest == Plan.parse(data()).digest


def test_the_digest_does_not_depend_on_the_order_of_keys_or_on_how_numbers_are_written() -> None:
    turned = dict(reversed(data(selector={**SELECTOR, "top_p": 1}).items()))
    assert Plan.parse(turned).digest == Plan.parse(data(selector={**SELECTOR, "top_p": 1.0})).digest


INVALID = {
    "no mapping": ([], "not a valid plan: Input should be a valid dictionary"),
    "another format": (data(format=2), "the plan has format 2, this sparsec reads 1: update sparsec"),
    "an unknown key": (data(windows=1), "windows: Extra inputs are not permitted"),
    "an unknown key inside": (data(window={"size": 8, "sinks": 0, "sink": 1}), "window.sink: Extra inputs"),
    "an unknown key of a layer": (data(layers=layers(l3={"heads": None, "idx": 1})), "layers.3.idx: Extra inputs"),
    "no layers": ({k: v for k, v in data().items() if k != "layers"}, "layers: Field required"),
    "heads that do not divide": (data(model={**SHAPE, "kv_heads": 3}), "4 query heads are no multiple of 3 KV heads"),
    "an empty window": (data(window={"size": 0, "sinks": 4}), "window.size: Input should be greater than or equal"),
    "no mass": (data(selector={**SELECTOR, "top_p": 0}), "selector.top_p: Input should be greater than 0"),
    "too much mass": (data(selector={**SELECTOR, "top_p": 1.01}), "selector.top_p: Input should be less than or"),
    "a mass that is no number": (data(selector={**SELECTOR, "top_p": float("nan")}), "selector.top_p: Input should be"),
    "half a head": (data(layers=layers(l1={"heads": [1, 0, 0.5, 0]})), "layers.1.heads.2: Input should be 0 or 1"),
    "an unknown index": (data(layers=layers(l1={"heads": [1, 0, 1, 0], "index": "half"})), "layers.1.index: Input"),
    "too few layers": (data(layers=layers()[:3]), "3 layers are planned, the model has 4"),
    "too many heads": (data(layers=layers(l3={"heads": [1] * 5})), "layer 3 plans 5 heads, the model has 4"),
    "local heads and no window": (data(window=None), "layer 1 has local heads, but the plan has no window"),
    "an index and no selector": (data(selector=None), "layer 1 has an index, but the plan has no selector"),
    "an index and no retrieval head": (
        data(layers=layers(l2={"heads": [0] * 4, "index": "shared"})),
        "layer 2 has an index, but no retrieval head",
    ),
    "an index on a layer of the model's own": (
        data(layers=layers(l0={"heads": None, "index": "full"})),
        "layer 0 has an index, but no retrieval head",
    ),
    "nothing to share": (
        data(layers=layers(l1={"heads": [1, 0, 1, 0], "index": "shared"})),
        "layer 1 shares an index, but no layer below it has one of its own",
    ),
    "sharing of single heads' sets": (
        data(selector={**SELECTOR, "scope": "head"}),
        "shared layers need the selector's scope to be 'layer'",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_a_plan_that_cannot_be_is_an_error_of_one_line_that_names_the_place(case: str) -> None:
    given, words = INVALID[case]
    with pytest.raises(PlanError) as caught:
        Plan.parse(given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def model(tiny_deep: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_deep)


def fitting() -> tuple[Plan, dict[str, torch.Tensor]]:
    plan = Plan.parse(data(layers=layers(l0={"heads": [1, 1, 1, 1]})))
    return plan, {name: torch.zeros(size) for name, size in tensor_names(plan).items()}


def test_tensors_belong_to_full_layers_one_row_a_retrieval_head(model: Any) -> None:
    plan, tensors = fitting()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "model.layers.1.self_attn.indexer.q_proj.weight": (2, 4, 8),
        "model.layers.1.self_attn.indexer.k_proj.weight": (2, 4, 8),
    }
    check(model, plan, tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan, tensors: tensors.popitem(), "which is missing"),
        (lambda plan, tensors: tensors.update({next(iter(tensors)): torch.zeros(1, 4, 8)}), "the plan needs (2, 4, 8)"),
        (lambda plan, tensors: next(iter(tensors.values())).fill_(float("nan")), "not finite"),
        (lambda plan, tensors: tensors.update(more=torch.zeros(1)), "no place for the tensor more"),
        (lambda plan, tensors: plan.edit(model={**SHAPE, "head_dim": 16}), "use the checkpoint it was compiled from"),
    ],
)
def test_a_plan_that_does_not_fit_its_model_or_tensors_is_refused(model: Any, change: Any, words: str) -> None:
    plan, tensors = fitting()
    changed = change(plan, tensors)
    with pytest.raises(PlanError) as caught:
        check(model, changed if isinstance(changed, Plan) else plan, tensors)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_is_read_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({PLAN_KEY: data()}))
    assert read_plan(tmp_path) == Plan.parse(data())


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        (None, ArtifactError, "config.json is missing"),
        ("{", ArtifactError, "cannot read"),
        ("[]", ArtifactError, "plain model without a plan"),
        ("{}", ArtifactError, "plain model without a plan"),
        (json.dumps({PLAN_KEY: data(window=None)}), PlanError, "layer 1 has local heads, but the plan has no window"),
        (json.dumps({PLAN_KEY: data(format=7)}), PlanError, "update sparsec"),
    ],
)
def test_a_folder_without_a_valid_plan_is_refused_by_its_name(
    tmp_path: Path, config: str | None, kind: type[Exception], words: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(kind) as caught:
        read_plan(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
