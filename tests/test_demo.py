"""The real small model through the whole compile, with short windows: two passes, an artifact, answers.

The bars that need long contexts and many prompts are measured by ``sparsec eval`` (README), not here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.evaluate import Suite
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import prompts, score
from sparsec.compiler.explain import artifact_data, artifact_text
from sparsec.compiler.pipeline import Job, Outcome, compile_model
from sparsec.compiler.recipe import make_recipe
from sparsec.compiler.systems import evaluate_artifacts
from sparsec.layout import is_artifact
from sparsec.plugins.load import load
from sparsec.plugins.runtime import uninstall

RECIPE = {
    "passes": {
        "rtpurbo": {
            "window": 128, "context": 768, "documents": 4, "needles": 3, "needle_words": 16,
            "windows": 2, "rows": 256, "mined": 128, "steps": 120, "reach": 2048,
        },
        "indexcache": {"context": 768, "rows": 128, "windows": 1, "documents": 1, "needles": 3, "needle_words": 16},
    },
    "gate": {"context": 768, "rows": 256, "max_loss": 0.1, "min_recall": 0.7},
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(demo_source: Any, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Outcome]:
    """The demo, compiled into an empty stage cache; the unpacked model is shared between runs."""
    folder = tmp_path_factory.mktemp("demo")
    own_cache = folder / "cache"
    own_cache.mkdir()
    (own_cache / "sources").symlink_to((cache_dir / "sources").absolute())
    job = Job("demo", folder / "out", make_recipe(RECIPE), own_cache)
    return job, compile_model(job)


def measured(outcome: Outcome, name: str) -> Any:
    return next(p["measured"] for p in outcome.measurements["passes"] if p["name"] == name)


def test_the_kept_heads_carry_copying_and_random_ones_do_not(compiled: Any) -> None:
    check = measured(compiled[1], "rtpurbo")["causal_check"]
    assert check["dense"] > 0.3
    assert check["kept_heads_local"] < 0.25 * check["dense"]
    assert check["random_heads_local"] > 0.5 * check["dense"]


def test_the_known_retrieval_heads_are_found(compiled: Any) -> None:
    plan = compiled[1].plan
    known = [(18, 7), (18, 6), (17, 3), (17, 4), (20, 6), (21, 8), (21, 2), (21, 5)]
    found = [pair for pair in known if pair[1] in plan.layers[pair[0]].retrieval]
    assert len(found) >= 6
    assert sum(len(layer.retrieval) for layer in plan.layers) == 40  # 15 % of 270


def test_selectors_find_the_mass_in_part_of_the_tokens(compiled: Any) -> None:
    summary = measured(compiled[1], "rtpurbo")["selector"]["summary"]
    assert summary["recall_mean"] > 0.88
    assert summary["kept_mean"] < 0.6 * summary["context_mean"]
    stage1 = measured(compiled[1], "rtpurbo")["stage1"]
    assert stage1["kl_trained"] < 0.8 * stage1["kl_closed_form"]


def test_sharing_keeps_a_quarter_for_half_of_the_plain_search(compiled: Any) -> None:
    plan, search = compiled[1].plan, measured(compiled[1], "indexcache")
    indexed = plan.indexed()
    assert plan.pattern.count("F") == round(0.25 * len(indexed))
    assert plan.pattern[0] == "F"
    assert search["layer_evaluations"] <= 0.5 * search["layer_evaluations_plain"]


def test_the_gate_judged_the_artifact_and_not_the_dense_model(compiled: Any) -> None:
    gate = compiled[1].measurements["gate"]
    assert gate["passed"]
    assert gate["artifact"]["bits_per_byte"] != gate["dense"]["bits_per_byte"]
    assert gate["selector"]["recall_mean"] > 0.7
    assert gate["artifact"]["kv_bytes"] < 0.75 * gate["dense"]["kv_bytes"]


def test_a_finished_compile_runs_again_from_its_stored_stages(compiled: Any) -> None:
    job, outcome = compiled
    first = {file.name: file.read_bytes() for file in job.out.iterdir() if file.suffix != ".safetensors"}
    again = compile_model(job)
    assert again.seconds["rtpurbo"] == again.seconds["indexcache"] == again.seconds["measure dense"] == 0.0
    assert again.plan == outcome.plan
    assert {name: (job.out / name).read_bytes() for name in first} == first


def test_the_artifact_passes_the_release_gate(compiled: Any, cli: Any) -> None:
    done = cli("verify", compiled[0].out, "--quick", "--json")
    assert done.status == 0, done.err
    checks = {(each["name"], each["engine"]): each for each in json.loads(done.out)["checks"]}
    assert checks["files", ""]["status"] == "pass"
    assert checks["outputs of heads", "pytorch"]["figures"]["value"] < 1e-3
    assert checks["chosen keys", "pytorch"]["figures"]["value"] > 0.98
    assert checks["greedy tokens", "pytorch"]["figures"]["value"] == 1


def test_the_artifact_answers_from_beyond_the_window(compiled: Any, tmp_path: Path) -> None:
    job, _ = compiled
    assert is_artifact(job.out)
    model, tokenizer = load(job.out)
    calibration = Calibration(read_corpus(None), tokenizer, seed=0)
    asked = prompts("kv", calibration, length=768, count=6, seed=3)
    sparse = score(model, tokenizer, asked, batch_size=3)
    uninstall(model)
    dense = score(model, tokenizer, asked, batch_size=3)
    assert dense.exact >= 0.5
    assert sparse.digits >= 0.5 * dense.digits
    assert "retrieval" in artifact_text(job.out, artifact_data(job.out))


def test_evaluation_tells_a_window_from_retrieval_heads(compiled: Any) -> None:
    job = compiled[0]
    suite = Suite([768], tasks=["kv"], prompts_each=6, windows_each=1, rows=256, batch_size=3, seed=3)
    result = evaluate_artifacts([job.out], ["dense", "window", "split", "artifact"], suite, cache_dir=job.cache_dir)
    cells = {cell["system"]: cell for cell in result["cells"]}
    bits = {name: cell["bits_per_byte"] for name, cell in cells.items()}
    assert bits["dense"] < bits["window"]
    assert bits["split"] < bits["window"]
    assert cells["window"]["tasks"]["kv"]["digits"] < cells["split"]["tasks"]["kv"]["digits"]
    assert cells["window"]["kv_bytes"] < cells["artifact"]["kv_bytes"] < cells["dense"]["kv_bytes"]
    assert math.isclose(cells["artifact"]["selector"]["heads"], 40)
    assert "selector" in cells["dense"]
    assert cells["dense"]["selector"] == {}
