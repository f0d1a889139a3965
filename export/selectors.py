"""The report's section on selectors: the mass they find with and without sinks, tokens against blocks, and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsec.export import svg
from sparsec.export.page import figure, folded, heading, paragraph, section, table
from sparsec.export.words import count, percent, plural, size

KINDS = {
    "full": "KV heads that keep every token",
    "local": "evicted KV heads",
    "index": "index keys",
    "sums": "sums of dropped tokens",
}


def selectors(split: Mapping[str, Any], least: float) -> str:
    """What each head's selector finds. split: what rtpurbo measured; least: the mean recall that the gate asks for."""
    selector = split["selector"]
    heads, summary = selector["heads"], selector["summary"]
    if not heads:
        return ""
    points = [(h["kept_mean"], h["recall_mean"], f"layer {h['layer']} head {h['head']}") for h in heads]
    label = f"Tokens kept against mass recall of {len(heads)} heads; mean recall {percent(summary['recall_mean'])}"
    return section(
        "selectors",
        "What the selectors find",
        paragraph(
            "In decode a retrieval head reads only the tokens that its indexer selects. They hold "
            f"{percent(summary['recall_mean'])} of the head's true attention mass on average, in "
            f"{count(summary['kept_mean'])} of {count(summary['context_mean'])} tokens. Here each head has its own "
            "set, before any sharing."
        ),
        figure(
            svg.scatter(points, least, label, "tokens kept, mean"),
            "Each dot is a head: mean tokens kept, forced ones included, and mean share of true attention mass in "
            f"them. {plural(summary['rows'], 'decode row')} of text that no training saw.",
            [("warn", f"the mean that the gate asks for ({percent(least)})")],
        ),
        heading("Without what is kept in any case"),
        _recall(summary),
        heading("Tokens, blocks, and a perfect indexer"),
        _choices(summary),
        heading("By context"),
        _contexts(selector["contexts"]),
        heading("Bytes that a decode step reads in layers with an index"),
        *_reads(selector),
        heading(f"Cache of {count(selector['context'])} tokens"),
        _resident(selector["resident"]),
        folded(f"All {len(heads)} heads as a table", _head_table(heads, summary)),
    )


def _head_table(heads: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    return table(*head_rows(heads, summary), words=0) + paragraph(
        "Recall is the true attention mass found: of all tokens, without sinks, and without any forced token (chosen); "
        f"p5: 5% of rows find less. Tokens kept: as run, by the same scores as {unit(summary, other=True)}, and by the "
        "true attention (perfect)."
    )


def head_rows(heads: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row a head: for the report and for ``sparsec inspect``."""
    other = unit(summary, other=True)
    top = ["layer", "head", "recall", "p5", "no sinks", "p5", "chosen", "p5", "kept", "p95"]
    top += [f"as {other}", "recall", "perfect", "recall"]
    rows = []
    for h in heads:
        shares = [h[f"{name}_{one}"] for name in ("recall", "sinkless", "far") for one in ("mean", "p5")]
        rows.append(
            [
                *(str(h[name]) for name in ("layer", "head")),
                *map(share, shares),
                *(count(h[f"kept_{one}"]) for one in ("mean", "p95")),
                *(count(h["other_kept_mean"]), share(h["other_recall_mean"])),
                *(count(h["oracle_kept_mean"]), share(h["oracle_recall_mean"])),
            ]
        )
    return top, rows


def unit(summary: Mapping[str, Any], *, other: bool = False) -> str:
    """The granularity that is run, or the other one."""
    return "tokens" if (summary["granularity"] == "token") is not other else f"blocks of {summary['block']}"


def share(value: float | None) -> str:
    """A percentage; a dash where no row had anything to find."""
    return "–" if value is None else percent(value)


def break_even_words(found: Mapping[str, Any] | None) -> str:
    """From which context on a step reads less than one without selectors."""
    if found is None:
        return "no context beyond the dense ones was measured"
    tokens = count(found["tokens"])
    return {
        "about": f"about {tokens} tokens",
        "at most": f"{tokens} tokens at most, the shortest context measured",
        "above": f"above {tokens} tokens, the longest context measured",
    }[found["bound"]]


def _recall(summary: Mapping[str, Any]) -> str:
    rows = [
        [name, share(summary[f"{key}_mean"]), share(summary[f"{key}_p5"])]
        for name, key in (
            ("all tokens", "recall"),
            ("without sinks", "sinkless"),
            ("without sinks and recent tokens: what was chosen", "far"),
        )
    ]
    return table(["true attention mass found", "mean", "5% of rows find less than"], rows) + paragraph(
        "Sinks and recent tokens are kept whatever is selected. Left out, they are left out of the whole as well: "
        f"{share(summary['far_mass_mean'])} of the mass lies on other tokens."
    )


def _choices(summary: Mapping[str, Any]) -> str:
    run = unit(summary)
    rows = [
        [name, count(summary[f"{kept}_mean"]), count(summary[f"{kept}_p95"]), share(summary[f"{recall}_mean"])]
        for name, kept, recall in (
            (f"{run}, as it is run", "kept", "recall"),
            (f"{unit(summary, other=True)}, by the same scores", "other_kept", "other_recall"),
            (f"{run}, by the true attention", "oracle_kept", "oracle_recall"),
        )
    ]
    return table(["chosen", "tokens kept, mean", "tokens kept, p95", "recall, mean"], rows) + paragraph(
        f"All keep the {count(summary['forced'])} forced tokens and follow the same rule. The last two are taken on "
        f"{plural(summary['sampled_rows'], 'row')} spread evenly over the {count(summary['rows'])}."
    )


def _contexts(found: Sequence[Mapping[str, Any]]) -> str:
    top = [
        "context",
        "recall, mean",
        "5% of rows",
        "chosen, mean",
        "kept, mean",
        "kept, p95",
        "perfect keeps",
        "recall",
    ]
    rows = [
        [
            count(one["context"]),
            *map(share, (one["recall_mean"], one["recall_p5"], one["far_mean"])),
            *(count(one[name]) for name in ("kept_mean", "kept_p95", "oracle_kept_mean")),
            share(one["oracle_recall_mean"]),
        ]
        for one in found
    ]
    return table(top, rows, words=0)


def _reads(selector: Mapping[str, Any]) -> list[str]:
    reads = sorted(selector["reads"], key=lambda read: float(read["context"]))
    rows = [
        [
            count(read["context"]),
            *map(size, (read["index"], read["kept"], read["index"] + read["kept"], read["dense"])),
            percent((read["index"] + read["kept"]) / read["dense"]),
        ]
        for read in reads
    ]
    top = ["context, mean", "index keys", "kept keys and values", "together", "dense", "of dense"]
    words = (
        f"Break-even: {break_even_words(selector['break_even'])}. These are bytes, not time. A KV head is read once "
        "for its query heads: dense all of it, else the union of what they keep, local heads beside them included."
    )
    return [table(top, rows, words=0) if rows else "", paragraph(words)]


def _resident(held: Mapping[str, int]) -> str:
    whole = sum(held[kind] for kind in KINDS)
    rows = [[name, size(held[kind]), percent(held[kind] / held["dense"])] for kind, name in KINDS.items() if held[kind]]
    rows += [["together", size(whole), percent(whole / held["dense"])], ["dense", size(held["dense"]), percent(1.0)]]
    return table(["", "resident", "of dense"], rows)
