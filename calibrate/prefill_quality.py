"""What it costs when prompt rows of retrieval heads choose key blocks instead of attending to all: prefill alone.

All rows are prefill rows, and everything but the retrieval heads' prefill is the same in both runs. The loss is that of
the last half of the rows; beside it stand the blocks kept and the true attention mass in them, since a selector
that keeps more looks better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.decode import nll
from sparsec.events import Listener, silent, tracked
from sparsec.plan import Plan
from sparsec.plugins.runtime import applied, stepping
from sparsec.plugins.step import Selection, Step


@dataclass
class BlockStats:
    """What prefill rows whose context is longer than ``beyond`` keep. Use as ``Step.observe_prefill``; no padding."""

    block: int
    beyond: int
    recall: list[Tensor] = field(default_factory=list)  # share of true attention mass in the kept blocks, by row
    kept: int = 0  # key blocks, over rows and heads
    visible: int = 0

    def __call__(self, seen: Selection) -> None:
        """Add one tile of rows."""
        rows = seen.visible[0, 0].sum(-1) > self.beyond
        if not bool(rows.any()):
            return
        visible = seen.visible[:, :, rows]
        keep = seen.keep.expand(-1, len(seen.heads), -1, -1)[:, :, rows]
        logits = (seen.q[:, :, rows].float() @ seen.k.float().transpose(-1, -2)) * seen.scale
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        self.recall.append((weights * keep).sum(-1).flatten().cpu())
        # A block is visible, and kept, exactly where its first token is.
        self.kept += int(keep[..., :: self.block].sum())
        self.visible += int(visible[..., :: self.block].sum()) * len(seen.heads)

    def summary(self) -> dict[str, float]:
        """Over all rows and heads; empty where nothing was chosen."""
        if not self.recall:
            return {}
        recall = torch.cat(self.recall).sort().values
        return {
            "block_share": self.kept / self.visible,
            "recall_mean": float(recall.mean()),
            "recall_p5": float(recall[round(0.05 * (len(recall) - 1))]),
        }


@torch.no_grad()
def prefill_quality(
    model: Any,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    windows: Sequence[Tensor],
    listen: Listener = silent,
) -> dict[str, Any]:
    """Bits per byte of prefill rows with dense and with selected prefill of retrieval heads.

    Args:
        model: dense, no plan installed.
        plan: with a selector; its own ``prefill`` does not matter.
        tensors: the plan's.
        windows: token ids, [length] each, of text that nothing was fitted to.

    Returns:
        JSON data: ``dense`` and ``selector`` bits per byte, ``loss`` (relative), the share of visible key blocks kept,
        the recall of true attention mass (mean, and what 5 % of rows stay below), and what was read.

    Raises:
        ValueError: the plan has no selector.
    """
    if plan.selector is None:
        raise ValueError("prefill is chosen by a selector, and the plan has none: use a plan with indexers")
    found: dict[str, Any] = {}
    stats = BlockStats(plan.selector.block, 0)
    for kind in ("dense", "selector"):
        chosen = plan.edit(selector={**plan.selector.model_dump(), "prefill": kind})
        bits, size, rows = 0.0, 0, 0
        with applied(model, chosen, tensors):
            for tokens in tracked(windows, f"prefill {kind}", listen, len(windows)):
                half = len(tokens) // 2
                stats.beyond = half
                with stepping(Step(decode=False, observe_prefill=stats)):
                    logits = model(
                        input_ids=tokens[None].to(model.device), use_cache=False, logits_to_keep=len(tokens) - half
                    ).logits
                losses = nll(logits[0], tokens[half:].to(model.device))
                bits += float(losses.double().sum()) / math.log(2)
                size += len(tokenizer.decode(tokens[half + 1 :], clean_up_tokenization_spaces=False).encode())
                rows += len(losses)
        found[kind] = bits / max(1, size)
    return {
        **found,
        "loss": found["selector"] / found["dense"] - 1,
        **stats.summary(),
        "windows": len(windows),
        "context": max(map(len, windows)),
        "rows": rows,
        "query_block": plan.selector.query_block,
        "block": plan.selector.block,
    }
