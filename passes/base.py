"""The pass contract: a frozen, typed configuration and ``run(program, calibration) -> PassResult``.

A pass measures, decides and perhaps trains. It never touches the command line, progress bars or the disk; the pipeline
orders, validates and caches it. docs/passes.md shows how to add one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from sparsec.calibrate.splits import Calibration
from sparsec.events import Listener, silent
from sparsec.plan import Plan, Strict

Tier = Literal["training-free", "minutes", "hours"]
# Split heads, indexers of any kind, routed units, a model that is dense and not changed yet, a DSA model.
Need = Literal["heads", "indexers", "routing", "a dense model", "a model with indexers of its own"]
Needs = tuple[Need | tuple[Need, ...], ...]  # all of them; of those in a tuple of their own, one
TIERS: tuple[Tier, ...] = ("training-free", "minutes", "hours")


@dataclass(frozen=True)
class Program:
    """A dense model, its plan so far and the tensors that the plan added."""

    model: Any  # a Transformers causal-LM model: dense weights, no plan installed
    plan: Plan
    tensors: Mapping[str, Tensor]  # by artifact name, float32, on the CPU
    seed: int = 0
    listen: Listener = field(default=silent, compare=False)
    scratch: Path | None = None  # a folder of this pass and these inputs alone; kept until the pass is done


@dataclass(frozen=True)
class PassResult:
    """The program after the pass, and what the pass measured (JSON data; it goes to measurements.json)."""

    plan: Plan
    tensors: Mapping[str, Tensor]
    measured: Mapping[str, Any]
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # base weights that changed, by name, on the CPU


@dataclass(frozen=True)
class Cost:
    """What a pass expects to spend, for ``--dry-run``."""

    tokens: int  # token-forwards through the whole model
    resident: int = 0  # bytes held beside the weights
    copies: int = 0  # of all weights, in float32, held beside them


class Pass(Strict):
    """Base of all passes. The fields are its configuration; an unknown one is an error."""

    name: ClassVar[str]
    tier: ClassVar[Tier]
    presets: ClassVar[Mapping[Tier, Mapping[str, Any]]] = {}  # what --tier sets, by tier; empty: the pass has one tier
    summary: ClassVar[str]
    source: ClassVar[str]  # the paper
    after: ClassVar[tuple[str, ...]] = ()  # passes that run earlier if they run at all
    conflicts: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Needs] = ()  # what the plan must have
    gives: ClassVar[tuple[Need, ...]] = ()  # what the plan has afterwards
    trains: ClassVar[bool] = False  # changes base weights
    parallel: ClassVar[bool] = False  # run() divides its work among processes (sparsec.calibrate.ranks)

    def tier_of_run(self) -> Tier:
        """What this configuration costs."""
        return self.tier

    def budget(self) -> float | None:
        """Share by which held-out bits per byte may rise by this pass, else the gate fails; None: no limit."""
        return None

    @abstractmethod
    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Do it.

        Raises:
            CalibrationError: the text does not suffice.
            PlanError: the plan lacks what the pass needs.
        """

    def adds_tensors(self) -> bool:
        """Does the plan have tensors beside the model's weights afterwards?"""
        return "indexers" in self.gives

    @abstractmethod
    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """Expected cost on a model of this shape; max_positions is the longest context it reads."""


def is_start(plan: Plan) -> bool:
    """A head split that was given, and that no pass has touched yet: retrieval heads are dense in decode too."""
    return plan.window is not None and not plan.passes and not plan.indexed()


def met(plan: Plan) -> set[Need]:
    """What the plan has."""
    have: dict[Need, bool] = {
        "heads": any(layer.local for layer in plan.layers),
        "indexers": bool(plan.indexed()),
        "routing": plan.routing is not None,
        "a dense model": plan.is_dense or is_start(plan),
        "a model with indexers of its own": plan.dsa is not None,
    }
    return {need for need, there in have.items() if there}


def unmet(have: set[Need], needs: Needs) -> list[tuple[Need, ...]]:
    """What of ``needs`` is not there; each as what would do, any one of them."""
    each = [(need,) if isinstance(need, str) else need for need in needs]
    return [any_of for any_of in each if have.isdisjoint(any_of)]


def in_words(needs: Needs) -> list[str]:
    """Each of ``needs`` as a reader sees it."""
    return [" or ".join(any_of) for any_of in unmet(set(), needs)]


def lacks(plan: Plan, needs: Needs) -> list[str]:
    """What of ``needs`` the plan does not have, in words."""
    return in_words(tuple(unmet(met(plan), needs)))
