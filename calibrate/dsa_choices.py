"""How much of what a model's own indexers (DSA) would choose is still chosen another way, in the same hidden states.

    iou       |chosen & flat| / |chosen or flat|: HISA's own measure
    recovered |chosen & flat| / |flat|: MISA's own measure; equal sizes make one a function of the other
    mass      share of the main attention, mean over heads, on what is chosen; ``mass_flat``: on what is chosen flat

Only rows that see more tokens than are chosen count: the others have no choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsec.events import Listener, tracked
from sparsec.plan import Plan
from sparsec.plugins.runtime import applied, stepping
from sparsec.plugins.step import Selection, Step

MEASURES = ("iou", "recovered", "mass", "mass_flat")


@torch.no_grad()
def choices(model: Any, plan: Plan, windows: Sequence[Tensor], listen: Listener) -> dict[str, Any]:
    """What ``plan`` chooses beside what the same indexers choose flat: among all tokens, with all heads.

    Every layer is judged on the hidden states that ``plan`` gives it; the flat choice is made from the same ones.

    Returns:
        ``layers``: a row an indexed layer with a mean of each measure; and the means over all of them.
    """
    assert plan.dsa is not None
    sums: dict[int, Tensor] = {}
    rows: dict[int, int] = {}
    step = Step(
        decode=True,
        beside=plan.dsa.model_copy(update={"hisa": None, "misa": None}),
        observe=lambda seen: _add(seen, sums, rows),
    )
    for tokens in tracked(windows, "compare choices", listen, len(windows)):
        with applied(model, plan), stepping(step):
            model.get_decoder()(input_ids=tokens[None].to(model.device), use_cache=False)
    found = {layer: (total / max(1, rows[layer])).tolist() for layer, total in sorted(sums.items())}
    table = [{"layer": layer, **dict(zip(MEASURES, values, strict=True))} for layer, values in found.items()]
    means = {name: sum(row[name] for row in table) / max(1, len(table)) for name in MEASURES}
    return {**means, "rows": min(rows.values(), default=0), "layers": table}


def _add(seen: Selection, sums: dict[int, Tensor], rows: dict[int, int]) -> None:
    assert seen.beside is not None
    chosen, flat = seen.keep[0, 0], seen.beside[0, 0]
    free = seen.visible[0, 0].sum(-1) > flat.sum(-1)
    both = (chosen & flat).sum(-1)
    weights = seen.weights()[0].mean(0)
    figures = torch.stack(
        [
            both / (chosen | flat).sum(-1),
            both / flat.sum(-1),
            (weights * chosen).sum(-1),
            (weights * flat).sum(-1),
        ]
    )
    sums[seen.layer] = sums.get(seen.layer, torch.zeros(len(MEASURES))) + figures[:, free].sum(-1).cpu()
    rows[seen.layer] = rows.get(seen.layer, 0) + int(free.sum())
