"""Plugins' kernels on a GPU by the CUDA driver, under the launches that an engine would use.

    python benchmarks/launch_ptx.py

Each tactic of local and of retrieval heads, float16, beside PyTorch in float32; prints the largest difference and the
median time of a step, launching from Python included. Under a minute.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from sparsec.plugins.ahead import OPERATORS, TACTICS, compiled
from sparsec.plugins.driver import launch

BATCH, HEADS, KV, DIM, SLOTS, LENGTH = 2, 32, 8, 128, 8192, 8000
NEAR = {"window": 512, "sinks": 4, "min_context": 516, "scale": DIM**-0.5, "shares": 3}


def run(name: str, inputs: list[torch.Tensor], attributes: dict[str, Any], tactic: int) -> list[torch.Tensor]:
    """One operator as an engine launches it."""
    operator = OPERATORS[name]
    tactic = tactic if tactic in operator.tactics else operator.tactics[0]
    shapes = [tuple(each.shape) for each in inputs]
    major, minor = torch.cuda.get_device_capability()
    kernel = compiled(operator, "float16", shapes, attributes, 10 * major + minor, tactic)
    kinds = operator.types("float16")[1]
    outputs = [
        torch.empty(shape, dtype=getattr(torch, kind), device="cuda")
        for shape, kind in zip(operator.shapes(shapes, attributes), kinds, strict=True)
    ]
    how = operator.launch(shapes, attributes)
    stream = torch.cuda.current_stream().cuda_stream
    read, written = ([each.data_ptr() for each in side] for side in (inputs, outputs))
    launch(kernel, read, how.integers, written, how.grid, stream)
    return outputs


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Dense attention under a mask [batch, 1, 1, slots]."""
    q, k, v = (each.float() for each in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3) * DIM**-0.5).masked_fill(~seen, float("-inf"))
    found: torch.Tensor = scores.softmax(-1) @ v
    return found


def main() -> int:
    """Run all; 1 where a difference is too large."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    q = torch.randn(BATCH, HEADS, 1, DIM, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(BATCH, KV, SLOTS, DIM, device="cuda", dtype=torch.float16) for _ in range(2))
    lengths = torch.full((BATCH,), LENGTH, device="cuda")
    token = torch.arange(SLOTS, device="cuda")
    near = (token <= LENGTH) & ((LENGTH - token < NEAR["window"]) | (token < NEAR["sinks"]))
    keep = (torch.rand(BATCH, 1, SLOTS, device="cuda") < 0.05) & (token <= LENGTH)
    worst = 0.0
    for tactic in TACTICS:
        for name in ("BesideShares", "ListedShares"):
            every = tuple(range(KV))
            if name == "BesideShares":
                attributes: dict[str, Any] = {**NEAR, "kv_heads": every}
                seen = near.expand(BATCH, 1, 1, SLOTS)
            else:
                attributes = {"kv_heads": every, "scale": DIM**-0.5, "shares": 8}
                seen = keep[:, :, None]
            times = []
            for _ in range(20):
                torch.cuda.synchronize()
                began = time.perf_counter()
                more = [lengths] if name == "BesideShares" else run("ListKept", [keep], {}, tactic)
                parts = run(name, [q, k, v, *more], attributes, tactic)
                (found,) = run("CombineShares", [*parts, q], {}, tactic)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            error = float((found.float() - expected(q, k, v, seen)).abs().max())
            worst = max(worst, error)
            print(f"{name:14} tactic {tactic}  error {error:.1e}  {statistics.median(times) * 1e6:.0f} us")
    return int(worst > 5e-3)


if __name__ == "__main__":
    sys.exit(main())
