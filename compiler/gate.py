"""The gate: what a program costs on held-out text and questions, against the dense model, and whether that is allowed.

Everything is measured in the deployed decode regime, on rows and prompts that are drawn once and are the same for the
dense model, for every pass's result and for the artifact as loaded afresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.decode import text_loss
from sparsec.calibrate.selector_stats import SelectorStats
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import prompts, score
from sparsec.calibrate.tasks_frame import Prompt
from sparsec.compiler.recipe import Gate
from sparsec.events import Listener
from sparsec.plan import Plan

TASKS = ("kv", "multikey")  # asked where the recipe wants questions
BATCH = 4  # prompts at a time


@dataclass(frozen=True)
class Exam:
    """What everyone is measured on."""

    windows: tuple[Tensor, ...]  # token ids, [length] each
    prompt: int  # prefill rows of each; the others are decode rows
    asked: Mapping[str, Sequence[Prompt]]  # questions by task, maybe none

    @classmethod
    def drawn(cls, gate: Gate, plan: Plan, calibration: Calibration, seed: int, readable: int) -> Exam:
        """From the held-out split. Contexts are four spans of the plan unless the recipe names another length.

        readable: tokens that the model reads, the most that a context has.

        Raises:
            CalibrationError: the held-out text does not suffice.
        """
        length = gate.context or min(4 * (plan.span or 512), readable)
        windows = calibration.windows("heldout", length, gate.windows, seed=seed)
        asked = {
            task: prompts(task, calibration, length=length, count=gate.prompts, seed=seed)
            for task in (TASKS if gate.prompts else ())
        }
        return cls(tuple(windows), length - min(gate.rows, length // 2), asked)

    @property
    def inputs(self) -> dict[str, Any]:
        """All that decides what is measured, as JSON data."""
        asked = {task: [one.tokens.tolist() for one in each] for task, each in self.asked.items()}
        return {"windows": [window.tolist() for window in self.windows], "prompt": self.prompt, "asked": asked}

    def take(self, model: Any, tokenizer: Any, listen: Listener, stage: str) -> dict[str, Any]:
        """Bits per byte, mass recall where the model selects, the share of questions answered; JSON data.

        ``rows`` are the losses of all decode rows in bits, window by window.
        """
        stats = SelectorStats()
        loss = text_loss(model, tokenizer, list(self.windows), self.prompt, observe=stats, listen=listen, stage=stage)
        found = loss.to_json() | {"rows": loss.rows.tolist(), "selector": stats.summary()}
        if self.asked:
            scores = [score(model, tokenizer, each, batch_size=BATCH) for each in self.asked.values()]
            found["answered"] = sum(each.share for each in scores) / len(scores)
        return found


def far_loss(dense: Mapping[str, Any], near: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, float] | None:
    """Loss of the tokens that need far context, in bits a token, beside the plain mean; None where there are none.

    A token's weight is what it costs the dense model to see sinks and window only. LongPPL (arXiv 2410.23771) picks
    key tokens by the same contrast. They are picked where dense does well, so whatever differs looks a little worse.
    """
    d, n, f = (torch.tensor(each["rows"], dtype=torch.float64) for each in (dense, near, found))
    weight = (n - d).clamp_min(0)
    total = float(weight.sum())
    if not total > 0:
        return None
    a, b = float((weight * d).sum()) / total, float((weight * f).sum()) / total
    return {"dense": a, "near": float((weight * n).sum()) / total, "artifact": b, "tokens": int((weight > 0).sum())}


def verdict(
    gate: Gate,
    dense: Mapping[str, Any],
    found: Mapping[str, Any],
    near: Mapping[str, Any] | None = None,
    passes: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What was found, what was allowed, and every way in which it failed.

    Args:
        gate: what the recipe allows.
        dense, found, near: what the dense model, the artifact, and the dense model in windows gave (:meth:`Exam.take`).
        passes: in order, with what each left (``after``; the last one left the artifact) and its ``budget``.
    """
    selector = found["selector"]
    loss = found["bits_per_byte"] / dense["bits_per_byte"] - 1
    failures = []
    if not loss <= gate.max_loss:
        failures.append(f"bits per byte rose by {loss:.2%}, {gate.max_loss:.2%} is allowed")
    # A model's own indexers find what they find: theirs is the measure.
    least = gate.min_recall * (dense["selector"]["recall_mean"] if dense.get("selector") else 1)
    if selector and not selector["recall_mean"] >= least:
        failures.append(f"selectors find {selector['recall_mean']:.1%} of the attention mass, {least:.1%} is the least")
    if "answered" in dense and not dense["answered"] - found["answered"] <= gate.max_points:
        failures.append(
            f"{found['answered']:.1%} of the questions are answered, dense answers {dense['answered']:.1%}, "
            f"{gate.max_points:.1%} less is allowed"
        )
    failures += _broken_budgets(dense, found, passes)
    return {
        "passed": not failures,
        "failures": failures,
        "loss": loss,
        "dense": shown(dense),
        "artifact": shown(found),
        "selector": dict(selector),
        "far": far_loss(dense, near, found) if near is not None else None,
        "allowed": {"max_loss": gate.max_loss, "min_recall": least, "max_points": gate.max_points},
    }


def shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """What of :meth:`Exam.take` measurements.json keeps beside the selectors: no single rows."""
    return {name: value for name, value in found.items() if name not in ("rows", "selector")}


def _broken_budgets(
    dense: Mapping[str, Any], found: Mapping[str, Any], passes: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Passes that cost more on held-out text than they were allowed to."""
    failures, before = [], dense["bits_per_byte"]
    for number, each in enumerate(passes):
        after = (found if number == len(passes) - 1 else each["after"])["bits_per_byte"]
        budget = each.get("budget")
        if budget is not None and not after / before - 1 <= budget:
            failures.append(
                f"{each['name']} raised bits per byte by {after / before - 1:.2%} on held-out text, "
                f"its budget is {budget:.2%}"
            )
        before = after
    return failures
