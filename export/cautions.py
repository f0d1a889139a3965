"""What a reader should beware of, found in the measurements: plain sentences, none where all is well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from sparsec.export.words import change, configured, count, evicted, measured, percent, plural
from sparsec.plan import Plan

PAPER_WINDOW = 8192  # tokens, RTPurbo
LEAST_RECALL = 0.9
LEAST_HEAD_RECALL = 0.7
LEAST_JACCARD = 0.6
LEAST_COPYING = 0.3  # of the dense model, for the causal check to say anything


def cautions(plan: Plan, measurements: Mapping[str, Any]) -> list[str]:
    """All warnings, the weightiest first."""
    found = _gate(plan, measurements["gate"])
    split, search = measured(measurements, "rtpurbo"), measured(measurements, "indexcache")
    if split is not None:
        found += _split(plan, split, configured(measurements, "rtpurbo"), measurements["gate"])
    razor = measured(measurements, "razor")
    if razor is not None:
        found += _repeats(razor, configured(measurements, "razor"), measurements["gate"])
    if search is not None:
        found += _search(search)
    trained = measured(measurements, "distill")
    if trained is not None:
        found += _trained(trained)
    return found + _text(measurements["calibration"])


def check_shown(check: Mapping[str, Any]) -> bool:
    """Do the kept heads carry the copying: it breaks without them, and not without as many others?"""
    kept, random = check["kept_heads_local"], check["random_heads_local"]
    return bool(check["dense"] >= LEAST_COPYING and random >= check["dense"] / 2 and kept <= random / 2)


def noise(search: Mapping[str, Any]) -> float:
    """The largest share by which sharing one more index *lowered* the loss.

    Dropping an indexer cannot really help, so effects of that size are chance on these windows.
    """
    before, largest = search["loss_before"], 0.0
    for flip in search["flips"]:
        largest = max(largest, *(before - loss for loss in flip["trials"].values()))
        before = flip["loss"]
    return largest / float(search["loss_before"])


def _gate(plan: Plan, gate: Mapping[str, Any]) -> list[str]:
    found = []
    if not gate["passed"]:
        found.append(f"The gate failed: {'; '.join(gate['failures'])}. Do not deploy this artifact.")
    if gate["selector"] and gate["selector"]["recall_mean"] < LEAST_RECALL:
        found.append(
            f"The selectors find {percent(gate['selector']['recall_mean'])} of the true attention mass, less than "
            f"{percent(LEAST_RECALL, 0)}: look at the heads with the lowest recall."
        )
    if plan.window is not None and gate["context"] < 2 * plan.window.size:
        found.append(
            f"The gate's contexts of {count(gate['context'])} tokens are shorter than two windows of "
            f"{count(plan.window.size)}: far context hardly played a part in its verdict."
        )
    elif gate["context"] <= plan.min_context:
        found.append(
            f"The gate's contexts are dense throughout (up to {count(plan.min_context)} tokens): it tested nothing."
        )
    if gate["windows"] == 1:
        found.append(
            f"The gate read one held-out window ({plural(gate['artifact']['tokens'], 'scored token')}): how much its "
            "figures vary from text to text was not measured."
        )
    if gate["loss"] < 0:
        found.append(
            f"Bits per byte are lower than dense ({change(gate['loss'])}): that is chance, a gain is not claimed."
        )
    if gate["artifact"]["kv_bytes"] >= gate["dense"]["kv_bytes"]:
        found.append("The KV cache is not smaller than dense: index keys take as much as the evicted KV heads free.")
    if plan.window is not None and not evicted(plan):
        found.append(
            "No KV head is evicted, since every one has a retrieval head among its query heads: "
            "granularity kv_head of the pass that split them keeps and windows whole groups."
        )
    return found


def _split(plan: Plan, split: Mapping[str, Any], config: Mapping[str, Any], gate: Mapping[str, Any]) -> list[str]:
    found = []
    check, jaccard, stage1 = split["causal_check"], split["rank_stability"]["jaccard"], split["stage1"]
    if check["dense"] < LEAST_COPYING:
        found.append(
            f"The dense model itself copies only {percent(check['dense'])} of the needle tokens: "
            "on this model the needles say little about which heads retrieve."
        )
    elif not check_shown(check):
        found.append(
            f"The causal check does not show that the kept heads do the retrieving: needles are copied at "
            f"{percent(check['kept_heads_local'])} without them, at {percent(check['random_heads_local'])} without as "
            "many random others."
        )
    if jaccard < LEAST_JACCARD and not {"gates", "given"} & set(split):  # there needles did not choose
        found.append(
            f"Two halves of the needle documents agree on only {percent(jaccard, 0)} of the heads that either would "
            "keep: more documents or needles would make the choice firmer."
        )
    weak = [head for head in split["selector"]["heads"] if head["recall_mean"] < LEAST_HEAD_RECALL]
    if weak:
        worst = min(weak, key=lambda head: (head["recall_mean"], head["layer"], head["head"]))
        found.append(
            f"Heads whose selectors on average find less than {percent(LEAST_HEAD_RECALL, 0)} of the attention mass: "
            f"{len(weak)} of {len(split['selector']['heads'])}; the worst (layer {worst['layer']}, head "
            f"{worst['head']}) finds {percent(worst['recall_mean'])}."
        )
    elif not split["selector"]["heads"]:
        found.append("The selectors were not measured: the calibration windows are dense throughout.")
    broken = [step for step, loss in enumerate(stage1["losses"], start=1) if not math.isfinite(loss)]
    if broken:
        found.append(
            f"The loss of the indexers was no number from step {broken[0]} on: the weights from before it are used; "
            "train with a lower learning rate."
        )
    if stage1["losses"] and stage1["kl_trained"] >= stage1["kl_closed_form"]:
        found.append("Training did not improve the indexers over their closed form: try another learning rate.")
    seen = split["selector"]["contexts"]
    if seen and seen[-1]["context"] < split["readable"]:
        found.append(
            f"The model reads {count(split['readable'])} tokens; the selectors were measured on no more than "
            f"{count(seen[-1]['context'])}: longer calibration text would show the rest."
        )
    if split["window"] < PAPER_WINDOW:
        why = (
            f"scaled down because the model reads {count(split['readable'])} tokens"
            if config["window"] is None
            else "as the recipe says"
        )
        found.append(f"Windows are {count(split['window'])} tokens, not the paper's {count(PAPER_WINDOW)}: {why}.")
    if gate["context"] < split["readable"]:
        found.append(
            f"The model reads {count(split['readable'])} tokens; nothing beyond {count(gate['context'])} "
            "was judged by the gate."
        )
    return found


def _repeats(razor: Mapping[str, Any], config: Mapping[str, Any], gate: Mapping[str, Any]) -> list[str]:
    found, check = [], razor["causal_check"]
    if check["dense"] < LEAST_COPYING:
        found.append(
            f"The dense model itself continues only {percent(check['dense'])} of the repeated tokens: "
            "on this model they say little about which heads retrieve."
        )
    elif not check_shown(check):
        found.append(
            f"The causal check does not show that the kept heads do the copying: repeated tokens are continued at "
            f"{percent(check['kept_heads_local'])} without them, at {percent(check['random_heads_local'])} without as "
            "many random others."
        )
    for name in ("induction", "echo"):
        agree = razor[name]["rank_stability"]["jaccard"] if razor[name]["kept"] else 1.0
        if agree < LEAST_JACCARD:
            found.append(
                f"Two halves of the random sequences agree on only {percent(agree, 0)} of the {name} heads that either "
                "would keep: more draws would make the choice firmer."
            )
    if config["window"] is None:
        found.append(
            f"Windows are {count(razor['window'])} tokens, scaled to the {count(razor['readable'])} that the model "
            "reads; the paper's grow with the context."
        )
    if gate["context"] < razor["readable"]:
        found.append(
            f"The model reads {count(razor['readable'])} tokens; nothing beyond {count(gate['context'])} was judged by "
            "the gate."
        )
    return found


def _search(search: Mapping[str, Any]) -> list[str]:
    found, chance = [], noise(search)
    losses = [search["loss_before"], *(flip["loss"] for flip in search["flips"])]
    steps = [after - before for before, after in pairwise(losses)]
    within = sum(abs(step) <= chance * search["loss_before"] for step in steps)
    if within:
        found.append(
            f"{within} of {plural(len(steps), 'flip')} changed the loss by no more than {percent(chance, 2)}, the size "
            "by which some candidate lowered it by chance: their order is within the noise of the search text."
        )
    if search["loss_after"] < search["loss_before"]:
        fall = change(search["loss_after"] / search["loss_before"] - 1)
        found.append(f"Sharing lowered the loss ({fall}) on the text that chose the pattern: a gain is not claimed.")
    if search["stopped"] == "budget":
        found.append("The search for a sharing pattern ended at its loss budget, before the target was reached.")
    if search["stopped"] == "unclear":
        found.append("The search for a sharing pattern ended early: the best two flips could not be told apart.")
    return found


def _trained(run: Mapping[str, Any]) -> list[str]:
    found = []
    if run["best_step"]:
        found.append(
            "The weights were trained under the plan. Opened densely, by stock Transformers or --dense, this is not "
            "the base model: compare with the source."
        )
    else:
        found.append("Training the weights improved nothing on held-out text: they are the dense model's, unchanged.")
    if run["diverged"]:
        found.append(
            f"Training ended at step {count(len(run['losses']))}, where the loss was no number: use a lower rate."
        )
    if run["best_step"] and run["best_step"] == run["checks"][-1]["step"]:
        found.append("The held-out divergence was still falling at the last step: more steps would help.")
    return found


def _text(calibration: Mapping[str, Any]) -> list[str]:
    found = []
    if calibration["spec"] == "builtin":
        found.append(
            "Calibration text is Python's own documentation: for other domains give your own text with --calibration."
        )
    if calibration["cut"]:
        found.append(
            "Training, search and held-out text are parts of one document, so held-out text is not far from it."
        )
    return found
