"""The release gate: what is damaged or changed is caught, what is not is passed, and everything says so."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsec.errors import ArtifactError, UsageError
from sparsec.export.artifact import write_json, write_manifest
from sparsec.export.integrity import check
from sparsec.export.verdicts import FAIL, NOT_RUN, PASS, junit, markdown
from sparsec.layout import CONFIG, GOLDEN, MANIFEST, PLAN_KEY, TENSORS, read_json, read_plan


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


def rehash(folder: Path) -> None:
    """As someone does who knows about the manifest."""
    made = read_json(folder / MANIFEST)
    (folder / MANIFEST).unlink()
    write_manifest(folder, {key: value for key, value in made.items() if key not in ("files", "digest")})


def bad(folder: Path) -> list[str]:
    return [finding.said for finding in check(folder) if not finding.good]


def verified(cli: Any, folder: Path, *more: str, status: int) -> dict[str, Any]:
    done = cli("verify", folder, "--quick", "--json", *more)
    assert done.status == status, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def failed(found: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["said"] for each in found["checks"] if each["status"] == FAIL}


# What is as it was


def test_an_artifact_as_compiled_passes(cli: Any, tiny_artifact: Path) -> None:
    found = verified(cli, tiny_artifact, status=0)
    assert found["passed"]
    by = {(each["name"], each["engine"]): each for each in found["checks"]}
    assert [by[name, ""]["status"] for name in ("manifest", "files", "plan", "tensors")] == [PASS] * 4
    assert by["outputs of heads", "pytorch"]["figures"]["value"] == pytest.approx(0, abs=1e-5)
    assert by["chosen keys", "pytorch"]["figures"]["value"] == 1
    for engine in ("triton", "onnx", "tensorrt", "vllm"):
        assert by["next tokens", engine]["status"] == NOT_RUN
        assert by["next tokens", engine]["said"]


def test_everything_is_measured_without_quick(cli: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text("quality: {lengths: [192, 256], windows: 2, rows: 32, tasks: [kv], prompts: 2, max_points: 1}\n")
    done = cli("verify", tiny_artifact, "--gate", gate, "--against", tiny_artifact, "--json")
    assert "named twice" in done.err
    assert done.status == 3
    other = shutil.copytree(tiny_artifact, tmp_path / "other")
    files = tmp_path / "junit.xml", tmp_path / "verify.md"
    line = ("--gate", gate, "--against", other, "--junit", files[0], "--markdown", files[1])
    done = cli("verify", tiny_artifact, *line)
    assert done.status == 0, done.out + done.err
    for words in ("as recorded: bits_per_byte", "bits_per_byte at 256 tokens, against dense", "kv at 192 tokens",
                  f"against {other}", "after rtpurbo", "times as fast as dense"):  # fmt: skip
        assert words in done.out
    cases = ElementTree.parse(files[0]).getroot()
    assert int(cases.attrib["failures"]) == 0
    assert len(cases.findall(".//testcase")) == int(cases.attrib["tests"])
    assert "### sparsec verify: passed" in files[1].read_text()


# What is damaged


def test_any_flipped_byte_is_caught(artifact: Path) -> None:
    rng = random.Random(0)
    files = sorted(file for file in artifact.rglob("*") if file.is_file())
    sizes = [file.stat().st_size for file in files]
    picked = [*rng.choices(files, weights=sizes, k=60), *rng.choices(files, k=140)]
    assert bad(artifact) == []
    for file in picked:
        data = bytearray(file.read_bytes())
        place = rng.randrange(len(data))
        data[place] ^= rng.randrange(1, 256)
        whole = file.read_bytes()
        file.write_bytes(data)
        assert bad(artifact), f"{file.name} at {place}"
        file.write_bytes(whole)
    assert bad(artifact) == []


def linked(folder: Path) -> None:
    place = folder / "tokenizer.json"
    place.rename(folder.parent / "elsewhere.json")
    place.symlink_to(folder.parent / "elsewhere.json")


def linked_folder(folder: Path) -> None:
    (folder / "extra").symlink_to(folder.parent)


def named(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from sparsec.export.manifest import sealed

        made = read_json(folder / MANIFEST)
        made["files"][name] = "0" * 64
        write_json(folder / MANIFEST, sealed(made))

    return change


def bomb(length: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / TENSORS).write_bytes(length.to_bytes(8, "little") + b"{}")
        rehash(folder)

    return change


def replanned(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = read_json(folder / CONFIG)
        config[PLAN_KEY] |= changes
        write_json(folder / CONFIG, config)
        rehash(folder)

    return change


def deep(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 200_000)
    rehash(folder)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a name above": (named("../outside"), "leaves the artifact"),
    "a name within a name": (named("a/../../outside"), "leaves the artifact"),
    "an absolute name": (named("/etc/passwd"), "no name relative to the artifact"),
    "a drive": (named("C:/windows"), "no name relative to the artifact"),
    "a backslash": (named("..\\outside"), "has signs that no file name of ours has"),
    "a null": (named("a\0b"), "has signs that no file name of ours has"),
    "no name": (named(""), "is empty or too long"),
    "the manifest": (named(MANIFEST), "is the manifest itself"),
    "a link": (linked, "is a link, an artifact has none"),
    "a linked folder": (linked_folder, "is a link, an artifact has none"),
    "a file that is not named": (lambda folder: (folder / "more.txt").touch(), "is not in manifest.json"),
    "a pickle": (lambda f: ((f / "weights.bin").write_bytes(b"\x80"), rehash(f)), "can hold code"),
    "code": (lambda f: ((f / "modeling.py").write_text("0"), rehash(f)), "can hold code"),
    "a missing file": (lambda folder: (folder / "tokenizer.json").unlink(), "is missing: copy the whole artifact"),
    "a header of exabytes": (bomb(2**62), "its header claims"),
    "a header behind the end": (bomb(3), "its header claims"),
    "another model's plan": (replanned(model={"model_type": "llama", "layers": 4, "heads": 4, "kv_heads": 4,
                                              "head_dim": 8}), "num_key_value_heads 2, its plan is for 4"),
    "brackets without end": (deep, "cannot read"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_hostile_or_damaged_is_named(artifact: Path, case: str) -> None:
    spoil, words = HOSTILE[case]
    spoil(artifact)
    assert any(words in said for said in bad(artifact)), bad(artifact)
    assert not any("\n" in said for said in bad(artifact))


def test_a_damaged_artifact_is_not_run_and_is_exit_3(cli: Any, artifact: Path) -> None:
    data = bytearray((artifact / TENSORS).read_bytes())
    data[-3] ^= 1
    (artifact / TENSORS).write_bytes(data)
    found = verified(cli, artifact, status=3)
    assert list(failed(found)) == ["files"]
    assert [each["status"] for each in found["checks"] if each["group"] == "golden"] == [NOT_RUN]
    assert "is not what manifest.json says" in failed(found)["files"]
    assert "FAIL" in markdown(found) or "❌" in markdown(found)
    assert ElementTree.fromstring(junit(found).partition("\n")[2]).attrib["failures"] == "1"
    assert cli("verify", artifact / "nowhere").status == 1


# What was changed by someone who knew about the hashes


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS, metadata={"format": "pt"}
    )


def change_plan(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    config = read_json(folder / CONFIG)
    change(config[PLAN_KEY]["layers"])
    write_json(folder / CONFIG, config)


def rows_permuted(folder: Path) -> None:
    name = next(iter(load_file(folder / TENSORS)))
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].roll(1, 1)}))


def class_flipped(folder: Path, layer: int, head: int) -> None:
    """One head's; where the layer has an indexer for it, its rows go or come with it."""
    plan = read_plan(folder)
    kind = plan.layers[layer].heads[head]  # type: ignore[index]
    place = sum(plan.layers[layer].heads[:head])  # type: ignore[index]
    change_plan(folder, lambda layers: layers[layer]["heads"].__setitem__(head, 1 - kind))

    def fit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if f"layers.{layer}." in name]:
            t = tensors[name]
            parts = [t[:place], t[place + 1 :]] if kind else [t[:place], t.mean(0, keepdim=True), t[place:]]
            tensors[name] = torch.cat(parts)

    if plan.layers[layer].index == "full":
        change_tensors(folder, fit)


def no_plan_facts(folder: Path) -> None:
    """Nothing but what the model does may give the change away."""
    golden = read_json(folder / GOLDEN)
    from sparsec.compiler.golden import described

    golden["layers"] = described(read_plan(folder))
    write_json(folder / GOLDEN, golden)


def test_permuted_rows_of_an_indexer_are_caught(cli: Any, artifact: Path) -> None:
    rows_permuted(artifact)
    rehash(artifact)
    assert bad(artifact) == []
    assert "chosen keys" in failed(verified(cli, artifact, status=3))


def flips(folder: Path) -> list[tuple[int, int]]:
    """Every head whose class can be flipped such that the layer still has one for its index."""
    plan = read_plan(folder)
    return [
        (i, head)
        for i, layer in enumerate(plan.layers)
        for head, kind in enumerate(layer.heads or ())
        if not (kind and layer.index != "none" and len(layer.retrieval) == 1)
    ]


def test_a_flipped_head_is_caught_by_what_it_does_as_well(cli: Any, artifact: Path, tmp_path: Path) -> None:
    for layer, head in flips(artifact)[::3]:
        changed = shutil.copytree(artifact, tmp_path / f"flip{layer}.{head}")
        class_flipped(changed, layer, head)
        rehash(changed)
        assert bad(changed) == []
        said = failed(verified(cli, changed, status=3))
        assert f"layer {layer} had" in said["plan"]
        no_plan_facts(changed)
        rehash(changed)
        said = failed(verified(cli, changed, status=3))
        assert "plan" not in said
        assert f"layer {layer} head " in said["outputs of heads"]  # its neighbours read the union of what all choose


def test_changed_sharing_is_caught(cli: Any, artifact: Path) -> None:
    plan = read_plan(artifact)
    layer = next(i for i in plan.indexed() if plan.layers[i].index == "shared")
    change_plan(artifact, lambda layers: layers[layer].update(index="full"))
    source = f"model.layers.{plan.index_source(layer)}."
    own, heads = f"model.layers.{layer}.", len(plan.layers[layer].retrieval)

    def copied(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(source)]:
            rows = torch.arange(heads) % len(tensors[name])
            tensors[name.replace(source, own)] = tensors[name][rows]

    change_tensors(artifact, copied)
    rehash(artifact)
    assert bad(artifact) == []
    said = failed(verified(cli, artifact, status=3))
    assert f"layer {layer} had" in said["plan"]
    no_plan_facts(artifact)
    rehash(artifact)
    assert f"layer {layer} is the first" in failed(verified(cli, artifact, status=3))["chosen keys"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda golden: golden.update(format=9), "has format 9, this sparsec reads 2"),
        (lambda golden: golden.update(prompts=[]), "holds no prompts of this model"),
        (lambda golden: golden["prompts"][0].update(tokens=[10**9] * 300), "holds no prompts of this model"),
        (lambda golden: golden["prompts"][0].update(outputs={"shape": [2**40], "data": ""}), "golden.json is damaged"),
        (lambda golden: golden["prompts"][0].update(chosen=3), "golden.json is damaged"),
        (lambda golden: golden.pop("dtype"), "golden.json is damaged"),
    ],
)
def test_a_damaged_record_fails_and_is_no_traceback(
    cli: Any, artifact: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    golden = read_json(artifact / GOLDEN)
    change(golden)
    write_json(artifact / GOLDEN, golden)
    rehash(artifact)
    assert words in failed(verified(cli, artifact, status=3))["prompts"]


# Thresholds


def test_an_engine_that_has_to_run_and_does_not_fails(cli: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("require: [pytorch, onnx]\n")
    found = verified(cli, tiny_artifact, "--gate", str(tmp_path / "gate.yaml"), status=3)
    assert "onnx has to run, and did not: the artifact has no onnx/" in failed(found)["required"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("golden: {overlap: 2}", "golden.overlap: Input should be less than or equal to 1"),
        ("sped: {}", "sped: Extra inputs are not permitted"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("- 1", "valid dictionary"),
    ],
)
def test_a_wrong_gate_is_exit_2_and_a_line(
    cli: Any, tiny_artifact: Path, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    done = cli("verify", tiny_artifact, "--gate", tmp_path / "gate.yaml")
    assert words in done.line
    assert done.status == 2


def test_errors_are_of_ours(tmp_path: Path) -> None:
    from sparsec.compiler.thresholds import read_thresholds

    with pytest.raises(ArtifactError, match="is no folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot read"):
        read_thresholds(tmp_path / "nowhere.yaml")
    os.truncate(tmp_path / "large.yaml", 0) if (tmp_path / "large.yaml").exists() else None
