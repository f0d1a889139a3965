"""window: every head sees sinks and a window, nothing else. The baseline that every split of heads has to beat.

StreamingLLM (arXiv 2309.17453): with the first tokens kept a windowed model stays fluent at any length, and forgets
what left the window. Tokens keep their own positions here; the paper renumbers them inside the cache.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sparsec.calibrate.splits import Calibration
from sparsec.events import Event
from sparsec.passes.base import Cost, Need, Pass, PassResult, Program, Tier
from sparsec.passes.split import scaled_window, split_plan, splittable
from sparsec.plan import Plan
from sparsec.plan import Window as WindowPlan


class Window(Pass):
    """No retrieval heads at all. Windows, sinks and contexts are tokens."""

    name: ClassVar[str] = "window"
    tier: ClassVar[Tier] = "training-free"
    summary: ClassVar[str] = "window every head: the baseline"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    after: ClassVar[tuple[str, ...]] = ("dynamic-tokenization",)
    conflicts: ClassVar[tuple[str, ...]] = ("rtpurbo", "razor")
    needs: ClassVar[tuple[Need, ...]] = ("a dense model",)
    gives: ClassVar[tuple[Need, ...]] = ("heads",)

    window: int | None = Field(default=None, ge=1, description="null: 1/16 of what the model reads, at most 8192")
    sinks: int = Field(default=4, ge=0, description="first tokens that heads always see")
    min_context: int | None = Field(default=None, ge=0, description="dense up to here; null: window + sinks")
    compensation: bool = Field(default=False, description="one token for all that a head dropped, as razor has it")

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Window every layer that is not the model's own sliding one. Measures nothing."""
        allowed = splittable(program, self.name)
        readable = int(program.model.config.max_position_embeddings)
        window = WindowPlan(size=scaled_window(self.window, readable), sinks=self.sinks, compensate=self.compensation)
        plan = split_plan(program.plan, {}, window, self.min_context)
        heads = int(allowed.sum()) * plan.model.heads
        program.listen(Event("window every head", 1, 1, f"{heads} heads, {window.size} tokens"))
        measured = {"window": window.size, "readable": readable, "kept_heads": 0, "possible_heads": heads}
        return PassResult(plan, {}, measured)

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """Nothing is run."""
        return Cost(tokens=0)
