"""Indexers before and after RoPE, positions of the fit stretched or not: mass found and tokens kept, by context.

    python benchmarks/indexers.py SOURCE [--calibration TEXT] [--device cuda] [--scaling yarn --factor 2]

Writes benchmarks/results/indexers-demo.json. Text that no fit has seen, the last rows of each context as decode rows.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rope_scaling import scaled

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.commands.options import cache_dir
from sparsec.compiler.draw import drawing
from sparsec.compiler.source import load_model, load_tokenizer, open_source
from sparsec.compiler.versions import versions
from sparsec.passes.base import Program
from sparsec.passes.rtpurbo import Rtpurbo
from sparsec.plugins.device import device_name
from sparsec.plugins.families import base_plan

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
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    source = open_source(asked.source, revision=None, cache_dir=cache_dir())
    calibration = Calibration(read_corpus(asked.calibration), load_tokenizer(source))
    with scaled(source, asked.scaling, asked.factor if asked.scaling != "default" else 1.0) as opened:
        model = load_model(opened, device=asked.device, dtype="auto")
    plan = base_plan(model.config, "benchmark")
    rows: list[dict[str, Any]] = []
    with drawing() as listen:
        for rope in ("pre", "post"):
            for stretch in (False, True):
                began = time.monotonic()
                config = Rtpurbo.model_validate({"rope": rope, "stretch": stretch})
                found = config.run(Program(model, plan, {}, 0, listen), calibration).measured
                kept = {name: found["stage1"][name] for name in ("kl_closed_form", "kl_trained")}
                selector = {name: found["selector"][name] for name in ("contexts", "break_even")}
                seconds = round(time.monotonic() - began, 1)
                rows.append({"rope": rope, "stretch": stretch, "seconds": seconds, **kept, **selector})
    result = {
        "command": f"python benchmarks/indexers.py {shlex.join(sys.argv[1:])}".rstrip(),
        "device": device_name(model.device),
        "text": calibration.describe()["made_of"],
        "seed": 0,
        "config": Rtpurbo().model_dump(mode="json"),
        "versions": versions(),
        "fits": rows,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
