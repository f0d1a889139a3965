"""The report's section on merged tokens: how long texts are before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.export import svg
from sparsec.export.page import figure, folded, paragraph, section, table
from sparsec.export.words import count, percent

SHOWN = 24  # merged tokens


def merged(found: Mapping[str, Any]) -> str:
    """found: what dynamic-tokenization measured."""
    held = found["heldout"]
    before, after, size = held["base_tokens"], held["merged_tokens"], held["bytes"]
    rows = [
        [name, count(tokens), f"{size / max(1, tokens):.2f}"]
        for name, tokens in (("the model's own tokens", before), ("with merged tokens", after))
    ]
    most = max(before, after, 1)
    bars = [("before", before / most, "local"), ("after", after / most, "kept")]
    return section(
        "tokens",
        "Token lengths before and after",
        paragraph(
            f"{count(found['merges'])} merged tokens make prompts {percent(held['saved'])} shorter on held-out text "
            f"({percent(found['saved_train'])} on the text that they were found in). They are read, never written."
        ),
        figure(
            svg.bars(bars, f"Held-out text: {count(before)} tokens before, {count(after)} after"),
            "Tokens of the same held-out text, as a share of the longer count.",
        ),
        table(["held-out text", "tokens", "bytes a token"], rows),
        folded("The first merged tokens", paragraph(" | ".join(found["first"][:SHOWN]))),
    )
