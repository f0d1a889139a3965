"""The report's sections on what the passes measured: detection, indexers, sharing; selectors.py has theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.export import svg
from sparsec.export.cautions import check_shown, noise
from sparsec.export.page import caution, facts, figure, folded, heading, paragraph, section, table
from sparsec.export.words import change, count, percent, plural


def detection(split: Mapping[str, Any]) -> str:
    """How the retrieval heads were found, and whether it is they that retrieve. split: what rtpurbo measured."""
    check, stable = split["causal_check"], split["rank_stability"]
    dense, kept, random = (check[name] for name in ("dense", "kept_heads_local", "random_heads_local"))
    said = (
        f"With the {count(check['heads'])} kept heads cut down to a window, {percent(kept, 0)} of the needle tokens "
        f"are still copied; with as many random other heads cut down, {percent(random, 0)}."
    )
    if check_shown(check):
        said = paragraph(f"{said} So it is the kept heads that carry the copying.")
    else:
        said = caution(f"{said} This does not show that the kept heads carry the copying: do not rely on the split.")
    rows = [
        ("dense model", dense, "other"),
        ("kept heads local", kept, "full"),
        ("random heads local", random, "other"),
    ]
    label = "Needle tokens copied: " + ", ".join(f"{name} {percent(share)}" for name, share, _ in rows)
    return section(
        "detection",
        "How the heads were found",
        paragraph(
            "A needle is a run of random words that stands in a text twice, further apart than the window. A head's "
            "score is the share of its attention that goes from the later copy to the earlier one; the best heads are "
            "kept."
        ),
        facts(
            [
                ("needles", f"{count(split['needles'])}, in contexts of {count(split['context'])} tokens"),
                ("rank correlation", f"{stable['spearman']:.2f} (Spearman) between two halves of the documents"),
                ("same heads kept", f"{percent(stable['jaccard'], 0)} of those that either half would keep (Jaccard)"),
            ]
        ),
        heading("Causal check: share of needle tokens copied"),
        figure(
            svg.bars(rows, label), f"{plural(check['tokens'], 'needle token')}, window {count(split['window'])} tokens."
        ),
        said,
    )


def stage1(split: Mapping[str, Any]) -> str:
    """The fit of the indexers: closed form, then training. split: what rtpurbo measured."""
    fit = split["stage1"]
    before, after, losses = fit["kl_closed_form"], fit["kl_trained"], fit["losses"]
    words = (
        "The indexer of a head is fitted to the head's true attention on training text; the model's own weights do not "
        f"change. The closed form leaves a divergence (KL) of {before:.3f} nats a head"
    )
    if not losses:
        return section("stage1", "Fitting the indexers", paragraph(f"{words}; no training followed."))
    relative = f" ({change(after / before - 1, 0)})" if before else ""
    label = f"Loss over {len(losses)} steps; KL {before:.3f} nats with the closed form, {after:.3f} after training"
    marks = [(f"closed form {before:.3f}", before), (f"trained {after:.3f}", after)]
    return section(
        "stage1",
        "Fitting the indexers",
        paragraph(f"{words}; {plural(len(losses), 'step')} of training bring it to {after:.3f} nats{relative}."),
        figure(
            svg.loss_curve(losses, marks, label),
            "Nats a head. Thin: each step, on the rows drawn for it; thick: smoothed; dotted: before and after, on all "
            f"{count(fit['rows'])} rows of {plural(fit['windows'], 'window')}.",
        ),
    )


def sharing(search: Mapping[str, Any], budget: float | None) -> str:
    """The search for a sharing pattern. search: what indexcache measured; budget: the loss it was allowed."""
    base, flips, layers = search["loss_before"], search["flips"], search["layers"]
    done, plain = search["layer_evaluations"], search["layer_evaluations_plain"]
    less = f" ({change(done / plain - 1, 0)})" if plain else ""
    keys = [("full", "F: own indexer"), ("shared", "S: shared")]
    caption = "The indexed layers by number; the line below shows who reads whose set."
    return section(
        "sharing",
        "Sharing index sets between layers",
        paragraph(
            f"Layers marked S read the index set of the nearest F before them. {len(flips)} of {len(layers)} indexed "
            f"layers were flipped from F to S, each time the one that hurts least: the loss went from {base:.4f} to "
            f"{search['loss_after']:.4f} nats a token ({change(search['loss_after'] / base - 1)})."
        ),
        paragraph(search["pattern"], "mono"),
        figure(svg.sharing(search["pattern"], layers), caption, keys),
        *(_flips(search, budget) if flips else []),
        paragraph(
            f"{plural(search['candidates'], 'candidate')} tried in {count(done)} layer evaluations, where the plain "
            f"search takes {count(plain)}{less}: what lies below a flipped layer is reused, with the same result."
        ),
    )


def _flips(search: Mapping[str, Any], budget: float | None) -> list[str]:
    base, chance = search["loss_before"], noise(search)
    steps = [(flip["layer"], flip["loss"] / base - 1) for flip in search["flips"]]
    trials = sorted((int(layer), loss / base - 1) for layer, loss in search["flips"][0]["trials"].items())
    full = {layer for layer, letter in zip(search["layers"], search["pattern"], strict=True) if letter == "F"}
    rows, before = [], 0.0
    for number, (layer, loss) in enumerate(steps, start=1):
        rows.append([str(number), str(layer), change(loss, 3), change(loss - before, 3)])
        before = loss
    keys = [("band", f"chance: some candidate lowered the loss by up to {percent(chance, 3)}")] if chance else []
    if budget is not None:
        keys.append(("warn", f"budget ({change(budget)})"))
    label = f"Loss after each of {plural(len(steps), 'flip')}, relative to none; at the end {change(steps[-1][1])}"
    return [
        heading("Loss after each flip, against no sharing"),
        figure(
            svg.flips(steps, chance, budget, label),
            "From left to right, the layers in the order in which they were flipped. The candidate with the lowest "
            "loss is chosen on the text that it is measured on, so the curve is a little too good.",
            keys,
        ),
        folded("The flips as a table", table(["flip", "layer", "loss", "by this flip"], rows, words=0)),
        heading("Sensitivity: the loss when one layer alone is shared"),
        figure(
            svg.sensitivity(dict(trials), full, f"Loss when one layer is shared, {len(trials)} layers, first round"),
            "The candidates of the first round.",
            [("full", "kept its indexer"), ("shared", "ended up shared")],
        ),
    ]
