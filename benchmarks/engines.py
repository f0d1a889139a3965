"""Engines of TensorRT-RTX for an artifact, built with no GPU, without and with plugins: size, time, layers, plugins.

    python benchmarks/engines.py out/demo -o benchmarks/results/engines-demo.json

Nothing is run: TensorRT-RTX loads engines only where there is a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparsec.compiler.versions import versions
from sparsec.export.onnx.artifact import write_graphs
from sparsec.export.tensorrt import build, flavour_of, write_kernels
from sparsec.export.tensorrt_options import RTX_CAPABILITIES, Options, Profile
from sparsec.plugins import tensorrt_rtx
from sparsec.plugins.load import load


def main() -> None:
    """Build and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--slots", type=int, default=2048)
    parser.add_argument("--dtype", default="float16")
    options = parser.parse_args()
    _, trt = flavour_of("rtx")
    model, _ = load(options.artifact, dtype=options.dtype)
    weights = sum(weight.nbytes for weight in model.parameters())
    profile, rows = Profile().within(options.slots), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        before, began = _cpu(), time.monotonic()
        write_graphs(model, folder, source={}, dtype=options.dtype, slots=options.slots)
        traced = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu() - before}
        divided = folder / "plugins"
        divided.mkdir()
        write_graphs(
            model, divided, source={}, dtype=options.dtype, slots=options.slots, plugins=True, kinds=("decode",)
        )
        del model
        uses = tensorrt_rtx.register(trt)
        graphs = {"prefill": folder / "prefill.onnx", "decode": folder / "decode.onnx"}
        graphs["decode with plugins"] = divided / "decode.onnx"
        for name, graph in graphs.items():
            before, began = _cpu(), time.monotonic()
            engine = folder / "engine"
            layers = build(trt, "rtx", graph, engine, profile, RTX_CAPABILITIES, Options())
            took = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu() - before}
            rows[name] = {**took, "bytes": engine.stat().st_size, "layers": layers}
            print(name, rows[name], file=sys.stderr, flush=True)
        plugins = write_kernels(folder, uses, RTX_CAPABILITIES)
    result: dict[str, Any] = {
        "rows": rows,
        "weights_bytes": weights,
        "trace": {**traced, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
        "plugins": plugins,
        "slots": options.slots,
        "dtype": options.dtype,
        "profile": {"batch": profile.batch, "rows": profile.rows},
        "compute_capabilities": RTX_CAPABILITIES,
        "load": os.getloadavg()[2],  # processes that want a core, over 15 minutes: what else the machine did
        "versions": {**versions(), "tensorrt_rtx": trt.__version__},
        "command": " ".join(["python", "benchmarks/engines.py", *sys.argv[1:]]),
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
