"""The report's section on routing: which units could be forecast, what was removed, and which token took which path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsec.export import svg
from sparsec.export.page import facts, figure, folded, heading, paragraph, section, table
from sparsec.export.words import count, percent, plural


def routing(found: Mapping[str, Any]) -> str:
    """found: what informed-routing measured."""
    paths = found["paths"]
    rows: list[Sequence[str]] = []
    rates = {(row["layer"], row["unit"]): row for row in found["units"]}
    for (layer, unit), row in rates.items():
        fit = row.get("trained", row["closed_form"])
        rows.append(
            [
                str(layer),
                unit,
                f"{fit['nmse']:.2f}",
                f"{fit['cosine']:.2f}",
                percent(paths["prefill"][unit][layer], 0),
                percent(paths["decode"][unit][layer], 0),
            ]
        )
    given = paths["by_unit"]
    loss = found.get("trained", found["closed_form"])["loss"]
    return section(
        "routing",
        "Which tokens run which units",
        paragraph(
            f"{percent(paths['removed'])} of the units' FLOPs are removed on search text, routers and forecasters paid "
            f"({percent(found['remove'])} was asked for): {percent(given['attention'])} by attention, "
            f"{percent(given['mlp'])} by MLPs. FLOPs are those of prefill at {count(found['context'])} tokens."
        ),
        facts(
            [
                ("forecasters", f"rank {found['rank']}, {found['activation']}, from {count(found['tokens'])} tokens"),
                ("search text", f"{found['dense_loss']:.3f} nats a token before routing, {loss:.3f} with it"),
            ]
        ),
        heading("A sample text, token by token"),
        figure(
            svg.paths(paths["sample"]),
            f"Each column is a token, from token {count(paths['sample']['first'])} of a window on, each row a unit, "
            "the first layer on top. Filled: the unit runs; empty: its output is forecast.",
            [("kept", "attention runs"), ("local", "MLP runs")],
        ),
        paragraph(f"The text: {''.join(paths['sample']['tokens'])}", "quiet"),
        folded(
            "Unit by unit: the forecast's squared error over variance and its cosine, and the share of tokens that run",
            table(["layer", "unit", "error", "cosine", "prefill", "decode"], rows, words=2),
        ),
        paragraph(
            f"{plural(found['search_windows'], 'window')} of search text. An error of 1 is no better than the mean; "
            "the cosine flatters where outputs have a large one.",
            "quiet",
        ),
    )
