"""An artifact on ONNX Runtime beside the dense model exported the same way: time per token, memory, parity.

    python benchmarks/onnx_speed.py out/demo -o benchmarks/results/onnx-demo.json

Exports both (in processes of their own, whose time and peak memory are measured), checks greedy text against PyTorch,
then decodes behind ``--context`` tokens of text, the two in turns; medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from transformers import AutoTokenizer

import sparsec
from sparsec.calibrate.corpus import read_corpus
from sparsec.compiler.versions import versions
from sparsec.export.onnx.artifact import write_graphs
from sparsec.export.parity import compare
from sparsec.plan import Plan
from sparsec.plugins.families import base_plan
from sparsec.plugins.onnx_runner import OnnxModel
from sparsec.plugins.runtime import install

TURNS = 5


def export(artifact: Path, folder: Path, system: str) -> None:
    """One export, in this process: its seconds and peak memory as JSON on standard output."""
    began = time.monotonic()
    model, _ = sparsec.load(artifact, dtype="float32")
    if system == "dense":
        install(model, base_plan(model.config, "benchmark"), {})
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_graphs(model, folder, source={}, dtype="float32")
    used = resource.getrusage(resource.RUSAGE_SELF)
    took = {"seconds": time.monotonic() - began, "cpu_seconds": used.ru_utime + used.ru_stime}
    print(json.dumps({**took, "peak_bytes": used.ru_maxrss * 1024}))


def timed(runner: OnnxModel, token: int, steps: int) -> list[float]:
    """Seconds of so many steps."""
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        token = int(runner.step([token]).argmax())
        found.append(time.perf_counter() - began)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=16, help="timed a turn")
    parser.add_argument("--greedy", type=int, default=128, help="tokens compared with PyTorch's")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/onnx-speed"))
    parser.add_argument("--export", choices=["dense", "artifact"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        export(options.artifact, options.work / options.export, options.export)
        return
    rows: dict[str, dict[str, Any]] = {}
    for system in ("dense", "artifact"):
        call = [sys.executable, __file__, str(options.artifact), "--work", str(options.work), "--export", system]
        rows[system] = {"export": json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)}
    tokenizer = AutoTokenizer.from_pretrained(options.artifact)
    ids: list[int] = []
    for document in reversed(read_corpus(options.text).documents):
        ids += tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(ids) >= options.context:
            break
    ids = ids[: options.context]

    model, _ = sparsec.load(options.artifact, dtype="float32")
    plan: Plan = model.sparsec_plan
    runners = {name: OnnxModel(options.work / name, device="cpu", threads=options.threads) for name in rows}
    parity = compare(model, runners["artifact"], [ids[:700]], options.greedy)
    del model
    for name, runner in runners.items():
        runner.reset(1)
        began = time.perf_counter()
        logits = runner.prefill([ids])
        rows[name] |= {
            "prefill_s": time.perf_counter() - began,
            "kv_bytes": runner.kv_bytes,
            "token": int(logits.argmax()),
        }
    steps: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(TURNS + 1):
        for name, runner in runners.items():
            found = timed(runner, rows[name]["token"], options.steps if turn else 4)  # the first turn warms up
            steps[name] += found if turn else []
    for name, found in steps.items():
        rows[name] |= {"step_s": statistics.median(found), "quartiles_s": np.percentile(found, [25, 75]).tolist()}
    result = {
        "rows": rows,
        "ratio": rows["dense"]["step_s"] / rows["artifact"]["step_s"],
        "parity": {**parity, "prompt": 700, "steps": options.greedy},
        "context": options.context,
        "dtype": "float32",
        "threads": options.threads,
        "load": os.getloadavg()[2],  # processes that want a core, over 15 minutes: what else the machine did
        "steps": options.steps * TURNS,
        "plan": plan.digest,
        "passes": [each.name for each in plan.passes],
        "versions": {**versions(), "onnxruntime": onnxruntime.__version__},
        "command": " ".join(["python", "benchmarks/onnx_speed.py", *sys.argv[1:]]),
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
