"""compile --from: another engine's head split or sharing pattern is where the passes begin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsec.compiler.recipe import make_recipe
from sparsec.compiler.start import Start, read_start
from sparsec.errors import ArtifactError, UsageError
from sparsec.export.dialects import DIALECTS
from sparsec.export.dialects.files import write_files
from sparsec.layout import MANIFEST, MEASUREMENTS, REPORT, read_json, read_plan
from sparsec.plan import ModelShape, Plan

HEADS = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
SPLIT = {
    "sink_token_num": 3,
    "swa_token_num": 40,
    "seqlen_threshold": 48,
    **{str(i): row for i, row in enumerate(HEADS)},
}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    write_files(tmp_path / "theirs", {"headwise_config.json": SPLIT})
    return tmp_path / "theirs"


def test_indexers_are_fitted_to_the_heads_that_were_given(
    cli: Any, compile_line: Callable[..., list[str]], theirs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = cli(*compile_line(out, "--from", str(theirs), "--set", "gate.min_recall=0", "--set", "gate.max_loss=1"))
    assert done.status == 0, done.err
    plan = read_plan(out)
    assert [list(layer.heads or ()) for layer in plan.layers] == HEADS
    assert plan.window is not None
    assert (plan.window.size, plan.window.sinks, plan.min_context) == (40, 3, 48)
    assert plan.selector is not None
    assert plan.selector.sinks == 3
    assert plan.indexed() == (0, 2, 3)
    measured = read_json(out / MEASUREMENTS)["passes"][0]["measured"]
    assert measured["given"]["detected"] >= 1
    assert measured["kept_heads"] == 4
    assert "the split was given (--from) and kept" in (out / REPORT).read_text()
    # What was theirs is in the recipe now: their files are not needed again.
    shutil.rmtree(theirs)
    again = tmp_path / "again"
    done = cli("compile", "--from-recipe", out, "-o", again)
    assert done.status == 0, done.err
    assert read_plan(again) == plan
    assert cli("verify", again, "--quick").status == 0
    back = tmp_path / "back"
    assert cli("export", out, "--to", "headwise", "-o", back).status == 0
    start, _ = read_start(back)
    assert start is not None
    assert [list(row) for row in start.heads or ()] == HEADS


def test_a_split_alone_is_judged_and_written(
    cli: Any, compile_line: Callable[..., list[str]], theirs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    source = compile_line(out)[1]
    done = cli("compile", source, "--from", theirs, "-o", out, "--set", "gate.max_loss=1")
    assert done.status == 0, done.err
    plan = read_plan(out)
    assert plan.passes == ()
    assert plan.selector is None
    assert [list(layer.heads or ()) for layer in plan.layers] == HEADS
    assert read_json(out / MANIFEST)["recipe"]["passes"] == {}
    assert cli("verify", out, "--quick").status == 0
    assert "Passes: none" in (out / REPORT).read_text()
    assert cli("compile", source, "--from", theirs, "--dry-run").status == 0


def test_a_pattern_is_an_option_of_indexcache(cli: Any, tmp_path: Path, tiny_deep: Path) -> None:
    config = {"config.json": {"index_topk_pattern": "FSFS", "num_hidden_layers": 4}}
    write_files(tmp_path / "pattern", config)
    assert read_start(tmp_path / "pattern") == (None, "FSFS")
    done = cli("compile", tiny_deep, "--from", tmp_path / "pattern", "--passes", "rtpurbo", "-o", tmp_path / "out")
    assert done.status == 2
    assert "is a sharing pattern: add indexcache to --passes" in done.line


def test_what_is_no_start_is_a_line(cli: Any, tmp_path: Path, tiny_deep: Path) -> None:
    shape = ModelShape(model_type="llama", layers=4, heads=4, kv_heads=2, head_dim=8)
    base = Plan.dense(shape, "test", native=(1,))
    start = Start(dialect="duo", kv_heads=((1, 0),) * 4, window=8, sinks=1)
    plan = start.plan(base)
    assert plan.layers[1].heads is None
    assert plan.layers[0].heads == (1, 1, 0, 0)
    with pytest.raises(ArtifactError, match="keeps every head"):
        Start(dialect="duo", kv_heads=((1, 1),) * 4, window=8, sinks=1).plan(base)
    with pytest.raises(ArtifactError, match="splits 3 layers"):
        Start(dialect="duo", kv_heads=((1, 0),) * 3, window=8, sinks=1).plan(base)
    with pytest.raises(UsageError, match="none of the known formats"):
        read_start(tiny_deep)
    with pytest.raises(UsageError, match="no passes"):
        make_recipe({"passes": {}})
    assert (
        cli("compile", tiny_deep, "--from", tmp_path / "nowhere", "--passes", "rtpurbo", "-o", tmp_path / "o").status
        == 1
    )


def test_every_format_that_is_written_is_a_start(tiny_artifact: Path, tmp_path: Path) -> None:
    plan = read_plan(tiny_artifact)
    base = Plan.dense(plan.model, "test")
    for name in ("headwise", "duo"):
        encode = DIALECTS[name].encode
        assert encode is not None
        write_files(tmp_path / name, encode(plan))
        start, _ = read_start(tmp_path / name)
        assert start is not None
        again = start.plan(base)
        assert again.window == plan.window
        if name == "headwise":
            assert [layer.heads for layer in again.layers] == [layer.heads for layer in plan.layers]
        assert make_recipe({"passes": {}, "start": start.model_dump(mode="json")}).start == start


def test_recipes_without_a_start_are_what_they_were() -> None:
    assert make_recipe({"passes": {"rtpurbo": {}}}).model_dump(mode="json").keys() == {
        "passes", "calibration", "seed", "gate",
    }  # fmt: skip
