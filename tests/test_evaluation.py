"""The evaluation: intervals, long decode, positions, several artifacts side by side, weights that a pass trained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsec.calibrate.comparisons import TOGETHER, comparisons, over_lengths
from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.decode import decode_rows, text_loss
from sparsec.calibrate.evaluate import Suite, System, attention_read, baseline_plan, evaluate
from sparsec.calibrate.long_decode import compared, continued, followed, repeated_grams
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.statistics import Paired, change, difference, recovery
from sparsec.compiler.systems import Base, open_artifacts, systems
from sparsec.errors import ArtifactError, SparsecError, UsageError
from sparsec.events import Event
from sparsec.export.evaluation import tables, tasks
from sparsec.layout import MANIFEST, read_plan
from sparsec.plugins.load import load

# Intervals --------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_true_difference_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        # Prompts of very different difficulty, and a system that loses a tenth of what the other one answers.
        hard = rng.random(60)
        against = (rng.random(60) < hard).astype(float)
        system = against * (rng.random(60) < 0.9)
        found = difference([Paired(system, against)], seed=trial)  # type: ignore[arg-type]
        hits += found.low <= -0.05 <= found.high
    assert 0.88 <= hits / 100 <= 0.99


def test_pairing_takes_out_what_prompts_have_in_common() -> None:
    rng = np.random.default_rng(1)
    against = rng.random(50) * 10
    better = against + 0.1 + 0.01 * rng.random(50)
    found = difference([Paired(list(better), list(against))], seed=0)
    assert found.certain
    assert found.value == pytest.approx(0.105, abs=0.002)
    assert found.high - found.low < 0.01
    assert not difference([Paired(list(rng.permutation(better)), list(against))], seed=0).certain


def test_intervals_repeat_with_their_seed_and_groups_weigh_the_same() -> None:
    groups = [Paired([1.0, 0.0, 1.0], [1.0, 1.0, 1.0]), Paired([0.0], [1.0])]
    found = difference(groups, seed=3)
    assert found == difference(groups, seed=3)
    assert found.value == pytest.approx((-1 / 3 - 1) / 2)
    assert found.low <= found.value <= found.high


def test_recovery_is_the_share_of_the_other_systems_score() -> None:
    found = recovery([Paired([1.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 0.0])], seed=0)
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert 0 <= found.low < 0.5 < found.high <= 1
    assert recovery([Paired([1.0], [0.0])], seed=0) is None
    with pytest.raises(ValueError, match="one item"):
        difference([Paired([], [])], seed=0)


def test_the_change_of_bits_per_byte_weighs_windows_by_their_bytes() -> None:
    found = change([1.1, 2.0], [1.0, 2.0], [300, 100], seed=0)
    assert found.value == pytest.approx((330 + 200) / (300 + 200) - 1)
    assert found.low == pytest.approx(0)
    assert found.high == pytest.approx(0.1)


def test_every_two_systems_are_compared_on_what_both_did() -> None:
    def cell(system: str, **more: Any) -> dict[str, Any]:
        return {"length": 64, "system": system, **more}

    def task(*found: float) -> dict[str, Any]:
        return {"found": list(found), "share": sum(found) / len(found)}

    text = {"windows": [1.0, 1.2], "window_bytes": [100, 100]}
    cells = [
        cell("dense", **text, tasks={"kv": task(1, 1), "passkey": task(1, 0), "qa": task(1, 1)}),
        cell("split", **text, tasks={"kv": task(1, 0), "passkey": task(1, 0)}),
        cell("artifact", tasks={"kv": task(1, 1)}),
    ]
    rows = {(row["system"], row["against"], row["measure"]): row for row in comparisons(cells, seed=0)}
    assert set(rows) == {
        *(("split", "dense", measure) for measure in ("bits_per_byte", "kv", "passkey", TOGETHER)),
        ("artifact", "dense", "kv"),
        ("artifact", "split", "kv"),
    }
    assert rows["split", "dense", TOGETHER]["change"] == pytest.approx(-0.25)
    assert rows["split", "dense", TOGETHER]["recovery"]["value"] == pytest.approx(2 / 3)
    assert rows["split", "dense", "bits_per_byte"]["change"] == 0
    assert rows["artifact", "split", "kv"]["change"] == 0.5
    assert "recovery" not in rows["artifact", "split", "kv"]
    assert over_lengths(cells, seed=0) == [], "one length"
    longer = [{**one, "length": 128} for one in cells]
    both = {(row["system"], row["against"]): row for row in over_lengths([*cells, *longer], seed=0)}
    assert set(both) == {("split", "dense")}, "the artifact did other tasks"
    row = both["split", "dense"]
    assert (row["measure"], row["n"], row["share"], row["against_share"]) == (TOGETHER, 8, 0.5, 0.75)
    assert row["change"] == pytest.approx(-0.25)
    assert row["low"] < row["change"] <= row["high"]
    *_, shown = tasks({"cells": [*cells, *longer], "comparisons": [], "over_lengths": list(both.values())}).rows
    assert shown[:3] == ["all", "needles together", "0.75"]
    assert shown[3].startswith("0.50 (−25.0 [")
    assert shown[4] == "–"


# Text and long decode ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tiny_artifact: Path) -> tuple[Any, Any, Calibration]:
    """The tiny artifact's model, running its plan; its tokenizer; text."""
    model, tokenizer = load(tiny_artifact)
    return model, tokenizer, Calibration(read_corpus(), tokenizer)


def test_windows_in_a_batch_give_the_losses_of_windows_alone(opened: tuple[Any, Any, Calibration]) -> None:
    model, tokenizer, calibration = opened
    windows = list(calibration.windows("heldout", 320, 3))
    together, _ = decode_rows(model, torch.stack(windows), 256)
    assert together.shape == (3, 63)
    for window, losses in zip(windows, together, strict=True):
        torch.testing.assert_close(decode_rows(model, window, 256)[0], losses, atol=1e-4, rtol=1e-4)
    one, three = (text_loss(model, tokenizer, windows, 256, batch_size=size) for size in (1, 3))
    assert one.windows == pytest.approx(three.windows, rel=1e-5)
    assert one.kv_bytes == three.kv_bytes


def test_buckets_are_quarters_of_the_decode_rows_and_add_up(opened: tuple[Any, Any, Calibration]) -> None:
    model, tokenizer, calibration = opened
    loss = text_loss(model, tokenizer, list(calibration.windows("heldout", 320, 2)), 255)
    assert [(bucket.first, bucket.last) for bucket in loss.positions] == [
        (256, 271), (272, 287), (288, 303), (304, 319),
    ]  # fmt: skip
    assert sum(bucket.bytes for bucket in loss.positions) == loss.bytes == sum(loss.window_bytes)
    assert sum(bucket.bits for bucket in loss.positions) / loss.bytes == pytest.approx(loss.bits_per_byte)


def test_dense_agrees_with_itself_and_a_plan_is_followed_in_decode_rows(opened: tuple[Any, Any, Calibration]) -> None:
    model, tokenizer, calibration = opened
    prompts = calibration.windows("heldout", 200, 3)
    texts = continued(model, tokenizer, prompts, 40, batch_size=2)
    assert texts.shape == (3, 40)
    steps = followed(model, prompts, texts, batch_size=2)
    assert steps.shape == (3, 39)
    assert bool(steps.all())
    found = compared(texts, texts, steps, 200)
    assert found.prefix == (40, 40, 40)
    assert found.agreement == found.followed == (1.0, 1.0, 1.0)


def test_long_decode_does_not_stop_at_an_end_token(opened: tuple[Any, Any, Calibration]) -> None:
    model, tokenizer, calibration = opened
    prompts = calibration.windows("heldout", 100, 1)
    [text] = continued(model, tokenizer, prompts, 12)
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = int(text[3])
    try:
        assert continued(model, tokenizer, prompts, 12)[0].tolist() == text.tolist()
    finally:
        model.generation_config.eos_token_id = own


def test_agreement_prefix_and_repetition_are_counted_token_by_token() -> None:
    reference = torch.arange(300)[None]
    text = reference.clone()
    text[0, 200:228] = 0
    found = compared(text, reference, torch.ones(1, 299), 64).to_json()
    assert found["prefix"] == 200
    assert found["first"] == 256
    assert found["agreement"] == pytest.approx(228 / 256)
    assert found["distinct"] == pytest.approx(272 / 300)
    assert repeated_grams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_grams([1, 2, 3, 4, 5]) == repeated_grams([1]) == 0


def test_attention_read_counts_what_heads_see_in_decode_rows(tiny_artifact: Path) -> None:
    plan = read_plan(tiny_artifact)
    assert plan.window is not None
    assert attention_read(None, {}, 100, 200) == 1
    window = baseline_plan("window", plan)
    seen = plan.window.size + plan.window.sinks
    assert attention_read(window, {}, 400, 401) == pytest.approx(seen / 401 if plan.min_context < 401 else 1)
    split = baseline_plan("split", plan)
    kept = {"kept_mean": 10.0, "context_mean": 100.0}
    read = [attention_read(*of, 400, 500) for of in ((window, {}), (plan, kept), (split, {}))]
    assert read == sorted(set(read))
    with pytest.raises(UsageError, match="choose from dense, window, split"):
        baseline_plan("artifact", plan)


# Systems ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifact with a base weight that a pass changed."""
    out = tmp_path_factory.mktemp("trained") / "tiny"
    shutil.copytree(tiny_artifact, out)
    weights = load_file(out / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name] = weights[name] * 3
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "weights": "trained"}))
    return out


def bits(result: Any) -> dict[str, float]:
    return {cell["system"]: cell["bits_per_byte"] for cell in result["cells"]}


SUITE = Suite(lengths=[320], prompts_each=0, windows_each=2, rows=64)


def test_an_artifact_alone_is_named_artifact_and_several_by_their_folders(tiny_artifact: Path, trained: Path) -> None:
    assert [each.name for each in open_artifacts([tiny_artifact])] == ["artifact"]
    names = [each.name for each in open_artifacts([tiny_artifact, trained])]
    assert names == ["/".join(path.parts[-2:]) for path in (tiny_artifact, trained)]
    with pytest.raises(UsageError, match="twice"):
        open_artifacts([tiny_artifact, tiny_artifact])


def test_artifacts_of_different_models_are_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_artifact, other)
    manifest = json.loads((other / MANIFEST).read_text())
    manifest["source"]["digest"] = "0" * 64
    (other / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="different models: evaluate each on its own"):
        open_artifacts([tiny_artifact, other])


def test_trained_weights_are_measured_beside_the_dense_model_of_the_source(
    tiny_artifact: Path, tiny_deep: Path, trained: Path, cache_dir: Path
) -> None:
    artifacts = open_artifacts([tiny_artifact, trained])
    plain, own = (each.name for each in artifacts)
    base = Base(artifacts, spec=None, device="cpu", dtype="auto", cache_dir=cache_dir)
    calibration = Calibration(read_corpus(), artifacts[0].tokenizer())
    rows = systems(["dense", "split", "artifact"], artifacts, base, rounding=False)
    found = bits(evaluate(rows, calibration, SUITE))
    assert list(found) == ["dense", "split", plain, own]

    windows = list(calibration.windows("heldout", 320, 2))
    dense = AutoModelForCausalLM.from_pretrained(tiny_deep)
    for model, name in ((dense, "dense"), (load(tiny_artifact).model, plain), (load(trained).model, own)):
        expected = text_loss(model, calibration.tokenizer, windows, 256, batch_size=4).bits_per_byte
        assert found[name] == pytest.approx(expected, rel=1e-6), name
    assert found[own] != pytest.approx(found[plain], rel=1e-4)
    # Alone it has the same dense model beside it, not its own weights.
    alone = open_artifacts([trained])
    base = Base(alone, spec=None, device="cpu", dtype="auto", cache_dir=cache_dir)
    again = bits(evaluate(systems(["dense", "artifact"], alone, base, rounding=False), calibration, SUITE))
    assert again == {"dense": pytest.approx(found["dense"]), "artifact": pytest.approx(found[own])}


def test_a_source_that_is_gone_or_another_one_says_to_name_it(
    trained: Path, tiny_llama: Path, tiny_deep: Path, tmp_path: Path, cache_dir: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    manifest = json.loads((moved / MANIFEST).read_text())
    manifest["source"]["spec"] = str(tmp_path / "gone")
    (moved / MANIFEST).write_text(json.dumps(manifest))
    artifacts = open_artifacts([moved])
    options: dict[str, Any] = {"device": "cpu", "dtype": "auto", "cache_dir": cache_dir}
    with pytest.raises(ArtifactError, match=r"cannot be opened .*: say with --base where it is"):
        Base(artifacts, spec=None, **options)
    with pytest.raises(ArtifactError, match=r"is not the model .*: say with --base where that one is"):
        Base(artifacts, spec=str(tiny_llama), **options)
    model = Base(artifacts, spec=str(tiny_deep), **options).get()
    assert getattr(model, "sparsec_plan", None) is None


def test_a_model_is_let_go_before_the_next_one_is_loaded(trained: Path, cache_dir: Path) -> None:
    artifacts = open_artifacts([trained])
    base = Base(artifacts, spec=None, device="cpu", dtype="auto", cache_dir=cache_dir)
    rows = systems(["dense", "artifact"], artifacts, base, rounding=True)
    assert [row.name for row in rows] == ["dense", "dense bfloat16", "artifact"]
    for row in rows:
        with row.open() as model:
            planned = getattr(model, "sparsec_plan", None) is not None
            assert planned == (row.name == "artifact")
            assert (model.dtype == torch.bfloat16) == (row.name == "dense bfloat16")
            assert (base.model is None) == (row.name != "dense")


def test_systems_run_in_order_and_cells_stand_by_length(opened: tuple[Any, Any, Calibration]) -> None:
    model, _, calibration = opened
    ran = []

    def system(name: str, **more: Any) -> System:
        @contextmanager
        def open_() -> Iterator[Any]:
            ran.append(name)
            yield model

        return System(name, open_, **more)

    rows = [system("dense"), system("dense bfloat16", only_decodes=True), system("artifact")]
    suite = Suite([320, 256], prompts_each=0, windows_each=1, rows=32, contexts=2, decode_tokens=64, decode_prompts=2)
    result = evaluate(rows, calibration, suite)
    assert ran == ["dense", "dense bfloat16", "artifact"]
    assert [(cell["length"], cell["system"]) for cell in result["cells"]] == [
        (length, name) for length in (320, 256) for name in ran
    ]
    for cell in result["cells"]:
        assert ("bits_per_byte" in cell) == (cell["system"] != "dense bfloat16")
        assert cell["decode"]["new_tokens"] == 64
        assert cell["decode"]["prompt_tokens"] == cell["length"] - 64
        assert cell["decode"]["n"] == 2
    assert [part["context"] for part in result["cells"][0]["contexts"]] == [160, 320]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    made = tables({**result, "artifacts": {}})
    assert [table.title for table in made] == ["", "Bits per byte by position", "Long decode"]
    assert all(len(row) == len(table.head) for table in made for row in table.rows)
    with pytest.raises(UsageError, match="put dense first"):
        evaluate(rows[1:], calibration, suite)


def test_parts_that_are_done_are_found_again(opened: tuple[Any, Any, Calibration]) -> None:
    model, _, calibration = opened
    kept: dict[str, Any] = {}
    ran: list[str] = []

    def keep(make: Callable[[], Any], **inputs: Any) -> Any:
        key = json.dumps(inputs, sort_keys=True)
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def system(name: str) -> System:
        @contextmanager
        def open_() -> Iterator[Any]:
            ran.append(name)
            yield model

        return System(name, open_, identity=name)

    def stop(event: Event) -> None:
        if event.stage == "artifact 256: kv":
            raise KeyboardInterrupt

    rows = [system("dense"), system("artifact")]
    suite = Suite([256], ["kv"], prompts_each=2, windows_each=1, rows=32, decode_tokens=64, decode_prompts=1)
    whole = evaluate(rows, calibration, suite)
    with pytest.raises(KeyboardInterrupt):
        evaluate(rows, calibration, suite, keep=keep, listen=stop)
    ran.clear()
    assert evaluate(rows, calibration, suite, keep=keep) == whole
    assert ran == ["artifact"]
    assert evaluate(rows, calibration, suite, keep=keep) == whole
    assert ran == ["artifact"]
    other = Suite([256], ["kv"], prompts_each=2, windows_each=1, rows=64)
    evaluate(rows, calibration, other, keep=keep)
    assert ran == ["artifact", "dense", "artifact"]


def test_the_long_decode_alone_says_where_it_ran(opened: tuple[Any, Any, Calibration]) -> None:
    model, _, calibration = opened
    suite = Suite([256], prompts_each=0, windows_each=0, decode_tokens=64, decode_prompts=1)
    result = evaluate([System("dense", lambda: nullcontext(model))], calibration, suite)
    assert (result["device"], result["dtype"]) == ("cpu", "float32")


def test_a_length_without_room_for_the_long_decode_is_said(opened: tuple[Any, Any, Calibration]) -> None:
    model, _, calibration = opened

    @contextmanager
    def open_() -> Iterator[Any]:
        yield model

    suite = Suite([256], prompts_each=0, windows_each=0, decode_tokens=224)
    result = evaluate([System("dense", open_)], calibration, suite)
    assert "decode" not in result["cells"][0]
    assert any("no long decode at 256 tokens" in note for note in result["notes"])


def test_running_out_of_memory_names_the_batch_size(opened: tuple[Any, Any, Calibration]) -> None:
    @contextmanager
    def open_() -> Iterator[Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    with pytest.raises(SparsecError, match="--batch-size 4: use a smaller one"):
        evaluate([System("dense", open_)], opened[2], SUITE)


def test_a_task_that_dense_fails_is_said_to_mean_little(opened: tuple[Any, Any, Calibration]) -> None:
    model, _, calibration = opened

    @contextmanager
    def open_() -> Iterator[Any]:
        yield model

    suite = Suite([320], tasks=["kv"], prompts_each=2, windows_each=0)
    result = evaluate([System("dense", open_)], calibration, suite)
    assert "at 320 tokens dense answers under 20% of kv (0%)" in " ".join(result["notes"])
    assert result["cells"][0]["tasks"]["kv"]["n"] == 2


# The command ------------------------------------------------------------------------------------------------------


def test_artifacts_stand_side_by_side_in_the_table(
    cli: Any, tiny_artifact: Path, trained: Path, tmp_path: Path
) -> None:
    line = ["eval", tiny_artifact, trained, "--lengths", "320", "--prompts", "0", "--windows", "2", "--rows", "64"]
    result = cli(*line, "--decode-tokens", "128", "--decode-prompts", "2", "-o", tmp_path / "eval.json")
    assert result.status == 0, result.err
    data = json.loads((tmp_path / "eval.json").read_text())
    names = ["/".join(path.parts[-2:]) for path in (tiny_artifact, trained)]
    assert [cell["system"] for cell in data["cells"]] == ["dense", "dense bfloat16", "window", "split", *names]
    assert {name: each["weights"] for name, each in data["artifacts"].items()} == {
        names[0]: "unchanged",
        names[1]: "trained",
    }
    assert re.search(rf"^ +320  {re.escape(names[1])} +\d\.\d{{4}} \([+−]?\d+\.\d\d% \[", result.out, re.MULTILINE)
    assert "Long decode" in result.out


def test_unknown_tasks_and_systems_are_refused_with_a_hint(cli: Any, tiny_artifact: Path) -> None:
    assert "did you mean 'needles'?" in cli("eval", tiny_artifact, "--tasks", "needle").line
    assert "did you mean 'split'?" in cli("eval", tiny_artifact, "--systems", "splits").line
    line = cli("eval", tiny_artifact, "--systems", "split", "--decode-tokens", "1024").line
    assert line.endswith("add dense to --systems")
