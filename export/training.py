"""The report's sections on trained weights and on what each pass cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.export import svg
from sparsec.export.page import facts, figure, heading, paragraph, section, table
from sparsec.export.words import change, count, percent, plural


def training(run: Mapping[str, Any]) -> str:
    """What self-distillation did. run: what distill measured."""
    before, best, losses = run["kl_before"], run["kl_best"], run["losses"]
    kind = "low-rank additions, merged into them," if run["weights"] == "lora" else "all weights"
    if run["best_step"]:
        said = f"The weights are those of step {count(run['best_step'])}, the best: {best:.4f} nats a row, {_of(run)}."
    else:
        said = "Nothing that was trained did better: the weights are the dense model's, unchanged."
    if run["diverged"]:
        said += f" The loss was no number at step {count(len(losses))}, and training ended there."
    checks = [[count(check["step"]), f"{check['kl']:.5f}", change(check["kl"] / before - 1)] for check in run["checks"]]
    return section(
        "training",
        "Training the weights under the plan",
        paragraph(
            f"The dense model teaches the sparse one: {kind} learn its most likely next tokens, what the passes before "
            f"added stays fixed. On text and questions that no step trained on, the divergence (KL over the whole "
            f"vocabulary) from the dense model was {before:.4f} nats a row before. {said}"
        ),
        facts(
            [
                ("windows", _windows(run)),
                ("read", f"{plural(len(losses), 'step')}, {count(run['tokens'])} tokens"),
                ("teacher", f"its top tokens hold {percent(run['teacher_mass'])} of its probability"),
            ]
        ),
        heading("Loss of each step"),
        figure(
            svg.loss_curve(losses, [], f"Loss over {len(losses)} steps"),
            "Nats a row on the teacher's top tokens and the rest as one. Thin: each step; thick: smoothed.",
        ),
        heading("Divergence from the dense model on held-out text"),
        table(["after step", "KL, nats a row", "against before"], checks, words=0),
    )


def pass_costs(measurements: Mapping[str, Any]) -> str:
    """What each pass did to the gate's figures, nothing where there is one pass."""
    passes, gate = measurements["passes"], measurements["gate"]
    found = [(each["name"], each["after"]) for each in passes if "after" in each]
    if not found:
        return ""
    dense = gate["dense"]
    last = gate["artifact"] | {"selector": gate["selector"]}
    rows = [["dense", f"{dense['bits_per_byte']:.4f}", "", "", ""]]
    for name, after in [*found, (passes[-1]["name"], last)]:
        selector = after["selector"]
        rows.append(
            [
                f"after {name}",
                f"{after['bits_per_byte']:.4f}",
                change(after["bits_per_byte"] / dense["bits_per_byte"] - 1),
                percent(selector["recall_mean"]) if selector else "–",
                count(selector["kept_mean"]) if selector else "–",
            ]
        )
    return section(
        "passes",
        "What each pass cost",
        paragraph("The gate's windows and rows, measured after every pass."),
        table(["", "bits per byte", "against dense", "mass recall", "tokens kept"], rows),
    )


def _windows(run: Mapping[str, Any]) -> str:
    windows, context, rows = count(run["windows"]), count(run["context"]), count(run["rows"])
    said = f"{windows} of {context} tokens, the last {rows} rows of each as decode rows; "
    return said + f"{count(run['with_questions'])} with hidden facts that are asked for"


def _of(run: Mapping[str, Any]) -> str:
    return change(run["kl_best"] / run["kl_before"] - 1, 0) if run["kl_before"] else "as before"
