"""The report's section on index sets shared between layers: the search, other patterns, overlap, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsec.export import svg
from sparsec.export.cautions import noise
from sparsec.export.page import figure, folded, heading, paragraph, section, table
from sparsec.export.words import change, count, percent, plural


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
            f"Layers marked S read the index set of the nearest F before them. {_found(search)}: the loss went from "
            f"{base:.4f} to {search['loss_after']:.4f} nats a token ({change(search['loss_after'] / base - 1)})."
        ),
        paragraph(search["pattern"], "mono"),
        figure(svg.sharing(search["pattern"], layers), caption, keys),
        *(_flips(search, budget) if flips else []),
        paragraph(
            f"{plural(search['candidates'], 'candidate')} tried in {count(done)} layer evaluations, where the plain "
            f"search takes {count(plain)}{less}; in tokens through a layer {count(search['layer_tokens'])} of "
            f"{count(search['layer_tokens_plain'])}. {_how(search)}"
        ),
        *(_others(search) if search["others"] else []),
        *(_overlap(search) if search["overlap"] else []),
        *(_served(search["trained"]) if "trained" in search else []),
    )


def _found(search: Mapping[str, Any]) -> str:
    """How the pattern came about."""
    if search["stopped"] == "given":
        return "This pattern was given, nothing was searched"
    flips, layers = search["flips"], search["layers"]
    return f"{len(flips)} of {len(layers)} indexed layers were flipped from F to S, each time the one that hurts least"


def _served(fit: Mapping[str, Any]) -> list[str]:
    before, after, losses = fit["kl_before"], fit["kl_trained"], fit["losses"]
    relative = f" ({change(after / before - 1, 0)})" if before else ""
    own = fit.get("own", False)  # a model's own indexers have one distribution a layer
    one = "layer" if own else "head"
    marks = [(f"as fitted for one layer {before:.3f}", before), (f"trained for all {after:.3f}", after)]
    label = f"Loss over {len(losses)} steps; KL {before:.3f} nats before, {after:.3f} after training"
    rows = [[full, ", ".join(map(str, layers)) or "–"] for full, layers in fit["serves"].items()]
    return [
        heading("Training the kept indexers for all layers that read them"),
        paragraph(
            "An indexer fitted to its own layer finds less for others. After the search each kept one was trained on "
            f"the true attention of every {one} that it serves: {before:.3f} nats a {one} before, {after:.3f} "
            f"after{relative}, over {plural(len(losses), 'step')}."
        ),
        figure(
            svg.loss_curve(losses, marks, label),
            f"Nats a {one}, over all {one}s served. {plural(fit['windows'], 'text window')}"
            f"{'' if own else ' and as many needle documents'}, {count(fit['rows'])} rows of each.",
        ),
        folded("Who serves whom", table(["layer with an indexer", "serves also"], rows, words=2)),
    ]


def _how(search: Mapping[str, Any]) -> str:
    if search["order"] == "lazy":
        return "Only candidates that were best before were tried again: the pattern may differ from the full search's."
    return "The prompt and what lies below a flipped layer are reused, with the same result."


def _others(search: Mapping[str, Any]) -> list[str]:
    names = {
        "one-shot": "one round: the layers that hurt least alone",
        "uniform": "uniform",
        "overlap": "the layers whose sets overlap most",
    }
    rows = [["searched", search["pattern"], f"{search['loss_after']:.4f}", ""]]
    rows += [
        [names[name], found["pattern"], f"{found['loss']:.4f}", f"{found['above']:+.4f} ± {found['error']:.4f}"]
        for name, found in search["others"].items()
    ]
    clear = [found["above"] > 2 * found["error"] for found in search["others"].values()]
    said = (
        "The searched pattern is better than each by more than two standard errors"
        if all(clear)
        else "The searched pattern is not better than all of them by two standard errors: more search text is needed "
        "to tell them apart"
    )
    return [
        heading("Other patterns with as many indexers"),
        table(["pattern", "", "loss, nats a token", "above the searched one"], rows, words=2),
        paragraph(
            f"{said}. Paired over the rows of the text that the search chose on, which favours the searched one, and "
            "before any training of the kept indexers."
        ),
    ]


def _overlap(search: Mapping[str, Any]) -> list[str]:
    layers, shares = search["layers"], search["overlap"]
    near = [shares[i][i - 1] for i in range(1, len(layers))]
    rows = [[str(layer), *(f"{share:.2f}" for share in row)] for layer, row in zip(layers, shares, strict=True)]
    return [
        heading("How much the layers' own sets overlap"),
        figure(
            svg.heat(shares, layers, f"Overlap of index sets, {len(layers)} layers; neighbours {_range(near)}"),
            "Mean intersection over union of two layers' sets before any sharing, without the tokens that are kept in "
            "any case. What overlaps most is not what can best be shared: few missed tokens may decide.",
        ),
        folded("The overlaps as a table", table(["layer", *map(str, layers)], rows, words=0)),
    ]


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "none"


def _flips(search: Mapping[str, Any], budget: float | None) -> list[str]:
    base, chance = search["loss_before"], noise(search)
    steps = [(flip["layer"], flip["loss"] / base - 1) for flip in search["flips"]]
    trials = sorted((int(layer), loss / base - 1) for layer, loss in search["flips"][0]["trials"].items())
    full = {layer for layer, letter in zip(search["layers"], search["pattern"], strict=True) if letter == "F"}
    rows, before = [], 0.0
    for number, ((layer, loss), flip) in enumerate(zip(steps, search["flips"], strict=True), start=1):
        margin = f"{flip['margin']:.4f} ± {flip['error']:.4f}" if "margin" in flip else ""
        rows.append([str(number), str(layer), change(loss, 3), change(loss - before, 3), margin])
        before = loss
    top = ["flip", "layer", "loss", "by this flip", "ahead of the second"]
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
        folded(
            "The flips as a table",
            table(top, rows, words=0),
        ),
        heading("Sensitivity: the loss when one layer alone is shared"),
        figure(
            svg.sensitivity(dict(trials), full, f"Loss when one layer is shared, {len(trials)} layers, first round"),
            "The candidates of the first round.",
            [("full", "kept its indexer"), ("shared", "ended up shared")],
        ),
    ]
