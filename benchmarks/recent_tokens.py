"""What selectors cost in decode rows, by the recent tokens that they keep in any case and by top-p.

    sparsec compile demo --passes rtpurbo --calibration texts/train -o out/split
    python benchmarks/recent_tokens.py out/split

Writes benchmarks/results/recent-tokens-demo.json. The prompt is read once; then the same decode rows run with retrieval
heads dense (the split alone, which no selector can better) and with selectors, each against the dense model: KL of next
tokens and other first choices. Text of the split that selectors are measured on, seen by no fit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from decode_rows import parser, run, shown
from torch import Tensor

from sparsec.calibrate.evaluate import baseline_plan
from sparsec.calibrate.selector_stats import SelectorStats
from sparsec.calibrate.teacher import divergence
from sparsec.plugins.runtime import added_tensors, install, new_cache, rows_as, stepping, uninstall
from sparsec.plugins.step import Step


@torch.no_grad()
def measure(settings: list[dict[str, float]], model: Any, tokens: Tensor, rows: int) -> list[dict[str, Any]]:
    """A row a setting of the selector, of the last decode rows of windows. tokens: [windows, length]."""
    ids, length, plan, tensors = tokens.to(model.device), tokens.shape[1], model.sparsec_plan, added_tensors(model)
    uninstall(model)
    true = torch.cat([model(input_ids=window[None], logits_to_keep=rows).logits for window in ids])
    install(model, plan, tensors)
    cache, prompt = new_cache(model, "reference"), length - rows
    with rows_as("prefill"):
        model.get_decoder()(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)

    def against_dense(observe: SelectorStats | None = None) -> dict[str, float]:
        with stepping(Step(decode=True, commit=False, observe=observe)):
            found = model(input_ids=ids[:, prompt:], past_key_values=cache, use_cache=True).logits
        other = (true.argmax(-1) != found.argmax(-1)).double().mean()
        return {"kl": float(divergence(true, found).double().mean()), "other": float(other)}

    split = baseline_plan("split", plan)
    assert split is not None
    install(model, split, {})
    found = [{"context": length, "recent": None, "top_p": None, **against_dense()}]
    for setting in settings:
        install(model, plan.edit(selector={**plan.selector.model_dump(), **setting}), tensors)
        stats = SelectorStats()
        cost = against_dense(stats)
        found.append(shown(stats, context=length, **setting, **cost))
    install(model, plan, tensors)
    return found


def main() -> None:
    """Measure each setting, write what was found."""
    about = "What selectors cost in decode rows, by the recent tokens that they keep and by top-p."
    options = parser(about, "recent-tokens-demo.json", contexts="2048,4096,8000", rows=256)
    options.add_argument("--windows", type=int, default=4)
    asked = options.parse_args()
    settings = [{"recent": recent, "top_p": 0.9} for recent in (64, 128, 256, 512)]
    settings += [{"recent": 64, "top_p": p} for p in (0.95, 0.99)]
    run(asked, partial(measure, settings), windows=asked.windows)


if __name__ == "__main__":
    main()
