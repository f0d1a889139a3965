"""A coarse level of the selector: mass found and tokens kept, by what ranks the blocks and how many are scored.

    sparsec compile demo --passes rtpurbo --set rtpurbo.select=block -o out/blocks
    python benchmarks/coarse.py out/blocks

Writes benchmarks/results/coarse-demo.json. The prompt is read once; then the same decode rows choose without a coarse
level, with block means (``selector.coarse``), and with the bounds of Quest (arXiv 2406.10774) in their place: of each
number the least and the largest of the block. Text of the split that selectors are measured on, seen by no fit.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from decode_rows import parser, run, shown
from torch import Tensor

from sparsec.calibrate.selector_stats import SelectorStats
from sparsec.plan import Coarse
from sparsec.plugins import attention, coarse
from sparsec.plugins.index_keys import loaded
from sparsec.plugins.runtime import added_tensors, install, new_cache, rows_as, stepping
from sparsec.plugins.step import Step


def bounds(means: Any, index: Tensor, pos: Tensor, rows: int, block: int, dtype: torch.dtype) -> Tensor:
    """In place of :func:`sparsec.plugins.coarse.extended`, without padding: [batch, heads, blocks, 2 rank]."""
    keys = loaded(index)[:, :, : index.shape[2] // block * block]
    keys = keys.reshape(*keys.shape[:2], -1, block, keys.shape[3])
    return torch.cat((keys.amin(3), keys.amax(3)), 3).to(dtype)


def by_bounds(queries: Tensor, of: Tensor, *rest: Any) -> Tensor:
    """In place of :func:`sparsec.plugins.coarse.candidates`: what bounds a score is a sum over twice the rank."""
    return coarse.candidates(torch.cat((queries.clamp_max(0), queries.clamp_min(0)), -1), of, *rest)


@torch.no_grad()
def measure(shares: list[int], model: Any, tokens: Tensor, rows: int) -> list[dict[str, Any]]:
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
        found.append(shown(stats, context=length, ranked_by=name or None, one_in=one_in))
    install(model, plan, tensors)
    return found


def main() -> None:
    """Measure each way, write what was found."""
    about = "A coarse level of the selector: mass found and tokens kept."
    options = parser(about, "coarse-demo.json", contexts="4096,8192", rows=128)
    options.add_argument("--shares", default="2,4,8", help="of so many blocks one is scored")
    asked = options.parse_args()
    run(asked, partial(measure, list(map(int, asked.shares.split(",")))))


if __name__ == "__main__":
    main()
