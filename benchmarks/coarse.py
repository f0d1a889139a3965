"""A coarse level of the selector: mass found and tokens kept, by what ranks the blocks and how many are scored.

    sparsec compile demo --passes rtpurbo --set rtpurbo.select=block -o out/blocks
    python benchmarks/coarse.py out/blocks

Writes benchmarks/results/coarse-demo.json. The prompt is read once; then the same decode rows choose without a coarse
level, with block means (``selector.coarse``), and with the bounds of Quest (arXiv 2406.10774) in their place: of each
number the least and the largest of the block. Text of the split that selectors are measured on, seen by no fit.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.selector_stats import SelectorStats
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.explain import artifact_data
from sparsec.compiler.versions import versions
from sparsec.plan import Coarse
from sparsec.plugins import attention, coarse
from sparsec.plugins.attention import Step
from sparsec.plugins.device import device_name
from sparsec.plugins.index_keys import loaded
from sparsec.plugins.load import load
from sparsec.plugins.runtime import added_tensors, install, new_cache, rows_as, stepping

RESULT = Path(__file__).resolve().parent / "results" / "coarse-demo.json"
SHOWN = ("recall_mean", "recall_p5", "far_mean", "kept_mean", "kept_p95")


def bounds(means: Any, index: Tensor, pos: Tensor, rows: int, block: int, dtype: torch.dtype) -> Tensor:
    """In place of :func:`sparsec.plugins.coarse.extended`, without padding: [batch, heads, blocks, 2 rank]."""
    keys = loaded(index)[:, :, : index.shape[2] // block * block]
    keys = keys.reshape(*keys.shape[:2], -1, block, keys.shape[3])
    return torch.cat((keys.amin(3), keys.amax(3)), 3).to(dtype)


def by_bounds(queries: Tensor, of: Tensor, *rest: Any) -> Tensor:
    """In place of :func:`sparsec.plugins.coarse.candidates`: what bounds a score is a sum over twice the rank."""
    return coarse.candidates(torch.cat((queries.clamp_max(0), queries.clamp_min(0)), -1), of, *rest)


@torch.no_grad()
def measure(model: Any, tokens: Tensor, rows: int, shares: list[int]) -> list[dict[str, Any]]:
    """A row a way, of one window's last decode rows. tokens: [1, length]."""
    ids, length, plan, tensors = tokens.to(model.device), tokens.shape[1], model.sparsec_plan, added_tensors(model)
    cache, prompt = new_cache(model, "reference"), length - rows
    with rows_as("prefill"):
        model.get_decoder()(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    ways = [("", 1), *((name, share) for share in shares for name in ("means", "bounds"))]
    found = []
    for name, one_in in ways:
        levels = Coarse(min_context=0, one_in=one_in) if name else None
        install(model, plan.edit(selector=plan.selector.model_copy(update={"coarse": levels})), tensors)
        stats = SelectorStats()
        quest = name == "bounds"
        with (
            patch.object(attention, "extended", bounds if quest else coarse.extended),
            patch.object(attention, "candidates", by_bounds if quest else coarse.candidates),
            stepping(Step(decode=True, commit=False, observe=stats)),
        ):
            model.get_decoder()(input_ids=ids[:, prompt:], past_key_values=cache, use_cache=True)
        summary = stats.summary()
        shown = {key: summary[key] for key in SHOWN}
        found.append({"context": length, "ranked_by": name or None, "one_in": one_in, "rows": summary["rows"], **shown})
        print(json.dumps(found[-1]), flush=True)
    install(model, plan, tensors)
    return found


def main() -> None:
    """Measure each way, write what was found."""
    parser = argparse.ArgumentParser(description="A coarse level of the selector: mass found and tokens kept.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--contexts", default="4096,8192")
    parser.add_argument("--shares", default="2,4,8", help="of so many blocks one is scored")
    parser.add_argument("--rows", type=int, default=128, help="decode rows at the end of each context")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    model, tokenizer = load(asked.artifact, device=asked.device, dtype="float32", kernels="reference")
    made = artifact_data(asked.artifact)["manifest"]
    calibration = Calibration(read_corpus(made["recipe"]["calibration"]), tokenizer)
    rows: list[dict[str, Any]] = []
    for context in map(int, asked.contexts.split(",")):
        shares = list(map(int, asked.shares.split(",")))
        rows += measure(model, calibration.windows("search", context, 1), asked.rows, shares)
    selector = model.sparsec_plan.selector
    assert selector is not None
    result = {
        "command": f"python benchmarks/coarse.py {shlex.join(sys.argv[1:])}".rstrip(),
        "recipe": made["recipe"],
        "device": device_name(model.device),
        "text": calibration.describe()["made_of"],
        "selector": selector.model_dump(mode="json"),
        "versions": versions(),
        "rows": rows,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
