"""verify on what was exported: graphs that are the artifact pass, others fail, what cannot run says why."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsec.compiler import engines
from sparsec.errors import UsageError
from sparsec.export.artifact import write_json
from sparsec.export.verdicts import FAIL, NOT_RUN, PASS
from sparsec.layout import read_json, sha256
from sparsec.plugins.onnx_runner import MANIFEST

pytestmark = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="ONNX Runtime is not installed")


@pytest.fixture(scope="module")
def exported(cli: Any, tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``onnx/``; do not write into the folder."""
    artifact = shutil.copytree(tiny_artifact, tmp_path_factory.mktemp("exported") / "tiny")
    done = cli("export", artifact, "--to", "onnx")
    assert done.status == 0, done.err
    return artifact


@pytest.fixture
def spoilt(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "artifact")


def checked(cli: Any, artifact: Path, *more: str, status: int) -> dict[tuple[str, str], dict[str, Any]]:
    done = cli("verify", artifact, "--quick", "--json", *more)
    assert done.status == status, done.err
    return {(each["name"], each["engine"]): each for each in json.loads(done.out)["checks"]}


def relisted(artifact: Path, **changes: Any) -> None:
    """export.json says that the files are as they are."""
    folder = artifact / "onnx"
    made = read_json(folder / MANIFEST) | changes
    made["files"] = {name: sha256(folder / name) for name in made["files"]}
    write_json(folder / MANIFEST, made)


def test_graphs_do_the_golden_prompts(cli: Any, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("require: [pytorch, onnx]\n")
    found = checked(cli, exported, "--gate", str(tmp_path / "gate.yaml"), status=0)
    assert found["exports", ""]["said"] == "onnx: of the plan"
    assert found["next tokens", "onnx"]["status"] == PASS
    assert found["next tokens", "onnx"]["figures"]["value"] < 1e-3
    assert found["greedy tokens", "onnx"]["figures"]["value"] == 1


def test_other_weights_in_the_graphs_fail(cli: Any, spoilt: Path) -> None:
    file = spoilt / "onnx" / "weights.data"
    data = bytearray(file.read_bytes())
    for at in range(3, len(data), 40):  # the sign, and most of the exponent
        data[at] ^= 0x80
    file.write_bytes(data)
    assert checked(cli, spoilt, status=3)["files", ""]["status"] == FAIL
    relisted(spoilt)
    found = checked(cli, spoilt, status=3)
    assert found["files", ""]["status"] == PASS
    assert found["next tokens", "pytorch"]["status"] == PASS
    assert found["next tokens", "onnx"]["status"] == FAIL


def test_graphs_of_another_plan_fail_before_they_run(cli: Any, spoilt: Path) -> None:
    relisted(spoilt, plan_digest="0" * 64)
    found = checked(cli, spoilt, status=3)
    assert "was exported from another plan" in found["exports", ""]["said"]
    assert ("next tokens", "onnx") not in found


def test_what_cannot_run_says_why(exported: Path, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(engines.NotHere, match="the artifact has no onnx/"):
        engines.on_onnx(tiny_artifact, {}, None, "cpu")  # type: ignore[arg-type]

    def missing(*_: Any, **__: Any) -> None:
        raise UsageError("running ONNX graphs needs onnxruntime: pip install 'sparsec[onnx]'")

    monkeypatch.setattr(engines, "OnnxModel", missing)
    with pytest.raises(engines.NotHere, match="needs onnxruntime"):
        engines.on_onnx(exported, {}, None, "cpu")  # type: ignore[arg-type]
    reasons = dict(engines.not_run(tiny_artifact))
    assert reasons.keys() == {"tensorrt", "vllm"}
    assert "the artifact has no tensorrt/" in reasons["tensorrt"]


def test_an_engine_that_is_there_and_not_run_is_said(cli: Any, spoilt: Path) -> None:
    engine = spoilt / "tensorrt"
    engine.mkdir()
    (engine / "decode.engine").write_bytes(b"engine")
    made = {"plan_digest": read_json(spoilt / "onnx" / MANIFEST)["plan_digest"]}
    write_json(engine / MANIFEST, made | {"files": {"decode.engine": sha256(engine / "decode.engine")}})
    found = checked(cli, spoilt, status=0)
    assert found["exports", ""]["said"] == "onnx, tensorrt: of the plan"
    assert found["next tokens", "tensorrt"]["status"] == NOT_RUN
    assert "hash" in found["next tokens", "tensorrt"]["said"]
