"""What indexers are fitted on: text windows and needle documents, the rows that matter, and stretched positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.indexer_fit import Forced, Window, sample_window
from sparsec.calibrate.needles import NeedleDocument, needle_documents
from sparsec.calibrate.splits import Calibration
from sparsec.events import Listener, tracked
from sparsec.plan import Plan

JUMPS = 6  # of stretched positions


@dataclass(frozen=True)
class FitText:
    """``windows`` text windows and as many needle documents; contexts, rows and windows of local heads are tokens."""

    windows: int
    context: int
    reach: int  # positions go up to here; the context where they are not stretched
    local: int
    sinks: int
    needles: int
    words: int
    rows: int
    mined: int
    seed: int


def fit_windows(
    model: Any,
    plan: Plan,
    heads: dict[int, tuple[int, ...]],
    calibration: Calibration,
    text: FitText,
    *,
    rope: str,
    forced: Forced,
    listen: Listener,
    stage: str = "capture attention",
) -> list[Window]:
    """What the heads see in each window of the train split; other needles than those that heads were detected with.

    Raises:
        CalibrationError: the text does not suffice.
    """
    generator = torch.Generator().manual_seed(text.seed)
    texts = calibration.windows("train", text.context, text.windows, seed=text.seed)
    documents = needle_documents(
        calibration,
        split="train",
        count=text.windows,
        length=text.context,
        window=text.local,
        sinks=text.sinks,
        needles_per_document=text.needles,
        words=text.words,
        seed=text.seed + 1,
    )
    wanted = []
    for tokens, document in zip(texts, documents, strict=True):
        wanted.append((tokens, text_rows(text.context, text.local, text.rows, generator)))
        wanted.append((document.tokens, needle_rows(document, text.local, text.rows, generator)))
    stretch = text.reach > text.context
    return [
        sample_window(
            model,
            plan,
            heads,
            tokens,
            rows,
            rope=rope,
            mined=text.mined,
            forced=forced,
            generator=generator,
            positions=stretched(text.context, text.reach, generator) if stretch else None,
        )
        for tokens, rows in tracked(wanted, stage, listen, len(wanted))
    ]


def text_rows(length: int, local: int, count: int, generator: torch.Generator) -> Tensor:
    """Query rows of a text window, mostly beyond the local window: those below it say nothing about far selection."""
    near = torch.randperm(min(local, length), generator=generator)[: count // 8]
    far = torch.randperm(max(0, length - local), generator=generator)[: count - len(near)] + min(local, length)
    return torch.cat((near, far)).sort().values


def stretched(length: int, reach: int, generator: torch.Generator) -> Tensor:
    """Positions [length], ascending from 0 to ``reach`` - 1, with a few jumps: far distances in a short window (ours).

    Attention knows distance from RoPE alone, so a model reads such a text as one from which the tokens between were
    lost (PoSE, arXiv 2309.10400, trains on such positions). An indexer after RoPE learns distances up to ``reach`` at
    the cost of a short window, and the true attention that it learns from is the model's at those positions.
    """
    cuts = torch.randint(1, length, (JUMPS,), generator=generator).sort().values
    shares = torch.rand(JUMPS, generator=generator)
    ends = (shares.cumsum(0) / shares.sum() * (reach - length)).round().long()
    at = torch.arange(length)
    passed = torch.searchsorted(cuts, at, right=True)  # jumps behind each token
    return at + torch.cat((torch.zeros(1, dtype=torch.long), ends))[passed]


def needle_rows(document: NeedleDocument, local: int, count: int, generator: torch.Generator) -> Tensor:
    """The rows of the later needles, all of them, filled up with text rows: where retrieval heads do their work.

    Plain text has few such rows, and projections that never saw one lose the needle (docs/passes/rtpurbo.md).
    """
    later = torch.cat([torch.arange(span.start, span.stop) for _, span in document.pairs])
    rest = text_rows(len(document.tokens), local, max(0, count - len(later)), generator)
    return torch.tensor(sorted({*later.tolist(), *rest.tolist()}))
