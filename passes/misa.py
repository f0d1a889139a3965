"""misa: each query of a model with indexers of its own scores tokens with its best indexer heads alone.

MISA (arXiv 2605.07363), for DSA models: training-free, nothing but configuration. Heads are ranked against the mean
keys of blocks; with two stages the best candidates are scored again with all heads. All index keys are still read, so
what is saved is arithmetic, mostly in prefill. How much of the original choice survives is measured, layer by layer.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from sparsec.calibrate.splits import Calibration
from sparsec.passes.base import Cost, Need, Pass, PassResult, Program, Tier
from sparsec.passes.own_indexers import LONGEST, changed, own_indexers
from sparsec.plan import Plan


class Misa(Pass):
    """Heads and how they are ranked; all lengths are tokens."""

    name: ClassVar[str] = "misa"
    tier: ClassVar[Tier] = "training-free"
    summary: ClassVar[str] = "let each query of a DSA model use its best indexer heads only"
    source: ClassVar[str] = "MISA, arXiv 2605.07363"
    after: ClassVar[tuple[str, ...]] = ("dynamic-tokenization", "indexcache", "hisa")
    needs: ClassVar[tuple[Need, ...]] = ("a model with indexers of its own",)

    heads: int | None = Field(default=None, ge=1, description="heads a query; null: an eighth (the paper: 8 of 64)")
    block: int = Field(default=1024, ge=1, description="tokens a block whose mean key ranks the heads (release: 1024)")
    two_stage: bool = Field(default=False, description="score the best candidates again with all heads")
    candidates: int | None = Field(
        default=None, ge=1, description="of the first stage; null: 4 times what is chosen (the paper: 8192 for 2048)"
    )
    min_context: int = Field(default=0, ge=0, description="all heads up to here")
    context: int | None = Field(
        default=None, ge=32, description="tokens a window it is measured on; null: all it reads"
    )
    windows: int = Field(default=2, ge=1, description="of them, of the search text")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.candidates is not None and not self.two_stage:
            raise ValueError("candidates are those of the first of two stages: set two_stage=true as well")
        return self

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Set it and measure. See :class:`sparsec.passes.base.Pass`."""
        dsa = own_indexers(program.plan, self.name)
        chosen = {
            "heads": self.heads or max(1, dsa.heads // 8),
            "block": self.block,
            "candidates": (self.candidates or 4 * dsa.top_k) if self.two_stage else None,
            "min_context": self.min_context,
        }
        return changed(program, calibration, {"misa": chosen}, context=self.context, windows=self.windows)

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """The windows it is measured on."""
        return Cost(tokens=self.windows * min(self.context or LONGEST, max_positions))
