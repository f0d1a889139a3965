"""The contract of a pass, over all passes in one table, and what a pass is promised by the registry."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.indexer_fit import Forced
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.pipeline import Job, compile_model
from sparsec.compiler.recipe import make_recipe, read_recipe
from sparsec.compiler.registry import GROUP, check_needs, in_order, known_passes, make_passes
from sparsec.errors import CalibrationError, PlanError, UsageError
from sparsec.events import Event
from sparsec.layout import TENSORS
from sparsec.passes.base import Cost, Pass, PassResult, Program, lacks
from sparsec.passes.rtpurbo import Rtpurbo
from sparsec.plan import Coarse, ModelShape, Plan, Window
from sparsec.plugins.families import attention_modules, base_plan
from sparsec.plugins.load import load
from sparsec.plugins.runtime import applied, check, tensor_names
from sparsec.plugins.vocabulary import INPUT, NEVER

ROOT = Path(__file__).resolve().parent.parent

DISTILL = {
    "context": 320,
    "rows": 96,
    "steps": 6,
    "batch": 2,
    "micro_batch": 1,
    "windows": 4,
    "held_windows": 1,
    "checks": 3,
    "lr": 1e-2,
}
ROUTING = {"context": 128, "tokens": 1024, "samples": 512, "sensitivity_windows": 1, "search_windows": 1, "rank": 4}
ROUTING_TRAINED = {**ROUTING, "epochs": 2, "steps": 3, "train_context": 64, "hidden": 4, "remove": 0.2}
MERGED = {"merges": 60, "imitation_steps": 3, "steps": 3, "batch": 2, "windows": 4, "context": 96, "depth": 2}
RAZOR = {"window": 32, "draws": 2, "copies": 3}

# A row: the pass, and the options that make it different from tests/conftest.py's tiny ones. Before it run those
# that it needs. A new pass gets a row here, and with it all tests of this file.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rtpurbo": ("rtpurbo", {}),
    "rtpurbo whole KV heads": ("rtpurbo", {"granularity": "kv_head"}),
    "rtpurbo, a set a KV head": ("rtpurbo", {"granularity": "kv_head", "sets": "kv_head"}),
    "rtpurbo by gates": ("rtpurbo", {"choose": "gates", "gate_steps": 3, "gate_context": 320}),
    "rtpurbo whole KV heads by gates": (
        "rtpurbo",
        {"choose": "gates", "gate_steps": 3, "gate_context": 320, "granularity": "kv_head", "per_layer": 1},
    ),
    "rtpurbo blocks after RoPE": ("rtpurbo", {"select": "block", "block": 8, "reach": 1024}),
    "rtpurbo before RoPE, on stretched positions": ("rtpurbo", {"rope": "pre", "reach": 1024}),
    "rtpurbo without training": ("rtpurbo", {"steps": 0, "target": "all"}),
    "rtpurbo keeping what local heads see": ("rtpurbo", {"forced_recent": None}),
    "rtpurbo with chosen prefill": ("rtpurbo", {"prefill": "selector", "query_block": 16, "block": 8}),
    "razor": ("razor", {**RAZOR, "induction": 0.3}),
    "razor whole KV heads, uncompensated": ("razor", {**RAZOR, "granularity": "kv_head", "compensation": False}),
    "window": ("window", {"window": 32}),
    "window with compensation": ("window", {"window": 32, "compensation": True}),
    "indexcache to a target": ("indexcache", {"keep": 0.5}),
    "indexcache without training, lazily": ("indexcache", {"keep": 0.5, "steps": 0, "order": "lazy"}),
    "indexcache within a budget": ("indexcache", {"keep": None, "max_loss": 0.001}),
    "indexcache on a model's own indexers": ("indexcache", {"keep": 0.5, "context": 400}),
    "hisa": ("hisa", {"block": 32, "context": 256}),
    "misa in two stages": ("misa", {"block": 64, "context": 256, "two_stage": True}),
    "informed-routing without training": ("informed-routing", {**ROUTING, "epochs": 0, "steps": 0}),
    "informed-routing": ("informed-routing", ROUTING_TRAINED),
    "informed-routing that skips MLPs": (
        "informed-routing",
        {**ROUTING, "steps": 0, "rank": 0, "units": "mlp"},
    ),
    "dynamic-tokenization": ("dynamic-tokenization", MERGED),
    "dynamic-tokenization by a heuristic": (
        "dynamic-tokenization",
        {**MERGED, "prediction": "hybrid", "boundary": "pretoken"},
    ),
    "distill with LoRA": ("distill", DISTILL),
    "distill under routing alone": ("distill", {**DISTILL, "lora_rank": 8}),
    "distill all weights": ("distill", {**DISTILL, "weights": "all", "rest": False, "checkpointing": True}),
}
BEFORE = {"indexcache": ["rtpurbo"], "distill": ["rtpurbo"], "informed-routing": ["rtpurbo"]}
ALONE = "routing alone"  # rows whose plan routes and does nothing else
BEFORE[ALONE] = ["informed-routing"]
GIVEN = {"informed-routing": {**ROUTING, "epochs": 0, "steps": 0}}  # to passes that run before
FREE = ("window",)  # these run no model
OWN = "own indexers"  # rows that run on a model that has some


def program_of(row: str) -> str:
    """The name under which ``prepared`` has a row's program."""
    name = CASES[row][0]
    if ALONE in row:
        return ALONE
    return OWN if OWN in row or name in ("hisa", "misa") else name


@pytest.fixture(scope="module")
def calibration(tiny_deep: Path) -> Calibration:
    return Calibration(read_corpus(), AutoTokenizer.from_pretrained(tiny_deep))


@pytest.fixture(scope="module")
def model(tiny_deep: Path) -> Any:
    return opened(tiny_deep)


def opened(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def make(tiny_options: dict[str, dict[str, Any]]) -> Callable[..., Pass]:
    def build(name: str, **options: Any) -> Pass:
        return known_passes()[name].model_validate({**tiny_options.get(name, {}), **options})

    return build


@pytest.fixture(scope="module")
def prepared(
    model: Any, tiny_dsa: Path, calibration: Calibration, make: Callable[..., Pass]
) -> Callable[[str], Program]:
    """The program that a pass is given, by the name of the pass or :data:`OWN`; made once."""
    done: dict[str, Program] = {}

    def prepare(name: str) -> Program:
        if name not in done:
            given = opened(tiny_dsa) if name == OWN else model
            program = Program(given, base_plan(given.config, "test"), {}, seed=3)
            for before in BEFORE.get(name, []):
                result = make(before, **GIVEN.get(before, {})).run(program, calibration)
                program = Program(model, result.plan, result.tensors, seed=3)
            done[name] = program
        return done[name]

    return prepare


def test_gates_want_windows_that_tell_full_heads_from_windowed_ones(
    prepared: Callable[[str], Program], make: Callable[..., Pass], calibration: Calibration
) -> None:
    program = prepared("rtpurbo")
    for options, said in (
        ({"gate_context": 128, "window": 64}, "rtpurbo.choose=needles"),
        ({"min_context": 400, "gate_context": 500}, "rtpurbo.gate_context"),
        ({"gate_context": 128}, "longer context"),
    ):
        with pytest.raises(CalibrationError, match=said):
            make("rtpurbo", choose="gates", gate_steps=2, **options).run(program, calibration)


class Ran:
    """A row of the table, run once."""

    def __init__(self, each: Pass, program: Program, calibration: Calibration) -> None:
        self.events: list[Event] = []
        self.each, self.calibration = each, calibration
        self.program = Program(program.model, program.plan, program.tensors, program.seed, self.events.append)
        self.before = state(program.model)
        self.result = each.run(self.program, calibration)
        self.after = state(program.model)


@pytest.fixture(scope="module", params=CASES)
def ran(
    request: pytest.FixtureRequest,
    prepared: Callable[[str], Program],
    make: Callable[..., Pass],
    calibration: Calibration,
) -> Ran:
    name, options = CASES[request.param]
    return Ran(make(name, **options), prepared(program_of(request.param)), calibration)


@torch.no_grad()
def state(model: Any) -> dict[str, Any]:
    """All that a pass could change of a model and must not."""
    ids = torch.arange(3, 259)[None]
    return {
        "logits": model(input_ids=ids).logits,
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "attention": model.config._attn_implementation,
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "added": [name for module in model.modules() for name in vars(module) if name.startswith("sparsec")],
        "training": model.training,
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "parts": [name for name, _ in model.named_modules()],
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def test_the_plan_is_another_one_and_valid(ran: Ran) -> None:
    assert ran.result.plan != ran.program.plan or ran.each.trains
    assert Plan.parse(ran.result.plan.to_json()) == ran.result.plan


def test_plan_and_tensors_fit_the_model(ran: Ran) -> None:
    check(ran.program.model, ran.result.plan, ran.result.tensors)
    for tensor in ran.result.tensors.values():
        assert (tensor.dtype, tensor.device.type, tensor.requires_grad) == (torch.float32, "cpu", False)


def test_the_plan_has_what_the_pass_says_it_gives(ran: Ran) -> None:
    assert lacks(ran.program.plan, ran.each.needs) == []
    assert lacks(ran.result.plan, ran.each.gives) == []


def test_the_pass_says_whether_it_adds_tensors(ran: Ran) -> None:
    """A dry run names the artifact's files by it. Frozen merged tokens become rows of the model's own embeddings."""
    stored = set(tensor_names(ran.result.plan)) - {INPUT, NEVER}
    assert bool(stored) == ((ran.each.adds_tensors() and ran.result.plan.dsa is None) or bool(ran.program.tensors))


@pytest.mark.parametrize(
    ("options", "adds"),
    [
        ({}, False),
        ({"write": "merged"}, True),
        ({"mode": "dynamic"}, True),
        ({"mode": "dynamic", "prediction": "mean"}, False),
    ],
)
def test_merged_tokens_add_tensors_where_the_runtime_needs_some(options: dict[str, Any], adds: bool) -> None:
    assert known_passes()["dynamic-tokenization"].model_validate(options).adds_tensors() == adds


def test_the_model_is_left_dense(ran: Ran) -> None:
    for key, value in ran.before.items():
        assert same(value, ran.after[key]), key
    assert ran.after["added"] == []


def test_the_program_is_not_changed(ran: Ran) -> None:
    assert not ran.program.plan.passes
    assert set(ran.program.tensors) == set(tensor_names(ran.program.plan))


def test_the_same_seed_gives_the_same_result(ran: Ran) -> None:
    torch.manual_seed(99)  # a pass takes its randomness from program.seed alone
    again = ran.each.run(
        Program(ran.program.model, ran.program.plan, ran.program.tensors, ran.program.seed), ran.calibration
    )
    assert again.plan.digest == ran.result.plan.digest
    assert same(dict(again.tensors), dict(ran.result.tensors))
    assert same(dict(again.weights), dict(ran.result.weights))
    assert again.measured == ran.result.measured


def test_only_a_pass_that_trains_changes_weights(ran: Ran) -> None:
    own = dict(ran.program.model.named_parameters())
    assert ran.each.trains or not ran.result.weights
    assert all(weight.shape == own[name].shape for name, weight in ran.result.weights.items())


def test_measurements_survive_json(ran: Ran) -> None:
    measured = dict(ran.result.measured)
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured


def test_progress_is_reported_in_words_that_end_whole(ran: Ran) -> None:
    assert ran.events
    last: dict[str, Event] = {event.stage: event for event in ran.events if event.total}
    assert all(event.done == event.total for event in last.values()), last
    assert all("\n" not in event.stage + event.note for event in ran.events)


def test_the_model_answers_under_the_plan(ran: Ran) -> None:
    with applied(ran.program.model, ran.result.plan, ran.result.tensors):
        out = ran.program.model.generate(
            input_ids=torch.arange(3, 203)[None], attention_mask=torch.ones(1, 200), max_new_tokens=3, do_sample=False
        )
    assert out.shape == (1, 203)


def test_a_cost_is_expected(ran: Ran) -> None:
    found = ran.each.cost(ran.program.plan, 1024)
    assert (found.tokens > 0) == (ran.each.name not in FREE)
    assert found.resident >= 0
    # --dry-run knows no plan but the model's own.
    own = base_plan(ran.program.model.config, "test")
    assert (ran.each.cost(own, 1024).tokens > 0) == (found.tokens > 0)


def test_a_configuration_round_trips_through_a_recipe(ran: Ran, tmp_path: Path) -> None:
    made = make_recipe({"passes": {ran.each.name: ran.each.model_dump(mode="json")}})
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    again = make_recipe(read_recipe(tmp_path / "recipe.yaml"))
    assert again == made
    kind = known_passes()[ran.each.name]
    assert kind.model_validate(again.passes[ran.each.name]) == ran.each


@pytest.mark.parametrize("name", known_passes())
class TestDeclared:
    """What a pass says about itself."""

    def test_it_is_registered_under_its_name(self, name: str) -> None:
        (entry,) = entry_points(group=GROUP, name=name)
        assert entry.load() is known_passes()[name]
        assert known_passes()[name].name == name

    def test_it_has_a_row_here_and_a_page(self, name: str) -> None:
        assert name in {case[0] for case in CASES.values()}
        assert (ROOT / "docs" / "passes" / f"{name}.md").is_file()

    def test_it_says_what_it_is(self, name: str) -> None:
        kind = known_passes()[name]
        assert kind.tier in ("training-free", "minutes", "hours")
        assert kind.summary
        assert "\n" not in kind.summary
        assert "arXiv" in kind.source
        assert kind.__doc__
        assert not set(kind.after) & set(kind.conflicts)

    def test_every_option_has_a_default_and_a_description(self, name: str) -> None:
        kind = known_passes()[name]
        assert kind() == kind()
        assert all(field.description for field in kind.model_fields.values())

    def test_an_unknown_option_names_the_nearest(self, name: str) -> None:
        option = next(iter(known_passes()[name].model_fields))
        with pytest.raises(UsageError, match=f"{name} has no option '{option}s': did you mean '{option}'"):
            make_passes({name: {f"{option}s": 1}})

    def test_a_wrong_value_names_the_option(self, name: str) -> None:
        option = next(iter(known_passes()[name].model_fields))
        with pytest.raises(UsageError, match=rf"^{name}\.{option}: ") as caught:
            make_passes({name: {option: "nonsense"}})
        assert "\n" not in str(caught.value)


def test_heads_are_split_once(
    make: Callable[..., Pass], prepared: Callable[[str], Program], calibration: Calibration
) -> None:
    with pytest.raises(PlanError, match="already has local heads: run it first"):
        make("rtpurbo").run(prepared("indexcache"), calibration)


def test_whole_kv_heads_are_kept_or_freed(
    make: Callable[..., Pass], prepared: Callable[[str], Program], calibration: Calibration
) -> None:
    plan = make("rtpurbo", granularity="kv_head").run(prepared("rtpurbo"), calibration).plan
    for layer in plan.layers:
        assert len(layer.local) == plan.model.group * len(layer.local_kv_heads(plan.model.group))


def test_every_layer_has_an_indexer_where_that_is_asked_for(
    make: Callable[..., Pass], prepared: Callable[[str], Program], calibration: Calibration
) -> None:
    program = prepared("rtpurbo")
    few = make("rtpurbo", ratio=0.1).run(program, calibration)
    every = make("rtpurbo", ratio=0.1, per_layer=1).run(program, calibration)
    assert every.plan.indexed() == tuple(range(every.plan.model.layers)) != few.plan.indexed()
    scores = every.measured["head_scores"]
    for i, layer in enumerate(every.plan.layers):
        added = set(layer.retrieval) - set(few.plan.layers[i].retrieval)
        assert set(few.plan.layers[i].retrieval) <= set(layer.retrieval)
        assert all(scores[i][head] == max(scores[i]) for head in added)
    groups = make("rtpurbo", ratio=0.1, per_layer=1, granularity="kv_head").run(program, calibration).plan
    for layer in groups.layers:
        assert layer.retrieval
        assert len(layer.local) == groups.model.group * len(layer.local_kv_heads(groups.model.group))


# Order


class Fake(Pass):
    """Does nothing, wherever it stands."""

    name: ClassVar[str] = "fake"
    tier: ClassVar[Literal["minutes"]] = "minutes"
    summary: ClassVar[str] = "nothing"
    source: ClassVar[str] = "nobody"

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        raise NotImplementedError

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        return Cost(1)


def fake(name: str, **declared: Any) -> Pass:
    return type(name, (Fake,), {"name": name, "__module__": __name__, **declared})()


def names(passes: list[Pass]) -> list[str]:
    return [each.name for each in passes]


def test_the_order_on_the_command_line_does_not_matter() -> None:
    for given in ({"rtpurbo": {}, "indexcache": {}}, {"indexcache": {}, "rtpurbo": {}}):
        assert names(make_passes(given)) == ["rtpurbo", "indexcache"]


def test_passes_run_after_those_they_want_to_and_else_as_given() -> None:
    given = [fake("c", after=("a", "x")), fake("b"), fake("a")]
    assert names(in_order(given)) == ["b", "a", "c"]


def test_a_circle_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="each want to run after another: a, b"):
        in_order([fake("a", after=("b",)), fake("b", after=("a",))])


def test_passes_that_exclude_each_other_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="a and b exclude each other: drop one"):
        in_order([fake("b"), fake("a", conflicts=("b",))])


def test_what_a_pass_needs_must_be_given_before_it() -> None:
    dense = Plan.dense(ModelShape(model_type="llama", layers=2, heads=2, kv_heads=2, head_dim=8), "test")
    late, before = fake("late", needs=("indexers",)), fake("before", gives=("indexers",), after=("late",))
    with pytest.raises(UsageError, match="late needs indexers: add one of rtpurbo to --passes"):
        check_needs([late], dense)
    with pytest.raises(UsageError, match="late needs indexers"):
        check_needs(in_order([late, before]), dense)
    check_needs([before, late], dense)
    with pytest.raises(UsageError, match="own needs a model with indexers of its own: name another model or pass"):
        check_needs([fake("own", needs=("a model with indexers of its own",))], dense)


# Third parties

THIRD_PARTY = '''
from typing import ClassVar

from pydantic import Field
from sparsec.passes.base import Cost, Pass, PassResult


class Window(Pass):
    """Every head sees a window."""

    name: ClassVar[str] = "allwindow"
    tier: ClassVar[str] = "training-free"
    summary: ClassVar[str] = "window every head"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    gives: ClassVar[tuple[str, ...]] = ("heads",)

    size: int = Field(default=64, ge=1, description="tokens")

    def run(self, program, calibration):
        heads = (0,) * program.plan.model.heads
        layers = [{"heads": heads if layer.heads else None} for layer in program.plan.layers]
        plan = program.plan.edit(layers=layers, window={"size": self.size, "sinks": 4})
        return PassResult(plan, {}, {"windowed": len(layers)})

    def cost(self, plan, max_positions):
        return Cost(tokens=0)
'''


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``distribution(code, allwindow="module:Class")`` installs a package with these entry points for this test."""

    def install(code: str, **passes: str) -> None:
        place = tmp_path / "site"
        info = place / "thirdparty-1.0.dist-info"
        info.mkdir(parents=True)
        (place / "thirdparty_pass.py").write_text(code)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in passes.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        monkeypatch.syspath_prepend(str(place))

    yield install
    sys.modules.pop("thirdparty_pass", None)


def test_a_third_partys_pass_is_listed_and_compiles(
    distribution: Callable[..., None], tiny_deep: Path, tmp_path: Path
) -> None:
    distribution(THIRD_PARTY, allwindow="thirdparty_pass:Window")
    assert "allwindow" in known_passes()
    assert list(known_passes()) == sorted(known_passes())
    gate = {"context": 256, "max_loss": 1}
    recipe = make_recipe({"passes": {"allwindow": {"size": 32}}, "gate": gate})
    out = tmp_path / "out"
    compile_model(Job(str(tiny_deep), out, recipe, tmp_path / "cache"))
    assert not (out / TENSORS).exists()
    model, _ = load(out)
    assert model.sparsec_plan.window.size == 32
    assert [record.name for record in model.sparsec_plan.passes] == ["allwindow"]
    assert all(module.sparsec.local_kv.numel() == 2 for module in attention_modules(model))


def test_a_third_partys_broken_pass_stops_only_those_who_ask_for_it(distribution: Callable[..., None]) -> None:
    distribution("import nonsense_that_is_nowhere", broken="thirdparty_pass:Broken")
    assert names(make_passes({"rtpurbo": {}})) == ["rtpurbo"]
    for ask in (known_passes, lambda: make_passes({"broken": {}})):
        with pytest.raises(UsageError, match=r"the pass 'broken' \(thirdparty_pass:Broken\) cannot be imported .*: un"):
            ask()


def test_something_else_under_a_passs_name_is_refused(distribution: Callable[..., None]) -> None:
    distribution(THIRD_PARTY, other="thirdparty_pass:Window")
    with pytest.raises(UsageError, match="is no pass named 'other'"):
        known_passes()


def test_a_name_that_is_taken_is_refused(distribution: Callable[..., None]) -> None:
    distribution(THIRD_PARTY, rtpurbo="thirdparty_pass:Window")
    with pytest.raises(UsageError, match="are both named 'rtpurbo': uninstall one"):
        make_passes({"rtpurbo": {}})


@pytest.mark.parametrize(("window", "recent"), [(64, 64), (8192, 512)])
def test_retrieval_heads_keep_what_local_heads_see_and_little_of_long_windows(window: int, recent: int) -> None:
    shape = ModelShape(model_type="llama", layers=2, heads=4, kv_heads=2, head_dim=16)
    split = Rtpurbo(**Rtpurbo.presets["hours"])._split(
        Plan.dense(shape, "test"), {0: (1,)}, Window(size=window, sinks=4), None
    )
    assert split.selector is not None
    assert split.selector.recent == recent


def test_indexers_are_fitted_for_the_recent_tokens_that_the_plan_keeps(
    prepared: Callable[[str], Program],
    make: Callable[..., Pass],
    calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[Forced] = []

    def forced(*given: Any, **more: Any) -> Forced:
        fitted.append(Forced(*given, **more))
        return fitted[-1]

    monkeypatch.setattr("sparsec.passes.rtpurbo.Forced", forced)
    plan = make("rtpurbo", forced_recent=None).run(prepared("rtpurbo"), calibration).plan
    assert plan.selector is not None
    assert plan.window is not None
    assert plan.selector.recent == plan.window.size
    assert [(each.sinks, each.recent) for each in fitted] == [(plan.selector.sinks, plan.selector.recent)]


def test_rtpurbo_writes_how_index_keys_are_held_and_read() -> None:
    shape = ModelShape(model_type="llama", layers=2, heads=4, kv_heads=2, head_dim=16)
    dense, heads, window = Plan.dense(shape, "test"), {0: (1,), 1: (0, 2)}, Window(size=64, sinks=4)
    plain = Rtpurbo()._split(dense, heads, window, None).selector
    assert plain is not None
    assert (plain.index_dtype, plain.coarse) == ("model", None)
    asked = Rtpurbo(index_dtype="fp8", select="block", coarse_from=1000, coarse_one_in=8)
    found = asked._split(dense, heads, window, None).selector
    assert found is not None
    assert (found.index_dtype, found.coarse) == ("fp8", Coarse(min_context=1000, one_in=8))
    with pytest.raises(UsageError, match="coarse_from needs select=block"):
        make_passes({"rtpurbo": {"coarse_from": 1000}})
