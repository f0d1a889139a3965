"""Does the model go on in the same way after the same text in several segmentations?

A window is read in base tokens, in merged ones, and with the first half of the merges alone. Behind every token that
ends where one of the base tokenizer's ends the text read is the same: the next-token distributions over the base
vocabulary are compared there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.merges import Mined
from sparsec.calibrate.teacher import Head
from sparsec.plugins.merging import Merger


@torch.no_grad()
def consistency(model: Any, mined: Mined, rows: Tensor, windows: Tensor) -> dict[str, Any]:
    """Against base tokens, by segmentation: JSON data.

    Args:
        model: dense, of base tokens.
        rows: of the merged tokens, [merged, width].
        windows: base tokens, int64 [windows, length].

    Returns:
        of ``merged`` and ``half`` each: positions compared, the share of them where the likeliest next token is the
        same, and the mean KL divergence from the base segmentation in nats.
    """
    own = model.get_input_embeddings().weight
    table = torch.cat([own, rows.to(own)])
    _, pieces = mined.merger()
    ways: Sequence[tuple[str, Merger]] = (
        ("merged", Merger(mined.merges)),
        ("half", Merger(mined.merges[: len(mined.merges) // 2])),
    )
    sums = {name: [0, 0, 0.0] for name, _ in ways}
    for window in windows:
        ids = window.tolist()
        taught = _log_probabilities(model, own[window.to(own.device)])
        for name, merger in ways:
            merged, spans = merger(ids, pieces(ids))
            ends = torch.tensor(spans).cumsum(0).to(own.device) - 1
            read = _log_probabilities(model, table[torch.tensor(merged, device=own.device)])
            same = (read.argmax(-1) == taught[ends].argmax(-1)).sum()
            apart = (taught[ends].exp() * (taught[ends] - read)).sum()
            sums[name] = [a + b for a, b in zip(sums[name], (len(ends), int(same), float(apart)), strict=True)]
    return {
        name: {"positions": count, "same_next": same / count, "divergence": apart / count}
        for name, (count, same, apart) in sums.items()
    }


def _log_probabilities(model: Any, inputs: Tensor) -> Tensor:
    states = model.get_decoder()(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0]
    found: Tensor = Head(model)(states).float().log_softmax(-1)
    return found
