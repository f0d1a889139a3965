"""razor: keep the heads that look back to earlier copies, window the others, put one token for what these drop.

RazorAttention (arXiv 2407.15891): on random tokens that are repeated, the heads with the best echo and induction scores
are the retrieval heads. They keep every token and stay dense, in prefill and in decode. The others see sinks, a window
and one compensation token, the mean of the keys and of the values that they dropped, weighted by how many those are.
Nothing is trained, and no text is read. What the paper leaves open and what is chosen here: docs/passes/razor.md.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from sparsec.calibrate.needles import FIRST
from sparsec.calibrate.repeats import repeat_scores, repeats
from sparsec.calibrate.splits import Calibration
from sparsec.errors import CalibrationError
from sparsec.events import Event
from sparsec.passes.base import Cost, Need, Pass, PassResult, Program, Tier
from sparsec.passes.split import Granularity, best_heads, by_layer, causal_check, scaled_window, split_plan, splittable
from sparsec.plan import Plan, Window


class Razor(Pass):
    """Head split by repeated random tokens. Windows, sinks and periods are tokens."""

    name: ClassVar[str] = "razor"
    tier: ClassVar[Tier] = "training-free"
    summary: ClassVar[str] = "keep echo and induction heads dense, window the other heads"
    source: ClassVar[str] = "RazorAttention, arXiv 2407.15891"
    after: ClassVar[tuple[str, ...]] = ("dynamic-tokenization",)
    conflicts: ClassVar[tuple[str, ...]] = ("rtpurbo", "window")
    needs: ClassVar[tuple[Need, ...]] = ("a dense model",)
    gives: ClassVar[tuple[Need, ...]] = ("heads",)

    induction: float = Field(default=0.14, ge=0, lt=1, description="share of heads kept for their induction score")
    echo: float = Field(default=0.01, ge=0, lt=1, description="share of heads kept for their echo score")
    granularity: Granularity = Field(
        default="query_head",
        description="kv_head decides for whole GQA groups (as DuoAttention), so that every local KV head is freed",
    )
    window: int | None = Field(default=None, ge=1, description="null: 1/16 of what the model reads, at most 8192")
    sinks: int = Field(default=4, ge=0, description="first tokens that local heads always see")
    min_context: int | None = Field(default=None, ge=0, description="dense up to here; null: window + sinks")
    compensation: bool = Field(default=True, description="one token for all that a local head dropped (the paper)")
    period: int | None = Field(default=None, ge=8, description="tokens of a copy; null: 1.25 windows (paper: 2500)")
    copies: int = Field(default=4, ge=2, description="how often they are repeated (the paper: 4)")
    draws: int = Field(default=4, ge=2, description="sequences of random tokens")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.induction and not self.echo:
            raise ValueError("induction and echo are both 0, no head would be kept: use the pass window")
        return self

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Detect, split, check. See :class:`sparsec.passes.base.Pass`. No text is read, only its tokenizer is used."""
        plan, listen = program.plan, program.listen
        allowed = splittable(program, self.name)
        readable = int(program.model.config.max_position_embeddings)
        window = Window(size=scaled_window(self.window, readable), sinks=self.sinks, compensate=self.compensation)
        period = self._period(readable)
        sequences = repeats(
            calibration.tokenizer, period=period, copies=self.copies, draws=self.draws + 1, seed=program.seed
        )
        longest = max(len(each.tokens) for each in sequences)
        if longest > readable:
            raise CalibrationError(
                f"{self.copies} copies of {period} tokens are {longest} with those before them, the model reads "
                f"{readable}: set a smaller window, period or copies"
            )
        scores = repeat_scores(program.model, sequences[: self.draws], plan.model, listen)
        kept: set[tuple[int, int]] = set()
        measured: dict[str, Any] = {"head_scores": _rounded(scores.mean(1).sum(0))}
        for name, ratio, found in zip(("echo", "induction"), (self.echo, self.induction), scores, strict=True):
            measured[name] = {"scores": _rounded(found.mean(0)), "kept": []}
            if ratio:
                chosen, stable = best_heads(found, ratio, plan.model, allowed, self.granularity)
                measured[name] |= {"kept": [list(head) for head in chosen], "rank_stability": stable}
                kept |= set(chosen)
        heads = by_layer(sorted(kept))
        listen(Event("detect repeating heads", note=f"kept {len(kept)} heads"))
        # Copies that no detection saw: the kept heads are not checked on what chose them.
        held = [each.document() for each in sequences[self.draws :]]
        measured |= {
            "kept_heads": len(kept),
            "possible_heads": int(allowed.sum()) * plan.model.heads,
            "window": window.size,
            "readable": readable,
            "period": period,
            "copies": self.copies,
            "draws": self.draws,
            "context": longest,
            "causal_check": causal_check(program, held, heads, allowed, window, self.min_context),
        }
        return PassResult(split_plan(plan, heads, window, self.min_context), {}, measured)

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """Scores a forward a draw, as much again for the attention weights; the check is three forwards."""
        length = FIRST + self.copies * self._period(max_positions)
        return Cost(tokens=(2 * self.draws + 3) * length)

    def _period(self, readable: int) -> int:
        """Copies further apart than the window: a local head must not reach the one before."""
        window = scaled_window(self.window, readable)
        return self.period or max(8, window + max(2, window // 4))


def _rounded(scores: Tensor) -> list[list[float]]:
    return [[round(float(s), 6) for s in row] for row in scores]
