"""What the report shows beside a compile's own measurements: token lengths, needles by depth, speed by context."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from sparsec.errors import ArtifactError
from sparsec.export.needles import needles
from sparsec.export.report import evaluated_name
from sparsec.export.speed import speed
from sparsec.export.tokens import tokens
from sparsec.layout import MANIFEST, REPORT, read_json, read_plan

MERGED: dict[str, Any] = {
    "name": "dynamic-tokenization", "tier": "minutes", "config": {},
    "measured": {
        "merges": 500, "saved_train": 0.25, "first": ["of the", "in <b>"],
        "heldout": {"base_tokens": 1000, "merged_tokens": 800, "bytes": 4000, "saved": 0.2},
    },
}  # fmt: skip
EVALUATED: dict[str, Any] = {
    "cells": [
        {"length": length, "system": system, "tasks": {"kv": {"found": found, "depths": [0.1, 0.5, 0.99, None]}}}
        for length, system, found in (
            (256, "dense", [1.0, 1.0, 1.0, 1.0]), (256, "artifact", [1.0, 0.5, 1.0, 0.0]),
            (512, "dense", [1.0, 1.0, 0.0, 1.0]), (512, "artifact", [0.0, 1.0, 0.0, 1.0]),
        )
    ],
    "artifacts": {"artifact": {"plan": "0" * 64}}, "device": "cpu", "dtype": "float32",
}  # fmt: skip
TIMED: dict[str, Any] = {
    "rows": [
        {"system": system, "context": context, "batch": 1, "runs": runs, "prefill_s": prefill, "step_s": step}
        for context, system, runs, prefill, step in (
            (1024, "dense", "PyTorch SDPA", 1.0, 0.010), (1024, "artifact", "Triton kernels", 1.0, 0.020),
            (8192, "dense", "PyTorch SDPA", 9.0, 0.040), (8192, "artifact", "Triton kernels", 6.0, 0.020),
        )
    ],
    "break_even": 8192, "device": "a GPU", "dtype": "bfloat16", "plan": "0" * 64,
}  # fmt: skip
SPLIT: dict[str, Any] = {
    "selector": {
        "reads": [{"context": context, "index": 1.0 * context, "kept": 1000.0, "dense": 4.0 * context}
                  for context in (256.0, 1000.0)],
        "break_even": {"tokens": 333.3, "bound": "about"},
    }
}  # fmt: skip


def test_token_lengths_before_and_after() -> None:
    page = tokens(MERGED["measured"])
    for said in ("20.0% fewer", "1,000", "800", "in &lt;b&gt;"):
        assert said in page


def test_needles_are_placed_by_length_and_depth_and_by_nothing_else() -> None:
    page = needles(EVALUATED, "artifact")
    cells = [row.replace("</td>", "").split('<td class="num">')[1:] for row in page.split("<tr>")]
    rows = [[cell.removesuffix("</tr>").partition("<")[0] for cell in row] for row in cells if row]
    assert rows == [
        ["256", "0–20%", "100%", "100%"], ["256", "40–60%", "100%", "50%"], ["256", "80–100%", "100%", "100%"],
        ["512", "0–20%", "100%", "0%"], ["512", "40–60%", "100%", "100%"], ["512", "80–100%", "0%", "0%"],
    ]  # fmt: skip
    assert "artifact: 6 prompts" in page  # those without a place are none of the grid's
    old = copy.deepcopy(EVALUATED)
    for cell in old["cells"]:
        del cell["tasks"]["kv"]["depths"]
    assert needles(old, "artifact") == ""


def test_expected_speed_is_bytes_and_measured_speed_is_time() -> None:
    assert speed(None, None) == ""
    page = speed(SPLIT, None)
    for said in (">0.82<", ">2.00<", "break-even", "about 333 tokens", "Not measured"):
        assert said in page, said
    page = speed(SPLIT, TIMED)
    for said in ("Triton kernels", "20 ms", "From 8,192 tokens on a decode step takes less time", "2.00 times"):
        assert said in page, said
    assert "Not measured" not in page
    never = speed(None, TIMED | {"break_even": None})
    assert "At none of these contexts" in never
    alone = speed(None, TIMED | {"rows": [row for row in TIMED["rows"] if row["system"] == "artifact"]})
    assert "<figure>" not in alone


def test_a_report_is_written_anew_beside_the_artifact(cli: Any, tiny_artifact: Path, tmp_path: Path) -> None:
    plan = read_plan(tiny_artifact)
    evaluated, timed = EVALUATED | {"artifacts": {"artifact": {"plan": plan.digest}}}, TIMED | {"plan": plan.digest}
    (tmp_path / "eval.json").write_text(json.dumps(evaluated))
    (tmp_path / "bench.json").write_text(json.dumps(timed))
    before = read_json(tiny_artifact / MANIFEST)["files"]
    line = ("report", tiny_artifact, "--eval", tmp_path / "eval.json", "--bench", tmp_path / "bench.json")
    done = cli(*line, "-o", tmp_path / "page.html")
    assert done.status == 0, done.err
    page = (tmp_path / "page.html").read_text()
    assert "Needles found, dense beside the artifact" in page
    assert "From 8,192 tokens on" in page
    assert read_json(tiny_artifact / MANIFEST)["files"] == before
    assert cli("report", tiny_artifact, "-o", tmp_path / "same.html").status == 0
    assert (tmp_path / "same.html").read_text() == (tiny_artifact / REPORT).read_text()
    (tmp_path / "bench.json").write_text(json.dumps(TIMED))
    assert "is about another plan: run sparsec bench on this artifact" in cli(*line, "-o", tmp_path / "x.html").line
    (tmp_path / "eval.json").write_text("[]")
    assert "is no result of sparsec eval" in cli(*line, "-o", tmp_path / "x.html").line
    assert not (tmp_path / "x.html").exists()
    with pytest.raises(ArtifactError, match="of another plan"):
        evaluated_name(plan, EVALUATED)
