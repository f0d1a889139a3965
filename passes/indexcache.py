"""indexcache: neighbouring layers share one index set, the pattern found by greedy search.

IndexCache (arXiv 2603.12201), Algorithm 1: start with an indexer in every layer; again and again turn the layer into a
shared one whose loss is lowest, judged by the loss of the language model, first layer excepted. The paper starts from
DSA models, where a layer has one index set. rtpurbo's indexers choose per head, so a layer's set is made the union
over its retrieval heads first; that, and sharing such unions, is ours (no paper does it).

Sets made for one layer fit others badly, so the kept indexers are then trained for all layers that read them
(calibrate/shared_fit.py), as in the paper's training-aware variant; the model's own weights stay as they are. In a
model with indexers of its own (DSA) those are searched and trained (calibrate/dsa_fit.py), and no other weight.

The loss is taken in the deployed decode regime. A candidate costs only the decode rows through the layers that its
flip, or one accepted since it was last tried, changes: the others are reused, and pattern and losses are those of the
plain search.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sparsec.calibrate.dsa_fit import train_dsa
from sparsec.calibrate.fit_windows import FitText, fit_windows
from sparsec.calibrate.indexer_fit import Forced
from sparsec.calibrate.needles import needle_documents
from sparsec.calibrate.pattern_search import Goal, Order, Search, paired
from sparsec.calibrate.patterns import given_pattern, other_patterns, stage_starts, with_pattern
from sparsec.calibrate.shared_fit import assigned, mean_multi_layer, readers, train_shared
from sparsec.calibrate.splits import Calibration
from sparsec.passes.base import Cost, Need, Pass, PassResult, Program, Tier
from sparsec.plan import Plan
from sparsec.plugins.runtime import applied, tensor_names


class IndexCache(Pass):
    """Cross-layer index sharing; ``keep`` is a target, ``max_loss`` a budget, the search stops at the first."""

    name: ClassVar[str] = "indexcache"
    tier: ClassVar[Tier] = "minutes"
    presets: ClassVar[Mapping[Tier, Mapping[str, Any]]] = {
        "training-free": {"steps": 0},
        "minutes": {},
        "hours": {"fit_windows": 16, "steps": 600},
    }
    summary: ClassVar[str] = "share index sets between layers: greedy search, then indexers trained for all they serve"
    source: ClassVar[str] = "IndexCache, arXiv 2603.12201"
    after: ClassVar[tuple[str, ...]] = ("dynamic-tokenization", "rtpurbo")
    needs: ClassVar[tuple[Need, ...]] = ("indexers",)
    gives: ClassVar[tuple[Need, ...]] = ("indexers",)
    trains: ClassVar[bool] = True  # a model's own indexers
    parallel: ClassVar[bool] = True

    keep: float | None = Field(default=0.25, gt=0, le=1, description="share of indexed layers that keep an indexer")
    max_loss: float | None = Field(
        default=None, ge=0, description="stop before the search text's loss rises by more than this share"
    )
    pattern: str | None = Field(
        default=None,
        pattern="^[FS-]+$",
        description="no search but this: a letter (F or S) for every layer with an index, or for every layer of the "
        "model, where those without one have a -",
    )
    context: int | None = Field(
        default=None,
        ge=128,
        description="tokens a search window; null: 4 times a local window, or what own indexers choose",
    )
    rows: int = Field(default=128, ge=16, description="decode rows of each, the last ones; the rest is the prompt")
    windows: int = Field(default=3, ge=1, description="search windows of text, fixed for the whole search")
    documents: int = Field(default=1, ge=0, description="needle documents searched on beside them (ours)")
    needles: int = Field(default=4, ge=1, description="needles a document")
    needle_words: int = Field(default=24, ge=4, description="words a needle")
    steps: int = Field(default=240, ge=0, description="training steps of kept indexers for all layers they serve")
    lr: float | None = Field(
        default=None, gt=0, description="its peak learning rate; null: 5e-3, for a model's own indexers 1e-3"
    )
    fit_windows: int = Field(default=4, ge=1, description="text windows it reads, and as many needle documents")
    fit_rows: int = Field(default=512, ge=64, description="query rows sampled from each")
    reach: int | None = Field(
        default=None, ge=128, description="positions of its windows are stretched to so many tokens; null: all it reads"
    )
    order: Order = Field(
        default="exact", description="lazy re-tries only candidates that were best before: an approximation, cheaper"
    )
    margin: float | None = Field(
        default=None, gt=0, description="stop where the best flip is within so many standard errors of the second best"
    )
    near_full: int = Field(default=1, ge=1, description="first indexed layers that keep their indexer")
    stages: int = Field(
        default=1, ge=1, description="pipeline stages; the first indexed layer of each keeps its indexer"
    )
    compare: bool = Field(default=True, description="also measure one-shot, uniform and overlap-ranked patterns")
    reuse: bool = Field(default=True, description="start candidates at what a flip changes; false: the plain search")
    hold: float = Field(
        default=4, ge=0, description="GiB of candidates' states that are held, so that they start higher up; 0: none"
    )

    @field_validator("keep", "max_loss", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        return float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else value

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.keep is None and self.max_loss is None:
            raise ValueError("give keep (a target) or max_loss (a budget)")
        return self

    def tier_of_run(self) -> Tier:
        """The search alone trains nothing."""
        return "minutes" if self.steps else "training-free"

    def budget(self) -> float | None:
        """What the search must not exceed on its own text must hold on held-out text as well."""
        return self.max_loss

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Search a pattern, train the indexers that it keeps. See :class:`sparsec.passes.base.Pass`."""
        model = program.model
        every = program.plan.indexed()
        plan = with_pattern(program.plan, {i: program.plan.layers[i].index for i in every})
        length = self.context or self._context(plan, int(model.config.max_position_embeddings))
        rows = min(self.rows, length // 2)
        windows = self._windows(plan, calibration, length, program.seed)
        state = program.scratch / "search.json" if program.scratch else None
        full = self._target(len(every))
        with applied(model, plan, program.tensors):
            search = Search(
                model, plan, program.tensors, windows, length - rows, self.reuse,
                listen=program.listen, hold=int(self.hold * 2**30), state=state,
            )  # fmt: skip
            if self.pattern is not None:
                search.take(given_pattern(plan, self.pattern))
            else:
                search.run(Goal(full, self.max_loss, self._fixed(plan), self.order, self.margin))
            others = self._others(search, plan)
        flips, plan = search.flips, search.plan
        tensors = _needed(plan, program.tensors)
        measured = {
            "pattern": plan.pattern,
            "layers": list(plan.indexed()),
            "loss_before": search.base,
            "loss_after": search.now,
            "flips": flips,
            "stopped": search.stopped,
            "order": self.order,
            "overlap": [[round(value, 4) for value in row] for row in search.overlap],
            "others": others,
            "candidates": search.work.candidates,
            "layer_evaluations": search.work.layers,
            "layer_evaluations_plain": search.work.layers_plain,
            "layer_tokens": search.work.tokens,
            "layer_tokens_plain": search.work.tokens_plain,
            "windows": self.windows,
            "documents": self.documents,
            "context": length,
            "rows": rows,
        }
        weights: dict[str, Tensor] = {}
        if self.steps and "S" in plan.pattern:
            if plan.dsa is not None:
                weights, measured["trained"] = self._train_own(program, calibration, plan, length)
            else:
                tensors, measured["trained"] = self._train(program, calibration, plan, tensors, length)
        return PassResult(plan, tensors, measured, weights)

    def _fixed(self, plan: Plan) -> frozenset[int]:
        """Layers that keep their indexer: the first ones, and the first indexed one of every pipeline stage."""
        every = plan.indexed()
        starts = stage_starts(plan.model.layers, self.stages)
        first = [
            next((i for i in every if begin <= i < end), None) for begin, end in pairwise([*starts, plan.model.layers])
        ]
        return frozenset(every[: self.near_full]) | {i for i in first if i is not None}

    def _others(self, search: Search, plan: Plan) -> dict[str, Any]:
        """One-shot, uniform and overlap-ranked patterns with as many indexers, on the same rows: paired differences."""
        if not search.flips or not self.compare:
            return {}
        mine = search.losses(search.plan)
        found = {}
        full = search.plan.pattern.count("F")
        for name, other in other_patterns(plan, full, search.flips, search.overlap).items():
            theirs = search.losses(other)
            difference, error = paired(theirs, mine)
            found[name] = {"pattern": other.pattern, "loss": float(theirs.mean()), "above": difference, "error": error}
        return found

    def _train(
        self, program: Program, calibration: Calibration, plan: Plan, tensors: dict[str, Tensor], length: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Kept indexers for all layers they serve, and what it brought."""
        selector, window, model = plan.selector, plan.window, program.model
        assert selector is not None
        readable = int(model.config.max_position_embeddings)
        text = FitText(
            windows=self.fit_windows,
            context=length,
            reach=max(length, min(readable, self.reach or readable)),
            local=window.size if window else length // 4,
            sinks=window.sinks if window else selector.sinks,
            needles=self.needles,
            words=self.needle_words,
            rows=self.fit_rows,
            mined=0,
            seed=program.seed + 2,
        )
        forced = Forced(selector.sinks, selector.recent)
        heads = {i: plan.layers[i].retrieval for i in plan.indexed()}
        windows = fit_windows(
            model, plan, heads, calibration, text,
            rope=selector.rope, forced=forced, listen=program.listen, stage="capture for shared indexers",
        )  # fmt: skip
        names = {
            i: tuple(f"model.layers.{i}.self_attn.indexer.{part}.weight" for part in ("q_proj", "k_proj"))
            for i in readers(plan)
        }
        weights = {i: (tensors[q].to(model.device), tensors[k].to(model.device)) for i, (q, k) in names.items()}
        served = assigned(windows, weights, plan, forced)
        before = mean_multi_layer(windows, weights, served, forced)
        weights, served, losses = train_shared(
            windows, weights, plan,
            forced=forced, steps=self.steps, lr=self.lr or 5e-3, seed=program.seed, listen=program.listen,
        )  # fmt: skip
        trained = {
            name: weight.cpu() for i, pair in weights.items() for name, weight in zip(names[i], pair, strict=True)
        }
        return trained, {
            "kl_before": before,
            "kl_trained": mean_multi_layer(windows, weights, served, forced),
            "losses": [round(loss, 5) for loss in losses],
            "windows": self.fit_windows,
            "rows": self.fit_rows,
            "serves": {str(i): [layer for layer in layers if layer != i] for i, layers in readers(plan).items()},
        }

    def _train_own(
        self, program: Program, calibration: Calibration, plan: Plan, length: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The same for a model's own indexers, which are base weights."""
        seed = program.seed + 2
        return train_dsa(
            program.model,
            plan,
            list(calibration.windows("train", length, self.fit_windows, seed=seed)),
            list(calibration.windows("search", length, 1, seed=seed)),
            rows=min(self.fit_rows, length),
            steps=self.steps,
            lr=self.lr or 1e-3,
            seed=program.seed,
            listen=program.listen,
        )

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """At most half a forward of the decode rows a candidate, the prompts once, and the windows of the fit."""
        indexed = len(plan.indexed()) or plan.model.layers // 2
        length = self.context or self._context(plan, max_positions)
        rows = min(self.rows, length // 2)
        flips = max(0, indexed - self._target(indexed))
        candidates = sum(indexed - 1 - i for i in range(flips))
        again = length if plan.selects_in_prefill else rows
        searched = (self.windows + self.documents) * (length + candidates * again // 2)
        fitted = 2 * self.fit_windows * length + self.steps * length // 32 if self.steps else 0
        cached = plan.model.layers * plan.model.kv_heads * plan.model.head_dim * 8
        # Hidden states of candidates, half of the layers of each; as wide as all heads together in most models.
        states = indexed * plan.model.layers // 2 * again * plan.model.heads * plan.model.head_dim * 4
        held = min(int(self.hold * 2**30), (self.windows + self.documents) * states)
        return Cost(tokens=searched + fitted, resident=(self.windows + self.documents) * length * cached + held)

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
            window=plan.window.size if plan.window else length // 8,
            sinks=plan.window.sinks if plan.window else 4,
            needles_per_document=self.needles,
            words=self.needle_words,
            seed=seed,
        )
        return texts + [document.tokens for document in documents]

    def _context(self, plan: Plan, readable: int) -> int:
        return min(readable, 4 * (plan.span or 512))  # else nothing is chosen, and no pattern makes a difference

    def _target(self, indexed: int) -> int:
        return max(1, round(self.keep * indexed)) if self.keep is not None else 1


def _needed(plan: Plan, tensors: Any) -> dict[str, Tensor]:
    """Shared layers lose their indexers."""
    return {name: tensors[name] for name in tensor_names(plan)}
