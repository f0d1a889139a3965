"""indexcache: neighbouring layers share one index set, the pattern found by greedy search.

IndexCache (arXiv 2603.12201), Algorithm 1: start with an indexer in every layer; again and again turn the layer into a
shared one whose loss is lowest, judged by the loss of the language model, first layer excepted. The paper starts from
DSA models, where a layer has one index set. rtpurbo's indexers choose per head, so a layer's set is made the union
over its retrieval heads first; that, and sharing such unions, is ours (no paper does it).

The loss is taken in the deployed decode regime. A candidate costs only the decode rows through the layers from the
flipped one up: everything below is reused, and the pattern and losses are those of the plain search.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sparsec.calibrate.needles import needle_documents
from sparsec.calibrate.replay import Replay, share, with_pattern
from sparsec.calibrate.splits import Calibration
from sparsec.events import Event
from sparsec.passes.base import Cost, Pass, PassResult, Program
from sparsec.plan import Plan
from sparsec.plugins.runtime import applied, install, tensor_names


class IndexCache(Pass):
    """Cross-layer index sharing; ``keep`` is a target, ``max_loss`` a budget, the search stops at the first."""

    name: ClassVar[str] = "indexcache"
    tier: ClassVar[Literal["training-free"]] = "training-free"
    summary: ClassVar[str] = "share index sets between layers, pattern by greedy search"
    source: ClassVar[str] = "IndexCache, arXiv 2603.12201"
    after: ClassVar[tuple[str, ...]] = ("rtpurbo",)
    needs: ClassVar[tuple[Literal["heads", "indexers"], ...]] = ("indexers",)
    gives: ClassVar[tuple[Literal["heads", "indexers"], ...]] = ("indexers",)

    keep: float | None = Field(default=0.25, gt=0, le=1, description="share of indexed layers that keep an indexer")
    max_loss: float | None = Field(
        default=None, ge=0, description="stop before the search text's loss rises by more than this share"
    )
    context: int | None = Field(default=None, ge=128, description="tokens a search window; null: 4 windows")
    rows: int = Field(default=128, ge=16, description="decode rows of each, the last ones; the rest is the prompt")
    windows: int = Field(default=2, ge=1, description="search windows of text, fixed for the whole search")
    documents: int = Field(default=2, ge=0, description="needle documents searched on beside them (ours)")
    needles: int = Field(default=4, ge=1, description="needles a document")
    needle_words: int = Field(default=24, ge=4, description="words a needle")
    reuse: bool = Field(default=True, description="start candidates at the flipped layer; false: the plain search")

    @field_validator("keep", "max_loss", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        return float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else value

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.keep is None and self.max_loss is None:
            raise ValueError("give keep (a target) or max_loss (a budget)")
        return self

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Search and apply the pattern. See :class:`sparsec.passes.base.Pass`."""
        model, listen = program.model, program.listen
        plan = with_pattern(program.plan, {i: program.plan.layers[i].index for i in program.plan.indexed()})
        length = self.context or self._context(plan, int(model.config.max_position_embeddings))
        rows = min(self.rows, length // 2)
        windows = self._windows(plan, calibration, length, program.seed)
        candidates = [i for i in plan.indexed() if plan.layers[i].index == "full"][1:]
        target = self._target(len(plan.indexed()))
        flips = max(0, 1 + len(candidates) - target)
        total = sum(len(candidates) - i for i in range(flips))
        with applied(model, plan, program.tensors):
            replays = [Replay(model, window, length - rows) for window in windows]
            base = _mean(replay.losses for replay in replays)
            done, plain = 0, len(windows) * plan.model.layers
            loss, history, stopped = base, [], "target"
            listen(Event("search sharing pattern", 0, total))
            for _ in range(flips):
                trials: dict[int, float] = {}
                for layer in candidates:
                    install(model, share(plan, layer), _needed(share(plan, layer), program.tensors))
                    runs = [replay.run(layer if self.reuse else 0)[0] for replay in replays]
                    trials[layer] = _mean(runs)
                    done, plain = done + 1, plain + len(windows) * plan.model.layers
                    listen(Event("search sharing pattern", done, total))
                best = min(candidates, key=lambda layer: (trials[layer], layer))
                if self.max_loss is not None and trials[best] > base * (1 + self.max_loss):
                    stopped = "budget"
                    break
                plan, loss = share(plan, best), trials[best]
                candidates.remove(best)
                install(model, plan, _needed(plan, program.tensors))
                for replay in replays:
                    replay.accept(best)
                history.append({"layer": best, "loss": loss, "trials": {str(i): t for i, t in trials.items()}})
                listen(Event("search sharing pattern", done, total, f"{plan.pattern} {loss / base - 1:+.2%}"))
            listen(Event("search sharing pattern", total, total))
        measured = {
            "pattern": plan.pattern,
            "layers": list(plan.indexed()),
            "loss_before": base,
            "loss_after": loss,
            "flips": history,
            "stopped": stopped,
            "candidates": done,
            "layer_evaluations": sum(replay.evaluated for replay in replays),
            "layer_evaluations_plain": plain,
            "windows": self.windows,
            "documents": self.documents,
            "context": length,
            "rows": rows,
        }
        return PassResult(plan, _needed(plan, program.tensors), measured)

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """About half of a forward of the decode rows for every candidate, and the prompts once."""
        indexed = len(plan.indexed()) or plan.model.layers // 2
        length = self.context or self._context(plan, max_positions)
        rows = min(self.rows, length // 2)
        flips = max(0, indexed - self._target(indexed))
        candidates = sum(indexed - 1 - i for i in range(flips))
        return Cost(
            tokens=(self.windows + self.documents) * (length + candidates * rows // 2),
            resident=(self.windows + self.documents)
            * length
            * plan.model.layers
            * plan.model.kv_heads
            * plan.model.head_dim
            * 8,
        )

    def _windows(self, plan: Plan, calibration: Calibration, length: int, seed: int) -> list[Tensor]:
        """Text, and needle documents whose later needles are decode rows: mean loss on text alone hardly sees an
        indexer, so the pattern would be decided by noise."""
        texts = list(calibration.windows("search", length, self.windows, seed=seed))
        if not self.documents:
            return texts
        documents = needle_documents(
            calibration,
            split="search",
            count=self.documents,
            length=length,
            window=plan.window.size if plan.window else length // 4,
            sinks=plan.window.sinks if plan.window else 4,
            needles_per_document=self.needles,
            words=self.needle_words,
            seed=seed,
        )
        return texts + [document.tokens for document in documents]

    def _context(self, plan: Plan, readable: int) -> int:
        return min(readable, 4 * plan.window.size if plan.window else 2048)

    def _target(self, indexed: int) -> int:
        return max(1, round(self.keep * indexed)) if self.keep is not None else 1


def _mean(losses: Any) -> float:
    """Mean over all rows of all windows, in double: the order of summation must not decide a tie."""
    return float(torch.cat([part.double() for part in losses]).mean())


def _needed(plan: Plan, tensors: Any) -> dict[str, Tensor]:
    """Shared layers lose their indexers."""
    return {name: tensors[name] for name in tensor_names(plan)}
