"""Plugins' kernels on a GPU by the CUDA driver, under the launches that an engine would use.

    python benchmarks/launch_ptx.py

Each tactic of local and of retrieval heads and of what chooses, float16, beside PyTorch in float32; prints the largest
difference and the median time of a step, launching from Python included. Under a minute.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from sparsec.plan import Selector
from sparsec.plugins.ahead import OPERATORS, TACTICS, compiled
from sparsec.plugins.driver import launch
from sparsec.plugins.selector import select

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


def choosing(lengths: torch.Tensor, block: int, tactic: int) -> tuple[float, float]:
    """Share of tokens on which the selector's kernels and the reference differ, and the median of a step, seconds."""
    heads, rank, device = 6, 16, lengths.device
    queries = torch.randn(BATCH, heads, 1, rank, device=device)
    index = torch.randn(BATCH, heads, SLOTS, rank, device=device, dtype=torch.float16)
    how: dict[str, Any] = {"top_p": 0.9, "sinks": 4, "recent": 64, "min_keep": 64, "block": block}
    kind = "block" if block > 1 else "token"
    selector = Selector.model_validate({**how, "rank": rank, "rope": "post", "granularity": kind, "scope": "head"})
    sizes, more = {"block": block, "items": -(-SLOTS // block)}, {**how, "min_context": 512, "slots": SLOTS}
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        (values,) = run("ScoreItems", [queries, index, lengths], sizes, tactic)
        (kept,) = run("KeepItems", [values, lengths], more, tactic)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    scores = queries @ index.float().transpose(2, 3)
    slots = torch.arange(SLOTS, device=device).expand(BATCH, -1)
    expected = select(scores, lengths[:, None], slots, selector, 512)[:, :, 0]
    return float((kept != expected).float().mean()), statistics.median(times)


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
        for block in (1, 64):
            differ, seconds = choosing(lengths, block, tactic)
            worst = max(worst, differ)
            print(f"choosing by {block:2} tactic {tactic}  differ {differ:.1e}  {seconds * 1e6:.0f} us")
    return int(worst > 5e-3)


if __name__ == "__main__":
    sys.exit(main())
