"""The command line where all goes well: what each command prints, writes and leaves alone."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import stat
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import sparsec.plugins.load as plugin
from sparsec.compiler import pipeline, source
from sparsec.compiler.recipe import make_recipe
from sparsec.layout import MANIFEST, read_plan

LINE = re.compile(r"[a-z0-9][a-z0-9 :]*: \S.*")  # of a log: stage, then how far or what


def contents(folder: Path) -> dict[str, str]:
    """sha256 by name of every file."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def readable(log: str) -> bool:
    """Nothing that only a terminal understands, and nothing from a library."""
    return all(line.isprintable() and LINE.fullmatch(line) for line in log.split("\n")[:-1])


# Help and lists


def test_the_console_script_starts_without_torch() -> None:
    code = (
        "import sys, sparsec.compiler.cli as c; c.cli(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.endswith("False\n")
    command = [Path(sys.executable).with_name("sparsec"), "--version"]
    script = subprocess.run(command, capture_output=True, text=True, check=True)
    assert script.stderr == ""
    assert script.stdout.startswith("sparsec, version ")


@pytest.mark.parametrize("arguments", [["--help"], ["compile", "-h"], ["eval", "--help"]])
def test_help_is_printed(cli: Any, arguments: list[str]) -> None:
    result = cli(*arguments)
    assert (result.status, result.err) == (0, "")
    assert "Usage: sparsec" in result.out


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-P", "-m", "sparsec", "--version"]
    assert "sparsec, version" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_without_a_command_the_help_is_printed_and_the_call_was_wrong(cli: Any) -> None:
    result = cli()
    assert result.status == 2
    assert "Commands:" in result.err


def test_passes_are_listed_with_their_tier(cli: Any) -> None:
    out = cli("passes").out
    for name, tier in (("rtpurbo", "minutes"), ("window", "training-free")):
        assert re.search(rf"^{name} +{tier} ", out, re.MULTILINE)
    listed = json.loads(cli("passes", "--json").out)
    assert [entry["name"] for entry in listed] == [
        "distill",
        "dynamic-tokenization",
        "hisa",
        "indexcache",
        "informed-routing",
        "misa",
        "razor",
        "rtpurbo",
        "window",
    ]


def test_a_pass_is_explained_with_every_option_and_its_default(cli: Any) -> None:
    (described,) = json.loads(cli("passes", "rtpurbo", "--json").out)
    assert described["options"]["ratio"]["default"] == 0.15
    out = cli("passes", "rtpurbo").out
    for name, entry in described["options"].items():
        assert re.search(rf"^{name} +{re.escape(str(entry['default']))} +{re.escape(entry['help'])}", out, re.MULTILINE)


# compile


def test_a_dry_run_tells_stages_time_memory_and_files_and_writes_nothing(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = cli(*compile_line(out, "--dry-run"))
    assert (result.status, result.err) == (0, "")
    assert re.findall(r"^(rtpurbo|indexcache|gate) ", result.out, re.MULTILINE) == ["rtpurbo", "indexcache", "gate"]
    for word in ("time", "memory", "disk", "files"):
        assert re.search(rf"^{word} +\S", result.out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
    expected = json.loads(cli(*compile_line(out, "--dry-run", "--json")).out)
    assert expected["files"] == sorted(contents(tiny_artifact))
    assert [stage["stage"] for stage in expected["stages"]] == ["rtpurbo", "indexcache", "gate"]
    assert expected["seconds"] > 0
    assert expected["memory"] > expected["disk"] > 0


def test_the_manifest_names_every_file_and_permissions_are_the_users(tiny_artifact: Path) -> None:
    made = json.loads((tiny_artifact / MANIFEST).read_text())
    found = contents(tiny_artifact)
    found.pop(MANIFEST)
    assert made["files"] == found
    mask = os.umask(0)
    os.umask(mask)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tiny_artifact.iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes
    assert stat.S_IMODE(tiny_artifact.stat().st_mode) == 0o777 & ~mask


def test_the_base_weights_are_the_sources(tiny_artifact: Path, tiny_deep: Path) -> None:
    ours, theirs = contents(tiny_artifact), contents(tiny_deep)
    assert {name for name in theirs if ours.get(name) != theirs[name]} == {"config.json"}


def test_a_compile_reports_progress_in_lines_a_log_can_hold(tiny_compiled: tuple[Path, Any]) -> None:
    out, result = tiny_compiled
    assert readable(result.err), result.err
    stages = ["detect retrieval heads", "train indexers", "measure dense", "search sharing pattern", "gate"]
    at = [result.err.index(f"{stage}: ") for stage in stages]
    assert at == sorted(at)
    assert re.search(r"^gate +passed", result.out, re.MULTILINE)
    assert str(out / "report.html") in result.out


def test_on_a_terminal_bars_are_drawn(cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    running = cli.start(*compile_line(tmp_path / "out"), stderr=os.ttyname(theirs))
    os.set_blocking(ours, False)
    seen, status = b"", None
    while status is None:  # a terminal that nobody reads makes its writer wait
        try:
            seen += os.read(ours, 4096)
        except BlockingIOError:
            status = running.poll()
            time.sleep(0.02)
    os.close(theirs)
    os.close(ours)
    assert status == 0
    assert b"\x1b[" in seen
    assert b"gate" in seen
    assert b"Loading weights" not in seen


def test_the_result_as_json_is_all_of_standard_output(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path
) -> None:
    result = cli(*compile_line(tmp_path / "out", "--json"))
    found = json.loads(result.out)
    assert found["plan"] == read_plan(tiny_artifact).digest
    assert found["pattern"] == read_plan(tiny_artifact).pattern
    assert found["gate"]["passed"] is True
    assert found["out"] == str(tmp_path / "out")


def test_a_second_compile_uses_what_is_stored_and_writes_the_same(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path
) -> None:
    result = cli(*compile_line(tmp_path / "out", "--json"))
    seconds = json.loads(result.out)["seconds"]
    assert {name for name, took in seconds.items() if took == 0} == {
        "rtpurbo",
        "indexcache",
        "measure rtpurbo",
        "measure dense",
        "measure windows",
    }
    assert "rtpurbo: stored result" in result.err
    assert contents(tmp_path / "out") == contents(tiny_artifact)


def test_a_changed_option_computes_what_depends_on_it_and_nothing_else(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path
) -> None:
    result = cli(*compile_line(tmp_path / "out", "--json", "--keep", "25%", "--max-loss", "0.5%"))
    found = json.loads(result.out)
    assert {name for name, took in found["seconds"].items() if took == 0} == {
        "rtpurbo",
        "measure rtpurbo",
        "measure dense",
        "measure windows",
    }
    made = json.loads((tmp_path / "out" / MANIFEST).read_text())["recipe"]["passes"]["indexcache"]
    assert (made["keep"], made["max_loss"]) == (0.25, 0.005)


def test_the_recipe_of_an_artifact_gives_the_same_artifact(
    cli: Any, tiny_artifact: Path, tiny_deep: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(cli("inspect", tiny_artifact, "--recipe").out)
    result = cli("compile", tiny_deep, "--recipe", recipe, "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert result.status == 0, result.err
    assert read_plan(tmp_path / "out").digest == read_plan(tiny_artifact).digest
    assert contents(tmp_path / "out") == contents(tiny_artifact)


def test_options_on_the_line_win_over_the_recipe(
    cli: Any, tiny_artifact: Path, tiny_deep: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    data = yaml.safe_load(cli("inspect", tiny_artifact, "--recipe").out)
    recipe.write_text(yaml.safe_dump(data | {"calibration": "nowhere.txt", "seed": 5}))
    line = ["compile", tiny_deep, "--recipe", recipe, "--calibration", "builtin", "--seed", "0"]
    line += ["--passes", "rtpurbo", "--set", "gate.rows=100", "-o", tmp_path / "out"]
    result = cli(*line)
    assert result.status == 0, result.err
    made = yaml.safe_load(cli("inspect", tmp_path / "out", "--recipe").out)
    assert made == data | {
        "passes": {"rtpurbo": data["passes"]["rtpurbo"]},
        "gate": {**data["gate"], "rows": 100},
    }


def test_the_dense_model_is_gone_before_the_artifact_is_loaded(
    cli: Any,
    tiny_artifact: Path,
    tiny_deep: Path,
    tiny_options: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def load_model(*args: Any, **options: Any) -> Any:
        model = source.load_model(*args, **options)
        dense.append(weakref.ref(model))
        return model

    def load(*args: Any, **options: Any) -> Any:
        alive.append(dense[0]() is not None)
        return plugin.load(*args, **options)

    monkeypatch.setattr(pipeline, "load_model", load_model)
    monkeypatch.setattr(pipeline, "load", load)
    passes = {name: options for name, options in tiny_options.items() if name != "gate"}
    recipe = make_recipe({"passes": passes, "gate": tiny_options["gate"]})
    pipeline.compile_model(pipeline.Job(str(tiny_deep), tmp_path / "out", recipe, cli.cache))
    assert alive == [False]


def test_an_artifact_of_ours_is_replaced_without_being_asked(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli(*compile_line(out, "--passes", "rtpurbo", "--set", "rtpurbo.top_p=0.8")).status == 2  # indexcache.*
    assert cli(*compile_line(out, "--keep", "1")).status == 0
    before = read_plan(out)
    assert cli(*compile_line(out)).status == 0
    assert read_plan(out) != before
    assert contents(out) == contents(tiny_artifact)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    assert cli(*compile_line(tmp_path / "out")).status == 0
    assert contents(tmp_path / "out") == contents(tiny_artifact)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_is_followed(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    for _ in range(2):
        assert cli(*compile_line(tmp_path / "link")).status == 0
        assert (tmp_path / "link").is_symlink()
        assert [file.name for file in (tmp_path / "disk").iterdir()] == ["out"]
    assert contents(tmp_path / "link") == contents(tiny_artifact)


# inspect


def test_an_artifact_is_explained(cli: Any, tiny_artifact: Path, tiny_deep: Path) -> None:
    result = cli("inspect", tiny_artifact)
    plan = read_plan(tiny_artifact)
    assert (result.status, result.err) == (0, "")
    for words in (str(tiny_deep), plan.pattern, plan.digest[:16], "rtpurbo, indexcache", "passed", "bits per byte"):
        assert words in result.out
    marks = re.findall(r"^ +\d  ([#.]{4})", result.out, re.MULTILINE)
    assert marks == ["".join("#" if head else "." for head in layer.heads or ()) for layer in plan.layers]


def test_inspect_gives_everything_as_json(cli: Any, tiny_artifact: Path) -> None:
    data = json.loads(cli("inspect", tiny_artifact, "--json").out)
    plan = read_plan(tiny_artifact)
    assert data["plan"] == plan.to_json()
    assert (data["digest"], data["pattern"]) == (plan.digest, plan.pattern)
    assert [entry["name"] for entry in data["measurements"]["passes"]] == ["rtpurbo", "indexcache"]
    assert data["manifest"]["calibration"] == data["measurements"]["calibration"]["digest"]


# bench


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_an_artifact_is_timed_beside_the_dense_model(
    kernels: str, cli: Any, tiny_artifact: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    line = ["bench", tiny_artifact, "--contexts", "24,200", "--batch", "2", "--tokens", "2", "--kernels", kernels]
    result = cli(*line, "-o", file, "--plot", tmp_path / "bench.svg")
    assert result.status == 0, result.err
    drawn = ElementTree.parse(tmp_path / "bench.svg").getroot()
    assert len(drawn.findall(".//{*}circle")) == 2 * 4  # two panels, two systems, two contexts
    found = json.loads(file.read_text())
    rows = {(row["system"], row["context"]): row for row in found["rows"]}
    assert set(rows) == {(system, context) for system in ("dense", "artifact") for context in (24, 200)}
    assert all(row["prefill_s"] > 0 and row["step_s"] > 0 for row in rows.values())
    assert rows["artifact", 200]["runs"] == ("Triton kernels" if kernels == "triton" else "PyTorch reference")
    shape = read_plan(tiny_artifact).model
    assert rows["dense", 200]["kv_bytes"] == 2 * 2 * 200 * shape.layers * shape.kv_heads * shape.head_dim * 4
    assert "tokens/s" in result.out
    assert found["command"].startswith("sparsec bench")


def test_a_shape_is_timed_with_random_weights(cli: Any, tiny_deep: Path) -> None:
    line = ["bench", "--shape", tiny_deep, "--contexts", "300", "--tokens", "1", "--window", "64", "--rate", "0.25"]
    found = json.loads(cli(*line, "--dtype", "float32", "--json").out)
    assert [row["system"] for row in found["rows"]] == ["dense", "artifact"]
    assert all(row["kv_bytes"] > 0 and row["step_s"] > 0 for row in found["rows"])
    assert (found["random weights"], found["rate"]) == (True, 0.25)
    grouped = ["--granularity", "kv_head", "--prefill", "selector", "--vote-every", "4", "--dtype", "float32"]
    alone = json.loads(cli(*line, *grouped, "--no-dense", "--json").out)
    assert (alone["granularity"], alone["vote_every"]) == ("kv_head", 4)
    assert alone["rows"][0]["kv_bytes"] > found["rows"][1]["kv_bytes"]  # both heads of a KV head have index keys
    less = ["--index-dtype", "fp8", "--coarse-from", "100"]
    smaller = json.loads(cli(*line, *grouped, *less, "--no-dense", "--json").out)
    assert (smaller["index_dtype"], smaller["coarse_from"]) == ("fp8", 100)
    assert smaller["rows"][0]["kv_bytes"] < alone["rows"][0]["kv_bytes"]
    assert [row["system"] for row in alone["rows"]] == ["artifact"]
    assert alone["break_even"] is None


@pytest.mark.parametrize("line", [["bench"], ["bench", "out", "--shape", "config.json"]])
def test_an_artifact_or_a_shape_is_timed(line: list[str], cli: Any) -> None:
    result = cli(*line)
    assert result.status == 2
    assert "--shape" in result.err


def test_what_is_no_shape_is_refused(cli: Any, tmp_path: Path) -> None:
    result = cli("bench", "--shape", tmp_path / "nothing")
    assert result.status == 1
    assert "config.json" in result.err


# generate


def test_an_answer_is_printed_as_it_comes_and_nothing_else(cli: Any, tiny_artifact: Path) -> None:
    line = ["generate", tiny_artifact, "--max-new-tokens", "8"]
    streamed, whole = cli(*line, "hello"), cli(*line, "hello", "--json")
    assert (streamed.status, streamed.err, whole.status, whole.err) == (0, "", 0, "")
    found = json.loads(whole.out)
    assert streamed.out == found["text"] + "\n"
    assert found["new_tokens"] == 8
    assert found["dense"] is False
    piped = cli(*line, "--json", stdin="hello")
    assert json.loads(piped.out)["text"] == found["text"]


def test_the_template_can_be_left_out(cli: Any, tiny_artifact: Path) -> None:
    line = ["generate", tiny_artifact, "hello", "--json", "--max-new-tokens", "1"]
    plain = json.loads(cli(*line, "--raw").out)
    assert plain["prompt_tokens"] == len("hello")
    assert json.loads(cli(*line).out)["prompt_tokens"] > len("hello")


def test_dense_and_sparse_side_by_side(cli: Any, tiny_artifact: Path) -> None:
    line = ["generate", tiny_artifact, "hello " * 50, "--json", "--raw", "--max-new-tokens", "4"]
    sparse, dense = (json.loads(cli(*line, *more).out) for more in ([], ["--dense"]))
    assert (sparse["dense"], dense["dense"]) == (False, True)
    assert sparse["prompt_tokens"] == dense["prompt_tokens"] == 300
    assert 0 < sparse["kv_bytes"] < dense["kv_bytes"]


# eval


def test_an_artifact_is_measured_beside_its_baselines(cli: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    line = ["eval", tiny_artifact, "--lengths", "384,448", "--prompts", "2", "--windows", "1", "--rows", "64"]
    line += ["-o", tmp_path / "eval.json"]
    result = cli(*line, "--json")
    assert result.status == 0
    assert readable(result.err), result.err
    data = json.loads(result.out)
    assert data == json.loads((tmp_path / "eval.json").read_text())
    assert [(cell["length"], cell["system"]) for cell in data["cells"]] == [
        (length, system) for length in (384, 448) for system in ("dense", "window", "split", "artifact")
    ]
    for cell in data["cells"]:
        assert set(cell["tasks"]) == {"kv", "multikey", "passkey"}
        assert all(task["n"] == 2 for task in cell["tasks"].values())
        assert cell["bits_per_byte"] > 0
        assert bool(cell["selector"]) == (cell["system"] == "artifact")
    assert data["artifacts"]["artifact"]["plan"] == read_plan(tiny_artifact).digest
    sizes = {cell["system"]: cell["kv_bytes"] for cell in data["cells"] if cell["length"] == 448}
    assert sizes["window"] < sizes["split"] <= sizes["artifact"] < sizes["dense"]


def test_a_table_is_printed_and_systems_tasks_and_text_can_be_chosen(
    cli: Any, tiny_artifact: Path, tmp_path: Path
) -> None:
    line = [
        "eval",
        tiny_artifact,
        "--lengths",
        "256",
        "--prompts",
        "1",
        "--windows",
        "1",
        "--systems",
        "dense,artifact",
    ]
    (tmp_path / "text").mkdir()
    for number in range(3):
        words = " ".join(f"{word}{number} of a natural text" for word in "abcdefghijklmnopqrstuvwxyz" * 4)
        (tmp_path / "text" / f"{number}.txt").write_text(words)
    result = cli(*line, "--tasks", "", "--text", tmp_path / "text")
    assert result.status == 0, result.err
    rows = re.findall(r"^ +256  (dense|window|head split|the artifact)", result.out, re.MULTILINE)
    assert rows == 2 * ["dense", "the artifact"]  # the overview, and bits per byte by position
    assert str(tmp_path / "text") in result.out


def test_answers_on_the_kernels_are_the_references(cli: Any, tiny_artifact: Path) -> None:
    line = ["eval", tiny_artifact, "--lengths", "256", "--prompts", "2", "--windows", "0", "--tasks", "kv", "--json"]
    line += ["--systems", "split,artifact"]
    found = [json.loads(cli(*line, "--kernels", kernels).out) for kernels in ("reference", "triton")]
    assert found[0]["cells"] == found[1]["cells"]
    assert [each["kernels"] for each in found] == ["reference", "triton"]


def test_an_evaluation_repeats(cli: Any, tiny_artifact: Path) -> None:
    line = ["eval", tiny_artifact, "--lengths", "256", "--prompts", "1", "--windows", "2", "--tasks", "kv", "--json"]
    assert cli(*line).out == cli(*line).out
