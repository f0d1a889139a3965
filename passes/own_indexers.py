"""What passes do alike that make a model's own indexers (DSA) cheaper: the change, and how the choice differs by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.calibrate.dsa_choices import choices
from sparsec.calibrate.splits import Calibration
from sparsec.errors import PlanError
from sparsec.passes.base import PassResult, Program
from sparsec.plan import Dsa, Plan

LONGEST = 16384  # tokens that choices are compared on at most, unless asked for


def own_indexers(plan: Plan, name: str) -> Dsa:
    """How the model's indexers choose so far.

    Raises:
        PlanError: it has none of its own.
    """
    if plan.dsa is None:
        raise PlanError(
            f"{name} is for models with indexers of their own (deepseek_v32, glm_moe_dsa): rtpurbo's are too "
            "small to gain by it, use indexcache"
        )
    return plan.dsa


def changed(
    program: Program,
    calibration: Calibration,
    change: Mapping[str, Any],
    *,
    context: int | None,
    windows: int,
) -> PassResult:
    """The program with ``change`` made to its :class:`~sparsec.plan.Dsa`, and how much of the choice is left.

    Args:
        change: fields of it.
        context: tokens a window of the search text; None is all that the model reads, at most 16384.
        windows: how many.

    Raises:
        PlanError: the change contradicts the model.
        CalibrationError: the text does not suffice.
    """
    plan = program.plan
    assert plan.dsa is not None
    other = plan.edit(dsa={**plan.dsa.model_dump(), **change})
    readable = int(program.model.config.max_position_embeddings)
    length = context or calibration.longest("search", min(readable, LONGEST), 1)
    texts = list(calibration.windows("search", length, windows, seed=program.seed))
    measured = {"choice": choices(program.model, other, texts, program.listen), "context": length}
    return PassResult(other, dict(program.tensors), {**measured, "windows": windows, **change})
