"""The report: one HTML page that shows what was kept, what was measured and what to beware of.

It loads nothing, carries no time and is the same for the same input, byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sparsec.errors import ArtifactError
from sparsec.export import svg
from sparsec.export.cautions import cautions
from sparsec.export.choices import TITLES, choices
from sparsec.export.measured import detection, stage1
from sparsec.export.needles import needles
from sparsec.export.page import (
    caution,
    facts,
    figure,
    folded,
    heading,
    link,
    page,
    paragraph,
    preformatted,
    readings_grid,
    section,
    table,
    title,
    verdict,
)
from sparsec.export.patterns import sharing
from sparsec.export.repeated import chosen_prefill, repeats
from sparsec.export.routing import routing
from sparsec.export.selectors import selectors
from sparsec.export.speed import speed
from sparsec.export.tokens import tokens
from sparsec.export.training import pass_costs, training
from sparsec.export.words import (
    change,
    commands,
    configured,
    count,
    far_words,
    gate_words,
    measured,
    model_name,
    plural,
    readings,
    runs,
    runs_on,
    verdict_words,
)
from sparsec.plan import Plan

SPLIT_NAMES = {"heldout": "held-out"}


def render_report(
    plan: Plan,
    measurements: Mapping[str, Any],
    manifest: Mapping[str, Any],
    *,
    evaluated: Mapping[str, Any] | None = None,
    timed: Mapping[str, Any] | None = None,
) -> str:
    """The page, as text.

    Args:
        plan: what runs.
        measurements: the content of measurements.json; a pass that did not run has no section.
        manifest: the content of manifest.json; its list of files is not needed.
        evaluated: of ``sparsec eval``, of a plan with the same digest; a compile has none.
        timed: of ``sparsec bench``, as well.
    """
    split, search = measured(measurements, "rtpurbo"), measured(measurements, "indexcache")
    warnings = cautions(plan, measurements)
    razor = measured(measurements, "razor")
    body = [_headline(plan, measurements, manifest, len(warnings)), _heads(plan, split or razor)]
    if razor is not None:
        body.append(repeats(razor))
    if split is not None:
        body += [detection(split), stage1(split), selectors(split, measurements["gate"]["allowed"]["min_recall"])]
        if "prefill" in split:
            body.append(chosen_prefill(split["prefill"]))
    if search is not None:
        body.append(sharing(search, configured(measurements, "indexcache")["max_loss"]))
    for name in TITLES:
        cheaper = measured(measurements, name)
        if cheaper is not None:
            body.append(choices(name, cheaper))
    merged = measured(measurements, "dynamic-tokenization")
    if merged is not None:
        body.append(tokens(merged))
    distilled = measured(measurements, "distill")
    if distilled is not None:
        body.append(training(distilled))
    routed = measured(measurements, "informed-routing")
    if routed is not None:
        body.append(routing(routed))
    body.append(speed(split, timed))
    if evaluated is not None:
        body.append(needles(evaluated, evaluated_name(plan, evaluated)))
    body.append(pass_costs(measurements))
    body += [_text(measurements), _recipe(manifest), _warnings(warnings), _foot(plan, manifest)]
    return page(f"{model_name(manifest)}: sparsec report", body)


def evaluated_name(plan: Plan, evaluated: Mapping[str, Any]) -> str:
    """What ``sparsec eval`` calls this plan's artifact.

    Raises:
        ArtifactError: it evaluated others.
    """
    for name, each in evaluated.get("artifacts", {}).items():
        if each["plan"] == plan.digest:
            return str(name)
    raise ArtifactError("the evaluation is of another plan: run sparsec eval on this artifact")


def _headline(plan: Plan, measurements: Mapping[str, Any], manifest: Mapping[str, Any], warnings: int) -> str:
    shape, gate, source = plan.model, measurements["gate"], manifest["source"]
    named = source["spec"] + (f" at {source['revision']}" if source["revision"] else "")
    passes = ", ".join(each["name"] for each in measurements["passes"]) or "none"
    parts = [
        paragraph("sparsec report", "kicker"),
        title(model_name(manifest)),
        paragraph(
            f"Source {named}: {shape.model_type}, {shape.layers} layers, {shape.heads} query heads on {shape.kv_heads} "
            f"KV heads of {shape.head_dim} dimensions. Passes: {passes}.",
            "quiet",
        ),
        verdict(gate["passed"], "Gate passed" if gate["passed"] else "Gate failed", verdict_words(gate)),
        readings_grid(readings(plan, gate)),
        paragraph(
            f"Percentages with a sign are relative to the dense model. Read from {gate_words(gate)}. The KV cache is "
            "that at the end of the longest window, index keys included.",
            "quiet after",
        ),
        link("warnings", f"{plural(warnings, 'warning')}, at the end of this page") if warnings else "",
    ]
    return f"<header>{''.join(parts)}</header>"


def _heads(plan: Plan, split: Mapping[str, Any] | None) -> str:
    if plan.is_dense:
        return ""
    if plan.dsa is not None:
        return section("heads", "What runs", facts(runs(plan)))
    scores = split["head_scores"] if split is not None else None
    keys = [("kept", "retrieval head"), ("local", "local head"), ("plate", "KV head that keeps every token")]
    keys += [("full", "F: own indexer")] * ("F" in plan.pattern) + [("shared", "S: shared")] * ("S" in plan.pattern)
    if any(layer.heads is None for layer in plan.layers):
        keys.append(("native", "as the model made it"))
    caption = "Each column is a layer, each cell a query head; heads that read the same KV head stand together."
    if scores is not None:
        caption += " The stronger the colour, the higher the detection score (on a square-root scale)."
    top = ["layer", "retrieval heads", "index"] + ["highest score"] * (scores is not None)
    rows = []
    for i, layer in enumerate(plan.layers):
        which = "as the model made it" if layer.heads is None else ", ".join(map(str, layer.retrieval)) or "–"
        index = f"shared with {plan.index_source(i)}" if layer.index == "shared" else layer.index
        rows.append([str(i), which, index] + ([f"{max(scores[i]):.3f}"] if scores is not None else []))
    return section(
        "heads",
        "What runs",
        figure(svg.head_map(plan, scores), caption, keys),
        folded("The head map as a table", table(top, rows, words=3)),
        facts(runs(plan)),
    )


def _text(measurements: Mapping[str, Any]) -> str:
    text, gate = measurements["calibration"], measurements["gate"]
    split, search, trained = (measured(measurements, name) for name in ("rtpurbo", "indexcache", "distill"))
    parts = [
        [_split_name(name), *(count(text[what][name]) for what in ("documents", "tokens", "longest_document"))]
        for name in text["documents"]
    ]
    used: list[Sequence[str]] = []
    if split is not None:
        length, fit, seen = count(split["context"]), split["stage1"], split["selector"]["contexts"]
        used += [
            ["heads", "train", f"{plural(split['needles'], 'needle')} in contexts of {length} tokens"],
            [
                "indexers",
                "train",
                f"{_windows(fit['windows'], split['context'], fit['rows'])}; positions up to {count(split['reach'])}",
            ],
        ]
        if seen:
            lengths = ", ".join(count(one["context"]) for one in seen)
            used.append(["selectors", "search", f"the last quarter, at most 512 rows, of contexts of {lengths} tokens"])
        if "gates" in split:
            windows, gates = 2 * split["gates"]["steps"], split["gates"]
            used.insert(
                1, ["gates of heads", "train", f"{plural(windows, 'window')} of {count(gates['context'])} tokens"]
            )
        if "prefill" in split:
            chosen = split["prefill"]
            used.append(["chosen prefill", "search", _windows(chosen["windows"], chosen["context"], chosen["rows"])])
    if search is not None:
        used.append(["sharing", "search", _windows(search["windows"], search["context"], search["rows"])])
    if trained is not None:
        used.append(["weights", "train", _windows(trained["windows"], trained["context"], trained["rows"])])
        used.append(["which weights", "search", f"{plural(len(trained['checks']), 'check')} on windows as long"])
    used.append(["gate", _split_name("heldout"), _windows(gate["windows"], gate["context"], gate["decode_rows"])])
    return section(
        "text",
        "What it was measured on",
        paragraph(
            f"Text: {text['spec']} ({text['made_of']}), split once; no document is in two splits. Seed "
            f"{measurements['seed']}."
        ),
        table(["split", "documents", "tokens", "longest document"], parts),
        *map(paragraph, _text_notes(text)),
        heading("Which split was used for what"),
        table(["measured", "split", "on"], used, words=3),
        heading("Gate: bits per byte"),
        _gate_table(gate),
        *map(paragraph, far_words(gate)),
        paragraph(f"Digest of the split text: {text['digest']}", "quiet"),
    )


def _text_notes(text: Mapping[str, Any]) -> list[str]:
    near, notes = text["near_duplicates"], []
    if near["groups"]:
        notes.append(
            f"{plural(near['documents'], 'document')} in {plural(near['groups'], 'group')} repeat each other's text; a "
            f"group stays in one split. The largest group: {', '.join(near['largest'])}."
        )
    if text["cut"]:
        notes.append(f"{text['cut_document']} was cut into three parts, one for each split.")
    if text["dropped_near_duplicates"]:
        notes.append(f"{plural(text['dropped_near_duplicates'], 'near-duplicate')} of it dropped.")
    return notes


def _split_name(name: str) -> str:
    return SPLIT_NAMES.get(name, name)


def _windows(windows: int, length: int, rows: int) -> str:
    return f"{plural(windows, 'window')} of {count(length)} tokens, {count(rows)} rows of each"


def _gate_table(gate: Mapping[str, Any]) -> str:
    dense, found = gate["dense"], gate["artifact"]
    pairs = [*zip(dense["windows"], found["windows"], strict=True), (dense["bits_per_byte"], found["bits_per_byte"])]
    names = [*(f"window {number}" for number in range(1, len(pairs))), "all"]
    rows = [[name, f"{d:.4f}", f"{a:.4f}", change(a / d - 1)] for name, (d, a) in zip(names, pairs, strict=True)]
    return table(["", "dense", "artifact", "against dense"], rows)


def _recipe(manifest: Mapping[str, Any]) -> str:
    return section(
        "recipe",
        "How to make it again",
        paragraph("Inside the artifact's folder; paths are as they were given then:"),
        preformatted(commands(manifest)),
        paragraph("The recipe, every option spelled out:"),
        preformatted(yaml.safe_dump(manifest["recipe"], sort_keys=False, allow_unicode=True)),
    )


def _warnings(warnings: Sequence[str]) -> str:
    parts = [caution(text) for text in warnings] or [paragraph("No check raised one.")]
    return section("warnings", "Warnings", *parts)


def _foot(plan: Plan, manifest: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    words = f"{runs_on(plan)} Contexts longer than those measured are not shown."
    made = f"Plan {plan.digest[:16]}. {versions}; device {manifest['device']}, dtype {manifest['dtype']}."
    return f"<footer>{paragraph(words)}{paragraph(made)}</footer>"
