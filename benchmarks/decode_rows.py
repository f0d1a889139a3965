"""What benchmarks of selectors on an artifact share: its text, the last decode rows of each context, and the JSON."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.selector_stats import SelectorStats
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.explain import artifact_data
from sparsec.compiler.versions import versions
from sparsec.plugins.device import device_name
from sparsec.plugins.load import load

RESULTS = Path(__file__).resolve().parent / "results"
SHOWN = ("recall_mean", "recall_p5", "far_mean", "kept_mean", "kept_p95")


def parser(description: str, result: str, *, contexts: str, rows: int) -> argparse.ArgumentParser:
    """Options that all have; result: the file's name under results/."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("artifact", type=Path)
    made.add_argument("--contexts", default=contexts)
    made.add_argument("--rows", type=int, default=rows, help="decode rows at the end of each context")
    made.add_argument("--device", default="cpu")
    made.add_argument("--out", type=Path, default=RESULTS / result)
    return made


def shown(stats: SelectorStats, **way: Any) -> dict[str, Any]:
    """What was measured of one way to choose, printed and as JSON data."""
    summary = stats.summary()
    row = {**way, "rows": summary["rows"], **{key: summary[key] for key in SHOWN}}
    print(json.dumps(row), flush=True)
    return row


def run(
    asked: argparse.Namespace, measure: Callable[[Any, Tensor, int], list[dict[str, Any]]], *, windows: int = 1
) -> None:
    """Measure each context, write what was found.

    Args:
        measure: of a model, tokens [windows, length], and so many decode rows at each window's end: a row a way. The
            windows are of the split that selectors are measured on, which no fit has seen.
    """
    model, tokenizer = load(asked.artifact, device=asked.device, dtype="float32", kernels="reference")
    made = artifact_data(asked.artifact)["manifest"]
    calibration = Calibration(read_corpus(made["recipe"]["calibration"]), tokenizer)
    rows: list[dict[str, Any]] = []
    for context in map(int, asked.contexts.split(",")):
        rows += measure(model, calibration.windows("search", context, windows), asked.rows)
    selector = model.sparsec_plan.selector
    assert selector is not None
    result = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".rstrip(),
        "recipe": made["recipe"],
        "device": device_name(model.device),
        "text": calibration.describe()["made_of"],
        "selector": selector.model_dump(mode="json"),
        "versions": versions(),
        "rows": rows,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
