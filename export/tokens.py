"""The report's section on merged tokens: what text loses in length, how vocabularies are used, what stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.export import svg
from sparsec.export.page import facts, figure, folded, heading, paragraph, section, table
from sparsec.export.words import count, percent, plural

WHICH = ("before", "after")
SHOWN = 24  # merged tokens
SEGMENTATIONS = {"merged": "all merges", "half": "the first half of the merges"}


def tokens(run: Mapping[str, Any]) -> str:
    """run: what dynamic-tokenization measured; ``tokenizer`` in it, where the merges are frozen, by the compiler."""
    held = run["heldout"]
    before, after = held["base_tokens"], held["merged_tokens"]
    most = max(before, after, 1)
    bars = [("before", before / most, "local"), ("after", after / most, "kept")]
    name = {"static": "frozen merges", "dynamic": "merges of each batch"}[run.get("mode", "static")]
    parts = [
        paragraph(
            f"Held-out text of {count(before)} tokens takes {count(after)} with {name}: "
            f"{percent(held['saved'])} fewer. {_written(run)}"
        ),
        figure(
            svg.bars(bars, f"Held-out text: {count(before)} tokens before, {count(after)} after"),
            "Tokens of the same held-out text, as a share of the longer count.",
        ),
    ]
    if run.get("mode") == "dynamic":
        parts.append(
            paragraph(
                f"Each batch of prompts is merged by itself, into {count(run['batch_merges'])} tokens at most "
                f"(measured on a batch of {plural(held['prompts'], 'prompt')}), by sparsec.load alone. The same prompt "
                "may be read otherwise in another batch: caches keyed by token ids cannot be shared between batches."
            )
        )
    if "tokenizer" in run:
        parts += _tokenizers(run["tokenizer"])
    if "consistency" in run:
        parts += _consistency(run["consistency"])
    if "first" in run:
        parts.append(folded("The first merged tokens", paragraph(" | ".join(run["first"][:SHOWN]))))
    return section("tokens", "Merged tokens", *parts)


def _written(run: Mapping[str, Any]) -> str:
    if "written" not in run:
        return "They are read, never written."
    found = run["written"]
    steps, bits = 1 - found["steps"] / found["tokens"], found["bits_merged"] / found["bits_base"] - 1
    return (
        f"They are read and written. Text that is written in them takes {percent(steps)} fewer steps, and "
        f"{percent(bits)} more bits than the base model gives it (on {count(found['tokens'])} tokens, from the "
        "base model's hidden states)."
    )


def _tokenizers(found: Mapping[str, Any]) -> list[str]:
    rows = []
    for script, sides in found["texts"].items():
        for which in WHICH:
            one = sides[which]
            rows.append(
                [
                    script if which == "before" else "",
                    which,
                    count(one["tokens"]),
                    "–" if one["fertility"] is None else f"{one['fertility']:.2f}",
                    f"{one['characters_a_token']:.2f}",
                    percent(one["renyi_efficiency"]),
                    percent(one["used"]),
                    f"{count(one['lost_lines'])} of {count(one['lines'])}",
                ]
            )
    head = ["script", "tokenizer", "tokens", "tokens a word", "characters a token", "Rényi", "used", "lines lost"]
    known = found["vocabulary"]
    sizes = [
        (
            which,
            f"{count(known[which]['tokens'])} tokens, {count(known[which]['unreachable'])} of them unreachable, "
            f"{count(known[which]['duplicated'])} spelled as another; {count(known[which]['parts'])} are parts of "
            "characters and were not tried",
        )
        for which in WHICH
    ]
    return [
        heading("Held-out text by script, before and after"),
        table(head, rows, words=2),
        paragraph(
            "Rényi: entropy of order 2.5 of the tokens, as a share of what the vocabulary could hold. Used: share of "
            "the vocabulary that this text has. Lost: lines that do not come back as they went in.",
            "quiet",
        ),
        facts(sizes),
    ]


def _consistency(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [SEGMENTATIONS[name], count(one["positions"]), percent(one["same_next"]), f"{one['divergence']:.4f}"]
        for name, one in found.items()
    ]
    return [
        heading("The same text in other segmentations"),
        table(["read with", "positions", "same likeliest next token", "KL, nats a position"], rows),
        paragraph("Against the base tokenizer's segmentation of the same held-out text, all layers.", "quiet"),
    ]
