"""The report's sections on how heads were found and indexers fitted; selectors.py and patterns.py have theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.export import svg
from sparsec.export.cautions import check_shown
from sparsec.export.page import caution, facts, figure, heading, paragraph, section
from sparsec.export.words import change, count, percent, plural


def detection(split: Mapping[str, Any]) -> str:
    """How the retrieval heads were found, and whether it is they that retrieve. split: what rtpurbo measured."""
    check, stable = split["causal_check"], split["rank_stability"]
    return section(
        "detection",
        "How the heads were found",
        paragraph(
            "A needle is a run of random words that stands in a text twice, further apart than the window. A head's "
            "score is the share of its attention that goes from the later copy to the earlier one"
            + ("." if "gates" in split or "given" in split else "; the best heads are kept.")
        ),
        facts(
            [
                ("needles", f"{count(split['needles'])}, in contexts of {count(split['context'])} tokens"),
                ("rank correlation", f"{stable['spearman']:.2f} (Spearman) between two halves of the documents"),
                ("same heads kept", f"{percent(stable['jaccard'], 0)} of those that either half would keep (Jaccard)"),
                *_given(split),
                *_gates(split),
            ]
        ),
        heading("Causal check: share of needle tokens copied"),
        *copying(
            check,
            "needle tokens",
            f"{plural(check['tokens'], 'needle token')}, window {count(split['window'])} tokens.",
        ),
    )


def _given(split: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a compile that started from a split."""
    given = split.get("given")
    if given is None:
        return []
    words = f"the split was given (--from) and kept; of the {count(given['detected'])} heads found here it keeps"
    return [("given", f"{words} {count(given['agree'])}")]


def _gates(split: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of heads that training chose."""
    gates = split.get("gates")
    if gates is None:
        return []
    kept, agree = count(gates["open"]), count(gates["agree_with_needles"])
    words = (
        f"it is not the score that chose: {count(gates['steps'])} steps trained gates between full and windowed heads, "
        f"on {count(2 * gates['steps'])} windows of {count(gates['context'])} tokens. Of the {kept} heads whose gates "
        f"are open, needles would keep {agree}"
    )
    return [("gates", words)]


def copying(check: Mapping[str, Any], what: str, caption: str) -> list[str]:
    """The causal check as bars, and whether it shows that the kept heads copy. what: the tokens, in the plural."""
    dense, kept, random = (check[name] for name in ("dense", "kept_heads_local", "random_heads_local"))
    said = (
        f"With the {count(check['heads'])} kept heads cut down to a window, {percent(kept, 0)} of the {what} are still "
        f"copied; with as many random other heads cut down, {percent(random, 0)}."
    )
    if check_shown(check):
        said = paragraph(f"{said} So it is the kept heads that carry the copying.")
    else:
        said = caution(f"{said} This does not show that the kept heads carry the copying: do not rely on the split.")
    bars = [
        ("dense model", dense, "other"),
        ("kept heads local", kept, "full"),
        ("random heads local", random, "other"),
    ]
    label = f"{what[:1].upper()}{what[1:]} copied: " + ", ".join(f"{name} {percent(share)}" for name, share, _ in bars)
    return [figure(svg.bars(bars, label), caption), said]


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
