"""Bad input: one line that says what to do, and the exit status that says whose fault it is."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents, names, write_texts
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from sparsec.layout import CONFIG, MANIFEST, PLAN_KEY, TENSORS, sha256

# Wrong calls: exit 2, before anything is opened

WRONG_CALLS = {
    "no source": ([], "no source: name a Hub id, a folder, a .gguf file or demo"),
    "an unknown option": (["model", "--pases", "x"], "No such option '--pases'"),
    "no passes": (["model", "-o", "out"], "no passes: give --passes"),
    "no output": (["model", "--passes", "rtpurbo"], "no output folder: give -o DIR"),
    "an unknown pass": (["model", "-o", "out", "--passes", "rtpurb"], "no pass 'rtpurb': did you mean 'rtpurbo'?"),
    "a pass like no other": (
        ["model", "-o", "out", "--passes", "qqq"],
        "no pass 'qqq': known: distill, dynamic-tokenization, hisa",
    ),
    "an option of another pass": (
        ["model", "-o", "out", "--passes", "rtpurbo", "--set", "indexcache.keep=1"],
        "'indexcache' is not among the passes; add it to --passes",
    ),
    "--keep without indexcache": (
        ["model", "-o", "out", "--passes", "rtpurbo", "--keep", "1"],
        "'indexcache' is not among the passes",
    ),
    "a negative seed": (["model", "-o", "out", "--passes", "rtpurbo", "--seed", "-1"], "Invalid value for '--seed'"),
    "a huge seed": (["model", "-o", "out", "--passes", "rtpurbo", "--seed", "1" + "0" * 30], "recipe: seed: "),
    "a missing recipe": (["model", "-o", "out", "--recipe", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
    "a folder as recipe": (["model", "-o", "out", "--recipe", "/"], "cannot read the recipe /"),
    "a revision of a folder": (["/", "-o", "out", "--passes", "rtpurbo", "--revision", "x"], "leave it out"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_call_is_exit_2_and_a_line(cli: Any, case: str) -> None:
    arguments, words = WRONG_CALLS[case]
    result = cli("compile", *arguments)
    assert words in result.line
    assert result.status == 2


def test_a_pass_without_what_it_needs_is_exit_2_and_a_line(cli: Any, tiny_deep: Path) -> None:
    for more in ([], ["--dry-run"]):
        result = cli("compile", tiny_deep, "-o", "out", "--passes", "indexcache", *more)
        assert "indexcache needs indexers: add one of rtpurbo to --passes" in result.line
        assert result.status == 2


WRONG_SETTINGS = {
    "rtpurbo.ratios=0.2": "rtpurbo has no option 'ratios': did you mean 'ratio'?",
    "rtpurbo.colour=red": "rtpurbo has no option 'colour': known: ratio, ",
    "gate.maxloss=1": "gate has no option 'maxloss': did you mean 'max_loss'?",
    "rtpurbo.ratio=much": "rtpurbo.ratio: Input should be a valid number",
    "rtpurbo.ratio=2": "rtpurbo.ratio: Input should be less than 1",
    "rtpurbo.ratio=": "rtpurbo.ratio: Input should be a valid number",
    "rtpurbo.rope=pre-": "rtpurbo.rope: Input should be 'pre' or 'post'",
    "indexcache.keep=a%": "indexcache.keep: ",
    "indexcache.keep=0%": "indexcache.keep: Input should be greater than 0",
    "gate.rows=1": "recipe: gate.rows: Input should be greater than or equal to 16",
    "rtpurbo.ratio": "write pass.option=value",
    "ratio=0.2": "write pass.option=value",
    "=": "write pass.option=value",
    "rtpurbo.ratio=[": "the value is not YAML",
}


@pytest.mark.parametrize("setting", WRONG_SETTINGS)
def test_a_wrong_setting_is_exit_2_and_names_the_option(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path, setting: str
) -> None:
    result = cli(*compile_line(tmp_path / "out", "--set", setting))
    assert WRONG_SETTINGS[setting] in result.line
    assert result.status == 2
    assert names(tmp_path) == []


WRONG_RECIPES = {
    "an unknown key": ("passes: {rtpurbo: {}}\nsede: 1\n", "has an unknown key 'sede': did you mean 'seed'?"),
    "an unknown pass": ("passes: {rtpurb: {}}\n", "did you mean 'rtpurbo'?"),
    "an unknown option": ("passes: {rtpurbo: {ratios: 1}}\n", "did you mean 'ratio'?"),
    "an unknown option of the gate": ("passes: {rtpurbo: }\ngate: {max_los: 1}\n", "did you mean 'max_loss'?"),
    "a list of passes": ("passes: [rtpurbo, indexcache]\n", "must map a name to options"),
    "one pass": ("passes: rtpurbo\n", "must map a name to options"),
    "an option without a name": ("passes: {rtpurbo: 0.15}\n", "must map a name to options"),
    "a gate that is a number": ("passes: {rtpurbo: }\ngate: 5\n", "must map options to values"),
    "a seed that is none": ("passes: {rtpurbo: }\nseed: many\n", "recipe: seed: Input should be a valid integer"),
    "a list": ("- rtpurbo\n", "must be a mapping with the key 'passes'"),
    "nothing": ("", "must be a mapping with the key 'passes'"),
    "no passes": ("seed: 1\n", "no passes: give --passes"),
    "no YAML": ("passes: {rtpurbo: {ratio: 0.2\n", "is not YAML"),
    "no text": (b"\xff\xfe\x00passes", "is not YAML"),
}


@pytest.mark.parametrize("case", WRONG_RECIPES)
@pytest.mark.parametrize("more", [[], ["--set", "rtpurbo.ratio=0.2", "--set", "gate.rows=32"]], ids=["alone", "set"])
def test_a_wrong_recipe_is_exit_2_and_names_the_place(cli: Any, tmp_path: Path, case: str, more: list[str]) -> None:
    text, words = WRONG_RECIPES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = cli("compile", "model", "--recipe", recipe, "-o", tmp_path / "out", *more)
    if not (more and case in ("no passes", "an unknown pass")):  # there --set names a pass that is not asked for
        assert words in result.line
    assert result.line
    assert result.status == 2
    assert names(tmp_path) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--device", "gpu"], "unknown device 'gpu': use cpu, cuda, cuda:<number> or auto"),
        (["--device", "cuda:99"], "device cuda:99 "),
        (["--dtype", "int8"], "unknown dtype 'int8': use float32, bfloat16, float16 or auto"),
    ],
)
@pytest.mark.parametrize("command", ["compile", "generate", "eval"])
def test_a_device_or_dtype_that_cannot_be_is_exit_2(
    cli: Any,
    compile_line: Callable[..., list[str]],
    tiny_artifact: Path,
    tmp_path: Path,
    command: str,
    more: list[str],
    words: str,
) -> None:
    arguments = {
        "compile": compile_line(tmp_path / "out"),
        "generate": ["generate", tiny_artifact, "hello"],
        "eval": ["eval", tiny_artifact],
    }
    result = cli(*arguments[command], *more)
    assert words in result.line
    assert result.status == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "ARTIFACT", " "], "the prompt is empty"),
        (["generate", "ARTIFACT", "x", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["eval", "ARTIFACT", "--lengths", "1k"], "--lengths '1k': write token counts"),
        (["eval", "ARTIFACT", "--lengths", ""], "--lengths needs token counts"),
        (["eval", "ARTIFACT", "--lengths", "8"], "--lengths needs token counts of 16 or more"),
        (["eval", "ARTIFACT", "--systems", "dense,splt"], "did you mean 'split'?"),
        (["eval", "ARTIFACT", "--tasks", "kv,passkeys"], "did you mean 'passkey'?"),
        (["eval", "ARTIFACT", "-o", "nowhere/eval.json"], "there is no folder"),
        (["passes", "indexcach"], "did you mean 'indexcache'?"),
        (["inspet", "ARTIFACT"], "No such command 'inspet'"),
    ],
)
def test_other_commands_called_wrongly_are_exit_2(
    cli: Any, tiny_artifact: Path, arguments: list[str], words: str
) -> None:
    result = cli(*(str(tiny_artifact) if part == "ARTIFACT" else part for part in arguments))
    assert words in result.line
    assert result.status == 2


def test_a_prompt_that_is_no_text_is_exit_2(cli: Any, tiny_artifact: Path) -> None:
    result = cli("generate", tiny_artifact, stdin=b"\xff\xfe\xfd")
    assert "standard input is not text" in result.line
    assert result.status == 2


# Sources that are none


@pytest.fixture
def folder(tiny_deep: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be spoilt."""
    return shutil.copytree(tiny_deep, tmp_path / "model")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lacking(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"]["beyond"] = 300
    file.write_text(json.dumps(data))


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(data | changes))

    return edit


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (without_weights, "has no weights"),
    "pickled weights": (pickled, "holds only pickled weights"),
    "truncated weights": (truncated, "model.safetensors is damaged"),
    "weights that are no numbers": (not_a_number, "model.layers.2.mlp.up_proj.weight in "),
    "a missing tensor": (lacking, "lacks model.layers.2.mlp.up_proj.weight"),
    "a tokenizer that does not match": (other_tokenizer, "has token ids up to 300, the embedding has 272 rows"),
    "no tokenizer": (without_tokenizer, "has no tokenizer"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no config.json"),
    "quantised weights": (edited(quantization_config={"quant_method": "awq"}), "is quantised (awq)"),
    "a plan": (edited(**{PLAN_KEY: {}}), "already has a plan: compile the dense checkpoint it came from"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_source_that_is_no_dense_checkpoint_is_exit_1(
    cli: Any, compile_line: Callable[..., list[str]], folder: Path, tmp_path: Path, case: str
) -> None:
    spoil, words = SPOILT[case]
    spoil(folder)
    line = compile_line(tmp_path / "out")
    line[1] = str(folder)
    result = cli(*line)
    assert words in result.line
    assert result.status == 1
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_unsupported_family_is_refused_by_name_before_its_weights_are_read(
    cli: Any,
    compile_line: Callable[..., list[str]],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    more: list[str],
) -> None:
    source = make_checkpoint(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256))
    line = compile_line(tmp_path / "out", *more)
    line[1] = str(source)
    result = cli(*line)
    assert "model family 'gpt2' is not supported; supported: llama, " in result.line
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("source", ["nowhere/at/all", "no-such-folder", "model.gguf"])
def test_a_source_that_is_not_there_is_exit_1(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path, source: str
) -> None:
    line = compile_line(tmp_path / "out")
    line[1] = source
    result = cli(*line)
    assert "check the spelling" in result.line
    assert result.status == 1


# Calibration text that is none

PARAGRAPH = "The quick brown fox jumps over the lazy dog while eleven patient engineers watch from the bridge. "


def distinct(words: int, number: int) -> str:
    rng = random.Random(number)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choices(letters, k=6)) for _ in range(words))


TEXTS: dict[str, tuple[list[str | bytes], str]] = {
    "an empty file": ([""], "has no text in it"),
    "no file": ([], "has no .txt, .md"),
    "too little text": ([PARAGRAPH], "too little text for three splits"),
    "text shorter than the context": (
        [distinct(50, n) for n in range(6)],
        "the train text has 0 of the 1 windows of 512 tokens",
    ),
    "another encoding": (["Grüße aus Köln. ".encode("latin-1") * 100], "is not UTF-8 text at byte 2: convert it"),
    "UTF-16": (["plain words ".encode("utf-16") * 100], "iconv -f UTF-16 -t UTF-8"),
    "a binary": ([b"\x7fELF\0\0\0\1" * 100], "is not UTF-8 text at byte 4"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_cannot_calibrate_is_exit_1(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path, case: str
) -> None:
    texts, words = TEXTS[case]
    place = write_texts(tmp_path / "text", *texts)
    result = cli(*compile_line(tmp_path / "out", "--calibration", str(place)), cache=tmp_path / "cache")
    assert words in result.line
    assert result.status == 1
    assert names(tmp_path) == ["cache", "text"]


def test_a_calibration_file_that_is_not_there_is_exit_1(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    result = cli(*compile_line(tmp_path / "out", "--calibration", "nowhere.txt"))
    assert "no file or folder 'nowhere.txt'" in result.line
    assert result.status == 1


# Output names that are taken


def test_a_folder_that_is_not_ours_is_refused_and_with_force_kept(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    (out / "work" / "thesis.txt").write_text("years")
    for more in ([], ["--dry-run"]):
        result = cli(*compile_line(out, *more))
        assert "exists and is no artifact of ours: choose another name, or --force moves it aside" in result.line
        assert result.status == 1
        assert names(out) == ["work"]
    assert cli(*compile_line(out, "--force")).status == 0
    assert contents(out) == contents(tiny_artifact)
    assert (tmp_path / "out.before-sparsec" / "work" / "thesis.txt").read_text() == "years"

    shutil.rmtree(out)
    write_texts(out, "more")
    assert cli(*compile_line(out, "--force")).status == 0
    assert names(tmp_path) == ["out", "out.before-sparsec", "out.before-sparsec-2"]
    assert names(tmp_path / "out.before-sparsec-2") == ["0.txt"]


def test_a_file_is_never_replaced(cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    for out in (file, file / "below"):
        for more in ([], ["--force"]):
            result = cli(*compile_line(out, *more))
            assert "choose another output folder" in result.line
            assert result.status == 1
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    tmp_path.chmod(0o555)
    result = cli(*compile_line(tmp_path / "out"))
    assert f"nothing can be written in {tmp_path}" in result.line
    assert result.status == 1


def test_a_gate_that_fails_is_exit_3_and_keeps_the_artifact_under_another_name(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    out, rejected = tmp_path / "out", tmp_path / "out.rejected"
    write_texts(rejected, "a folder of the user")
    strict = compile_line(out, "--set", "gate.min_recall=1", "--set", "gate.max_loss=0")
    for _ in range(2):
        result = cli(*strict)
        assert "the gate failed: " in result.line
        assert "of the attention mass, 100.0% is the least" in result.line
        assert f"the artifact is kept as {rejected}" in result.line
        assert result.status == 3
        assert names(tmp_path) == ["out.rejected", "out.rejected.before-sparsec"]
        assert names(tmp_path / "out.rejected.before-sparsec") == ["0.txt"]
    assert "gate      FAILED: " in cli("inspect", rejected).out
    files = contents(rejected)
    files.pop(MANIFEST)
    assert json.loads((rejected / MANIFEST).read_text())["files"] == files

    assert cli(*compile_line(out)).status == 0
    before = contents(out)
    assert cli(*strict).status == 3
    assert contents(out) == before


# Artifacts that are none


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to be spoilt."""
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


def with_plan(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config[PLAN_KEY] |= changes
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def flipped(folder: Path) -> None:
    """One bit of one value: still finite, still of the right shape."""
    data = bytearray((folder / TENSORS).read_bytes())
    data[-3] ^= 1
    (folder / TENSORS).write_bytes(data)


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Tensors changed by someone who knew about the manifest."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)
        made = json.loads((folder / MANIFEST).read_text())
        made["files"][TENSORS] = sha256(folder / TENSORS)
        (folder / MANIFEST).write_text(json.dumps(made))

    return write


def plain(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config[PLAN_KEY]
    (folder / CONFIG).write_text(json.dumps(config))


EVERYWHERE = ("inspect", "generate", "eval")
RUNNING = ("generate", "eval")
DAMAGED: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "nothing": (shutil.rmtree, "is no folder: name an artifact", EVERYWHERE),
    "an empty folder": (
        lambda folder: [file.unlink() for file in folder.iterdir()],
        "config.json is missing",
        EVERYWHERE,
    ),
    "a plain model": (plain, "holds a plain model without a plan: compile it first", EVERYWHERE),
    "a config that is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "cannot read", EVERYWHERE),
    "a plan that cannot be": (with_plan(window=None), "has local heads, but the plan has no window", EVERYWHERE),
    "a plan of the future": (with_plan(format=99), "format 99, this sparsec reads 1: update sparsec", EVERYWHERE),
    "a plan of another model": (
        edited(num_key_value_heads=4),
        "artifact",
        RUNNING,
    ),
    "no indexers": (
        lambda folder: (folder / TENSORS).unlink(),
        f"has a plan with indexers, but no {TENSORS}: copy the whole artifact",
        EVERYWHERE,
    ),
    "indexers with a wrong bit": (flipped, f"{TENSORS} is not what {MANIFEST} says", EVERYWHERE),
    "indexers that are cut off": (
        lambda folder: os.truncate(folder / TENSORS, 300),
        f"{TENSORS} is not what {MANIFEST} says",
        EVERYWHERE,
    ),
    "indexers that are no numbers": (
        rewritten(lambda tensors: next(iter(tensors.values())).fill_(float("inf"))),
        "holds values that are not finite",
        RUNNING,
    ),
    "indexers of another shape": (
        rewritten(lambda tensors: tensors.update({name: t[:, :2].clone() for name, t in tensors.items()})),
        "2, 8), the plan needs (",
        RUNNING,
    ),
    "an indexer too few": (rewritten(lambda tensors: tensors.popitem()), "which is missing", RUNNING),
    "no weights": (without_weights, "cannot be loaded (", RUNNING),
    "truncated weights": (truncated, "cannot be loaded (", RUNNING),
    "a missing weight": (lacking, "lacks the weights model.layers.2.mlp.up_proj.weight", RUNNING),
    "no tokenizer": (without_tokenizer, "cannot be loaded (", ("generate",)),
    "no tokenizer to judge with": (without_tokenizer, "cannot read the tokenizer in", ("eval",)),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "no manifest.json of sparsec", ("inspect", "eval")),
    "no measurements": (
        lambda folder: (folder / "measurements.json").unlink(),
        "measurements.json is missing",
        ("inspect", "eval"),
    ),
}


@pytest.mark.parametrize(("case", "command"), [(case, command) for case in DAMAGED for command in DAMAGED[case][2]])
def test_a_damaged_artifact_is_exit_1(cli: Any, artifact: Path, case: str, command: str) -> None:
    spoil, words, _ = DAMAGED[case]
    spoil(artifact)
    more = {"inspect": [], "generate": ["hello"], "eval": ["--lengths", "256", "--prompts", "0", "--windows", "1"]}
    result = cli(command, artifact, *more[command])
    assert words in result.line
    assert str(artifact) in result.line or case in ("indexers of another shape", "an indexer too few")
    assert result.status == 1
