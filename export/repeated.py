"""The report's sections on razor's heads and on prompt rows that choose: what was measured, shown only where it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.export.measured import copying
from sparsec.export.page import facts, folded, heading, paragraph, section, table
from sparsec.export.words import change, count, percent, plural


def repeats(razor: Mapping[str, Any]) -> str:
    """How razor found its heads, and whether it is they that copy. razor: what it measured."""
    check = razor["causal_check"]
    told = [
        ("sequences", f"{count(razor['draws'])}, each {razor['copies']} times {count(razor['period'])} random tokens")
    ]
    rows = []
    for name in ("induction", "echo"):
        scores, chosen = razor[name]["scores"], razor[name]["kept"]
        if not chosen:
            continue
        stable = razor[name]["rank_stability"]
        told.append(
            (
                f"{name} heads",
                f"{count(len(chosen))}; halves of the sequences agree on {percent(stable['jaccard'], 0)} of those that "
                f"either would keep (Jaccard), rank correlation {stable['spearman']:.2f} (Spearman)",
            )
        )
        rows += [[str(layer), str(head), name, f"{scores[layer][head]:.3f}"] for layer, head in chosen]
    return section(
        "detection",
        "How the heads were found",
        paragraph(
            "Random tokens are repeated, copies further apart than the window. A head's echo score is its attention to "
            "the earlier copies of a token, its induction score that to the tokens behind them; the best of both are "
            "kept."
        ),
        facts(told),
        heading("Causal check: share of the last copy's tokens predicted"),
        *copying(
            check,
            "tokens of the last copy",
            f"{plural(check['tokens'], 'token')} of a sequence that no score has seen, window {count(razor['window'])} "
            "tokens.",
        ),
        folded("The kept heads as a table", table(["layer", "head", "kept for", "score"], rows, words=3)),
    )


def chosen_prefill(found: Mapping[str, Any]) -> str:
    """What it costs that prompt rows choose key blocks. found: ``measured["prefill"]`` of rtpurbo."""
    kept = [
        ("key blocks kept", f"{percent(found['block_share'])} of those visible, forced ones included"),
        (
            "attention mass in them",
            f"{percent(found['recall_mean'])} on average, {percent(found['recall_p5'])} or less in 5% of rows",
        ),
    ]
    return section(
        "prefill",
        "What chosen prefill costs",
        paragraph(
            f"Prompt rows of retrieval heads choose blocks of {plural(found['block'], 'key')}, "
            f"{plural(found['query_block'], 'row')} at a time. Here every row is a prompt row, and all else is equal: "
            f"bits per byte {found['selector']:.4f}, with dense prefill {found['dense']:.4f} ({change(found['loss'])})."
        ),
        facts(
            [
                *(kept if "block_share" in found else []),
                (
                    "read",
                    f"{plural(found['windows'], 'window')} of {count(found['context'])} tokens that no training saw, "
                    f"the last half of each: {plural(found['rows'], 'row')}",
                ),
            ]
        ),
    )
