"""Plans, recipes, thresholds and manifests that may be anybody's: a valid object or one line, never a traceback."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sparsec.compiler.explain import artifact_data, artifact_text
from sparsec.compiler.plain_yaml import NotPlain, parse
from sparsec.compiler.recipe import make_recipe, read_recipe
from sparsec.compiler.registry import make_passes
from sparsec.compiler.thresholds import read_thresholds
from sparsec.errors import PlanError, SparsecError, UsageError
from sparsec.export.integrity import check
from sparsec.export.manifest import escapes, read_manifest
from sparsec.layout import CONFIG, MANIFEST, PLAN_KEY
from sparsec.plan import Plan
from sparsec.plugins.runtime import tensor_names

EXAMPLES = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
    database=None,
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["../x", "/etc/passwd", "full", "shared", "local", 2**63, -(2**70), 10**4000, "\ud800", "\0"]),
)  # fmt: skip
ANY = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip

PLAN = {
    "format": 1, "producer": "sparsec test",
    "model": {"model_type": "llama", "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8},
    "window": {"size": 16, "sinks": 2}, "min_context": 8,
    "selector": {"rank": 4, "rope": "pre", "top_p": 0.9, "granularity": "token", "block": 8, "sinks": 2, "recent": 4,
                 "scope": "layer"},
    "layers": [{"heads": [1, 0, 1, 1], "index": "full"}, {"heads": [0, 0, 1, 0], "index": "shared"},
               {"heads": None, "index": "none"}],
    "passes": [{"name": "rtpurbo", "config": {"ratio": 0.15}}],
}  # fmt: skip
RECIPE = {
    "passes": {"rtpurbo": {"ratio": 0.2, "window": 64}, "indexcache": {"keep": 0.5}},
    "calibration": "builtin", "seed": 3, "gate": {"max_loss": 0.05, "windows": 2},
}  # fmt: skip
GATE = {
    "golden": {"overlap": 0.9, "logits": None}, "quality": {"lengths": [256], "tasks": ["kv"], "max_loss": 0.1},
    "speed": {"context": 64, "least": 0.5}, "require": ["pytorch"],
}  # fmt: skip


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container and key in it."""
    if isinstance(data, dict):
        return [(data, key) for key in data] + [place for value in data.values() for place in places(value)]
    if isinstance(data, list):
        return [(data, key) for key in range(len(data))] + [place for value in data for place in places(value)]
    return []


@st.composite
def spoilt(draw: Any, valid: Any) -> Any:
    """Valid data with a few places replaced, removed, doubled or added; or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ANY)
    data = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        found = places(data)
        if not found:
            break
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        kind = draw(st.integers(0, 3))
        if kind == 0:
            holder.pop(key)
        elif kind == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif kind == 1:
            holder[draw(st.text(max_size=5))] = draw(ANY)
        else:
            holder[key] = draw(ANY)
    return data


def said(error: Exception) -> None:
    """One line that can be shown."""
    line = str(error)
    assert line.strip()
    assert "\n" not in line
    assert len(line) < 2000


@EXAMPLES
@given(spoilt(PLAN))
def test_any_plan_is_valid_or_an_error(data: Any) -> None:
    try:
        plan = Plan.parse(data)
    except PlanError as error:
        said(error)
        return
    assert Plan.parse(json.loads(json.dumps(plan.to_json()))) == plan
    assert len(plan.digest) == 64
    assert len(plan.pattern) == len(plan.indexed())
    tensor_names(plan)


@EXAMPLES
@given(spoilt(RECIPE))
def test_any_recipe_is_valid_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(_yaml(data))
    try:
        recipe = make_recipe(read_recipe(path))
        make_passes(recipe.passes)
    except UsageError as error:
        said(error)
        return
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@settings(EXAMPLES, max_examples=100)
@given(spoilt(GATE))
def test_any_gate_is_valid_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "gate.yaml"
    path.write_bytes(_yaml(data))
    try:
        read_thresholds(path)
    except UsageError as error:
        said(error)


@settings(EXAMPLES, max_examples=200)
@given(st.text(max_size=60) | st.sampled_from(["2020-13-99", "!!int x", "!!timestamp 1", "? [a]: b", "- &a [*a]"]))
def test_any_text_is_yaml_or_not(text: str) -> None:
    try:
        parse(text)
    except NotPlain as error:
        said(error)


def test_yaml_that_grows_or_runs_is_not_read() -> None:
    laughs = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text in (laughs, "!!python/object/apply:os.system ['true']", "[" * 100, "x: " + "9" * 5000, "a" * (2 << 20)):
        with pytest.raises(NotPlain):
            parse(text)


@pytest.fixture(scope="module")
def manifested(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder whose files are links to the artifact's but for the small ones, and those two as data."""
    folder = tmp_path_factory.mktemp("fuzz")
    for file in tiny_artifact.iterdir():
        if file.name not in (MANIFEST, CONFIG):
            (folder / file.name).symlink_to(file)
    made, config = (json.loads((tiny_artifact / name).read_text()) for name in (MANIFEST, CONFIG))
    made["files"] = dict(list(made["files"].items())[:3]) | {
        "sparsec.safetensors": made["files"]["sparsec.safetensors"]
    }
    return folder, made, config


@EXAMPLES
@given(st.data())
def test_any_manifest_is_read_or_an_error(manifested: tuple[Path, Any, Any], data: Any) -> None:
    folder, made, config = manifested
    (folder / MANIFEST).write_text(json.dumps(data.draw(spoilt(made))))
    (folder / CONFIG).write_text(json.dumps(config))
    for work in (lambda: read_manifest(folder), lambda: artifact_text(folder, artifact_data(folder))):
        try:
            work()
        except SparsecError as error:
            said(error)


@settings(EXAMPLES, max_examples=100)
@given(st.data())
def test_any_config_is_checked_without_a_traceback(manifested: tuple[Path, Any, Any], data: Any) -> None:
    folder, made, config = manifested
    (folder / MANIFEST).write_text(json.dumps(made))
    spoilt_config = data.draw(spoilt({key: config[key] for key in ("model_type", "num_hidden_layers", PLAN_KEY)}))
    (folder / CONFIG).write_text(json.dumps(spoilt_config))
    for finding in check(folder):
        assert "\n" not in finding.said


@EXAMPLES
@given(st.text(max_size=30) | st.lists(st.sampled_from(["..", ".", "", "a", "/", "\\", "C:", "\0"])).map("/".join))
def test_a_name_that_is_let_through_stays_inside(name: str) -> None:
    if escapes(name) is None:
        root = Path("/somewhere/artifact")
        inside = root / name
        assert root in inside.parents
        assert ".." not in inside.parts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_context": 2**40}, "it asks for a number of 41 bits"),
        ({"window": {"size": 10**4000, "sinks": 0}}, "not a valid plan: it asks for"),
        (
            {"passes": [{"name": "x", "config": {"deep": [[[[[[[[[[[[[[[[0]]]]]]]]]]]]]]]]}}]},
            "nested more than 16 deep",
        ),
    ],
)
def test_a_plan_that_asks_for_too_much_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse({**PLAN, **changes})
    assert words in str(caught.value)


def _yaml(data: Any) -> bytes:
    """As a file, whatever is in it."""
    try:
        return yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (ValueError, yaml.YAMLError):
        return json.dumps(str(data)[:50]).encode("utf-8", "surrogatepass")
