"""Indexers before and after RoPE, positions of the fit stretched or not: mass found and tokens kept, by context.

    python benchmarks/indexers.py SOURCE [--calibration TEXT] [--device cuda] [--scaling yarn --factor 2]
        [--needles TEXT --lengths 2048,4096,8000 --prompts 100 --batch-size 50 --dtype bfloat16]

Writes benchmarks/results/indexers-demo.json. Text that no fit has seen, the last rows of each context as decode rows;
with ``--needles`` the tasks of ``sparsec eval`` too: the dense model, the split without indexers, each kind.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rope_scaling import scaled
from torch import Tensor

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.evaluate import DENSE, Suite, System, baseline_plan, evaluate
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.trainable import cast_weights
from sparsec.compiler.commands.options import cache_dir
from sparsec.compiler.draw import drawing
from sparsec.compiler.source import load_model, load_tokenizer, open_source
from sparsec.compiler.versions import versions
from sparsec.events import Listener
from sparsec.passes.base import Program
from sparsec.passes.rtpurbo import Rtpurbo
from sparsec.plan import Plan
from sparsec.plugins.device import device_name
from sparsec.plugins.families import base_plan
from sparsec.plugins.runtime import applied

RESULT = Path(__file__).resolve().parent / "results" / "indexers-demo.json"


def main() -> None:
    """Fit each kind, write what was measured."""
    parser = argparse.ArgumentParser(
        description="Indexers before and after RoPE, with stretched positions and without."
    )
    parser.add_argument("source", nargs="?", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scaling", default="default", help="of rotary embeddings, beyond the trained length")
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--kinds", default="pre,pre-stretched,post,post-stretched")
    parser.add_argument("--needles", help="text that needles are hidden in; none are without it")
    parser.add_argument("--lengths", default="2048,4096,8000")
    parser.add_argument("--tasks", default="kv,multikey,passkey")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="that needles are asked for in")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    source = open_source(asked.source, revision=None, cache_dir=cache_dir())
    calibration = Calibration(read_corpus(asked.calibration), load_tokenizer(source))
    with scaled(source, asked.scaling, asked.factor if asked.scaling != "default" else 1.0) as opened:
        model = load_model(opened, device=asked.device, dtype="auto")
    plan = base_plan(model.config, "benchmark")
    rows: list[dict[str, Any]] = []
    systems: list[System] = []
    with drawing() as listen:
        for kind in asked.kinds.split(","):
            rope, stretch = kind.removesuffix("-stretched"), kind.endswith("-stretched")
            began = time.monotonic()
            config = Rtpurbo.model_validate({"rope": rope, "stretch": stretch})
            result = config.run(Program(model, plan, {}, 0, listen), calibration)
            found = result.measured
            kept = {name: found["stage1"][name] for name in ("kl_closed_form", "kl_trained")}
            selector = {name: found["selector"][name] for name in ("contexts", "break_even")}
            seconds = round(time.monotonic() - began, 1)
            rows.append({"rope": rope, "stretch": stretch, "seconds": seconds, **kept, **selector})
            if not systems:
                systems = [System(DENSE, partial(_running, model, None, {}))]
                split = baseline_plan("split", result.plan)
                systems.append(System("split", partial(_running, model, split, {}), split))
            systems.append(System(kind, partial(_running, model, result.plan, result.tensors), result.plan))
        needles = _needles(asked, model, systems, listen) if asked.needles else {}
    written = {
        "command": f"python benchmarks/indexers.py {shlex.join(sys.argv[1:])}".rstrip(),
        "device": device_name(model.device),
        "text": calibration.describe()["made_of"],
        "seed": 0,
        "config": Rtpurbo().model_dump(mode="json"),
        "versions": versions(),
        "fits": rows,
        **needles,
    }
    asked.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _running(model: Any, plan: Plan | None, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The model under a plan, or dense."""
    with applied(model, plan, tensors) if plan is not None else nullcontext():
        yield model


def _needles(asked: argparse.Namespace, model: Any, systems: Sequence[System], listen: Listener) -> dict[str, Any]:
    """What each system finds; all have the same heads, and the same questions."""
    cast_weights(model, getattr(torch, asked.dtype))
    suite = Suite(
        lengths=tuple(map(int, asked.lengths.split(","))),
        tasks=tuple(asked.tasks.split(",")),
        prompts_each=asked.prompts,
        windows_each=0,
        batch_size=asked.batch_size,
    )
    text = Calibration(read_corpus(asked.needles), load_tokenizer(open_source(asked.source, cache_dir=cache_dir())))
    found = evaluate(systems, text, suite, listen=listen)
    return {
        "dtype": asked.dtype,
        **{name: found[name] for name in ("cells", "comparisons", "over_lengths", "prompts_each")},
    }


if __name__ == "__main__":
    main()
