"""hisa: a model's own indexers rank blocks of tokens first, and score tokens only in the best blocks.

HISA (arXiv 2603.28458), for DSA models: training-free, nothing but configuration. A query of at most top_blocks x
block tokens chooses exactly as before; beyond, an indexer scores context / block mean keys and the tokens of at most
top_blocks + 2 blocks in place of all. How much of the original choice survives is measured, layer by layer.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sparsec.calibrate.splits import Calibration
from sparsec.passes.base import Cost, Need, Pass, PassResult, Program, Tier
from sparsec.passes.own_indexers import LONGEST, changed, own_indexers
from sparsec.plan import Plan


class Hisa(Pass):
    """Blocks and how many; all lengths are tokens."""

    name: ClassVar[str] = "hisa"
    tier: ClassVar[Tier] = "training-free"
    summary: ClassVar[str] = "let a DSA model's indexers rank blocks before tokens"
    source: ClassVar[str] = "HISA, arXiv 2603.28458"
    after: ClassVar[tuple[str, ...]] = ("dynamic-tokenization", "indexcache")
    needs: ClassVar[tuple[Need, ...]] = ("a model with indexers of its own",)

    block: int = Field(default=128, ge=1, description="tokens a block (the paper: 128)")
    top_blocks: int | None = Field(
        default=None, ge=1, description="best blocks; null: as hold 4 times what is chosen (the paper: 64 for 2048)"
    )
    min_context: int = Field(
        default=0, ge=0, description="score all tokens up to here: ranking blocks only pays beyond some length"
    )
    context: int | None = Field(
        default=None, ge=32, description="tokens a window it is measured on; null: all it reads"
    )
    windows: int = Field(default=2, ge=1, description="of them, of the search text")

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Set it and measure. See :class:`sparsec.passes.base.Pass`."""
        dsa = own_indexers(program.plan, self.name)
        top = self.top_blocks or -(-4 * dsa.top_k // self.block)
        chosen = {"block": self.block, "top_blocks": top, "min_context": self.min_context}
        return changed(program, calibration, {"hisa": chosen}, context=self.context, windows=self.windows)

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """The windows it is measured on."""
        return Cost(tokens=self.windows * min(self.context or LONGEST, max_positions))
