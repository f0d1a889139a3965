"""Results in the Hub's own format: there where the text is a data set of the Hub, and nowhere else."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from sparsec.export.artifact import write_manifest
from sparsec.export.eval_results import eval_results
from sparsec.export.hub import Push, planned
from sparsec.export.integrity import check
from sparsec.layout import MANIFEST, MEASUREMENTS, read_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_data_set_of_the_hub_is_named_with_its_commit(tiny_artifact: Path, tmp_path: Path) -> None:
    measurements = read_json(tiny_artifact / MEASUREMENTS)
    assert eval_results(measurements) is None
    measurements["calibration"]["made_of"] = f"split train of the Hub data set team/texts at {COMMIT}; only the first"
    found = eval_results(measurements)
    assert found is not None
    name, text = found
    assert name == ".eval_results/texts.yaml"
    first, second = yaml.safe_load(text)
    assert first["dataset"] == {"id": "team/texts", "task_id": "default", "revision": COMMIT}
    assert first["value"] == measurements["gate"]["artifact"]["bits_per_byte"]
    assert second["value"] == measurements["gate"]["dense"]["bits_per_byte"]
    assert "decode rows" in first["notes"]
    # An artifact with it is whole, and it is pushed.
    artifact = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    (artifact / name).parent.mkdir()
    (artifact / name).write_text(text)
    made = read_json(artifact / MANIFEST)
    (artifact / MANIFEST).unlink()
    write_manifest(artifact, {key: value for key, value in made.items() if key not in ("files", "digest")})
    assert [finding.said for finding in check(artifact) if not finding.good] == []
    assert name in {file["name"] for file in planned(Push(artifact, "team/model"))["files"]}


def test_the_hubs_client_reads_it(tiny_artifact: Path) -> None:
    from huggingface_hub import parse_eval_result_entries

    measurements = read_json(tiny_artifact / MEASUREMENTS)
    measurements["calibration"]["made_of"] = f"split train of the Hub data set team/texts at {COMMIT}"
    found = eval_results(measurements)
    assert found is not None
    entries = parse_eval_result_entries(yaml.safe_load(found[1]))
    assert [(entry.dataset_id, entry.dataset_revision) for entry in entries] == [("team/texts", COMMIT)] * 2
