"""rtpurbo: keep the retrieval heads, window the others, fit a low-rank indexer to each head that is kept.

RTPurbo, "Full Attention Strikes Back" (arXiv 2605.16928): about 15 % of query heads do long-range retrieval. They stay
dense in prefill; in decode a rank-16 projection of q and k scores the cache, top-p 0.9 of its softmax mass is kept, and
attention on that set is exact. All other heads see sinks and a window. The paper projects before RoPE; after it is the
default here, because it finds the same mass in fewer tokens (benchmarks/indexers.py measures both).

This is detection, partition, the causal check and stage 1 (projections, backbone frozen). Weights do not change;
stage 2 is the pass ``distill``. What the paper leaves open and what is chosen here: docs/passes/rtpurbo.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from sparsec.calibrate.decode import decode_rows
from sparsec.calibrate.decode_bytes import break_even, resident_bytes
from sparsec.calibrate.fit_windows import FitText, fit_windows
from sparsec.calibrate.head_gates import learn_gates
from sparsec.calibrate.indexer_fit import Forced, closed_form, mean_kl, train
from sparsec.calibrate.needles import needle_documents
from sparsec.calibrate.prefill_quality import prefill_quality
from sparsec.calibrate.questions import training_windows
from sparsec.calibrate.retrieval_heads import needle_mass
from sparsec.calibrate.selector_stats import SelectorStats
from sparsec.calibrate.splits import Calibration
from sparsec.errors import CalibrationError, PlanError
from sparsec.events import Event, tracked
from sparsec.passes.base import Cost, Need, Pass, PassResult, Program, Tier, is_start
from sparsec.passes.split import (
    Granularity,
    Heads,
    best_heads,
    best_units,
    by_layer,
    causal_check,
    scaled_window,
    split_plan,
    splittable,
    unit_of,
    units_kept,
    with_every_layer,
)
from sparsec.plan import Coarse, Plan, Selector, Window
from sparsec.plugins.runtime import applied

LONGEST = 16384  # tokens that selectors are measured on, and gates trained on, at most
LEAST_WINDOWS = 4  # of the train text, that a length is taken for gates
MOST_RECENT = 512  # tokens that the window makes retrieval heads keep
DECODE_ROWS = 512  # of a window with questions, at its end
BY_CONTEXT = ("recall_mean", "recall_p5", "far_mean", "kept_mean", "kept_p95", "oracle_recall_mean", "oracle_kept_mean")


class Rtpurbo(Pass):
    """Head split and indexers. Windows, sinks and contexts are tokens."""

    name: ClassVar[str] = "rtpurbo"
    tier: ClassVar[Tier] = "minutes"
    presets: ClassVar[Mapping[Tier, Mapping[str, Any]]] = {
        "training-free": {"steps": 0},
        "minutes": {},
        "hours": {"choose": "gates", "windows": 16, "steps": 600, "forced_recent": None},
    }
    summary: ClassVar[str] = "keep retrieval heads with low-rank indexers, window the other heads"
    source: ClassVar[str] = "RTPurbo, arXiv 2605.16928"
    after: ClassVar[tuple[str, ...]] = ("dynamic-tokenization",)
    conflicts: ClassVar[tuple[str, ...]] = ("razor", "window")
    needs: ClassVar[tuple[Need, ...]] = ("a dense model",)
    gives: ClassVar[tuple[Need, ...]] = ("heads", "indexers")

    ratio: float = Field(default=0.15, gt=0, lt=1, description="share of heads kept as retrieval heads")
    granularity: Granularity = Field(
        default="query_head",
        description="kv_head decides for whole GQA groups, so that every local KV head is freed",
    )
    choose: Literal["needles", "gates"] = Field(
        default="needles",
        description="heads by their needle mass (the paper), or by gates trained under a budget (DuoAttention's idea)",
    )
    gate_steps: int = Field(default=120, ge=2, description="of training gates, two windows each")
    gate_context: int | None = Field(
        default=None, ge=128, description="tokens a window of training gates; null: as reach, at most 16384"
    )
    per_layer: int = Field(
        default=0, ge=0, description="retrieval heads that every layer has at least, beside the best ones (ours)"
    )
    window: int | None = Field(default=None, ge=1, description="null: 1/16 of what the model reads, at most 8192")
    sinks: int = Field(default=4, ge=0, description="first tokens that local heads always see")
    min_context: int | None = Field(default=None, ge=0, description="dense up to here; null: window + sinks")
    rank: int = Field(
        default=16, ge=1, le=256, description="rows of the projections, at most head_dim; 16 fills a tensor-core tile"
    )
    rope: Literal["pre", "post"] = Field(default="post", description="q and k before (the paper) or after RoPE")
    top_p: float = Field(default=0.9, gt=0, le=1, description="kept share of the selector's mass")
    select: Literal["token", "block"] = Field(default="token", description="granularity of the selection")
    sets: Literal["head", "kv_head"] = Field(
        default="head",
        description="whose each set is: a retrieval head's, or those' that read one KV head (their union)",
    )
    block: int = Field(default=64, ge=1, description="tokens a block")
    prefill: Literal["dense", "selector"] = Field(
        default="dense", description="prompt rows of retrieval heads: dense (the paper), or key blocks by the selector"
    )
    query_block: int = Field(default=64, ge=1, le=1024, description="prompt rows that choose key blocks together")
    vote_every: int = Field(default=1, ge=1, le=1024, description="every so-manyth of these rows decides for them")
    index_dtype: Literal["model", "fp8"] = Field(
        default="model", description="projected keys in the cache: its own dtype, or fp8: 53 % of bf16's bytes (ours)"
    )
    coarse_from: int | None = Field(
        default=None, ge=0, description="longer contexts score tokens in the best blocks alone (ours); null: never"
    )
    coarse_one_in: int = Field(default=4, ge=2, le=1024, description="of so many blocks one is scored there")
    forced_recent: int | None = Field(
        default=64, ge=0, description="latest tokens that retrieval heads always keep (ours); null: window, at most 512"
    )
    min_keep: int = Field(default=64, ge=0, description="unforced tokens kept at least (ours); the paper's block is 64")
    context: int | None = Field(default=None, ge=128, description="tokens a calibration window; null: 4 windows")
    documents: int = Field(default=8, ge=2, description="documents that needles are hidden in")
    needles: int = Field(default=4, ge=1, description="needles a document")
    needle_words: int = Field(default=24, ge=4, description="words a needle")
    target: Literal["lumped", "all"] = Field(
        default="lumped", description="stage-1 target: forced tokens as one outcome (ours), or each by itself (paper)"
    )
    reach: int | None = Field(
        default=None, ge=128, description="tokens that indexers are fitted for, and measured on; null: all it reads"
    )
    stretch: bool = Field(default=True, description="positions of stage-1 windows go up to reach, with jumps (ours)")
    windows: int = Field(default=4, ge=1, description="text windows, and as many needle documents, of stage 1")
    rows: int = Field(default=512, ge=64, description="query rows sampled from each")
    mined: int = Field(default=256, ge=0, description="more rows of each, those with the sharpest far attention (ours)")
    steps: int = Field(default=150, ge=0, description="stage-1 steps of 64 rows (the paper: 600 of one sequence each)")
    lr: float = Field(default=5e-3, gt=0, description="peak learning rate of stage 1 (the paper: 1e-3)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.coarse_from is not None and (self.select != "block" or self.top_p >= 1):
            raise ValueError("coarse_from needs select=block and a top_p below 1")
        return self

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Detect, split, check, fit. See :class:`sparsec.passes.base.Pass`."""
        plan, model, listen = program.plan, program.model, program.listen
        given = plan.window if is_start(plan) else None
        allowed = splittable(program, self.name, given=given is not None)
        readable = int(model.config.max_position_embeddings)
        window = given.size if given is not None else self.window_for(readable)
        sinks = given.sinks if given is not None else self.sinks
        context = self.context or min(readable, 4 * window)

        documents = needle_documents(
            calibration,
            split="train",
            count=self.documents,
            length=context,
            window=window,
            sinks=sinks,
            needles_per_document=self.needles,
            words=self.needle_words,
            seed=program.seed,
        )
        reach = max(context, min(readable, self.reach or readable))
        if self.reach is not None and self.reach > readable:
            listen(Event("reach", note=f"lowered to {readable} tokens, all that the model reads"))
        sized = Window(size=window, sinks=sinks)
        least = plan.min_context if given is not None else self.min_context
        scores = needle_mass(model, documents, plan.model, listen)
        heads, measured = self._partition(scores, plan, allowed)
        if given is not None:
            heads = self._given(plan, heads, measured)
            if self.choose == "gates":
                listen(Event("choose heads", note="the split that the compile starts from stays: no gates are trained"))
        elif self.choose == "gates":
            heads = self._by_gates(program, calibration, split_plan(plan, {}, sized, least), scores, allowed, measured)
        listen(Event("detect retrieval heads", note=f"kept {sum(map(len, heads.values()))} heads"))
        measured |= {"window": window, "context": context, "reach": reach, "readable": readable}
        measured["causal_check"] = causal_check(program, documents[:3], heads, allowed, sized, least)

        split = self._split(plan, heads, sized, least)
        forced = Forced(sinks, self._recent(window), lump=self.target == "lumped")
        text = FitText(
            windows=self.windows,
            context=context,
            reach=reach if self.stretch else context,
            local=window,
            sinks=sinks,
            needles=self.needles,
            words=self.needle_words,
            rows=self.rows,
            mined=self.mined,
            seed=program.seed,
        )
        samples = fit_windows(model, split, heads, calibration, text, rope=self.rope, forced=forced, listen=listen)
        weights = {}
        for layer in tracked(list(heads), "closed form", listen, len(heads)):
            weights[layer] = closed_form([sample[layer] for sample in samples], self.rank, forced)
        before = mean_kl(samples, weights, forced)
        losses: list[float] = []
        if self.steps:
            weights, losses = train(
                samples, weights, forced=forced, steps=self.steps, lr=self.lr, seed=program.seed, listen=listen
            )
        measured["stage1"] = {
            "kl_closed_form": before,
            "kl_trained": mean_kl(samples, weights, forced),
            "losses": [round(loss, 5) for loss in losses],
            "windows": self.windows,
            "needle_documents": self.windows,
            "rows": self.rows,
            "mined": self.mined,
        }
        del samples
        tensors = {
            f"model.layers.{layer}.self_attn.indexer.{part}.weight": weight.cpu()
            for layer, pair in weights.items()
            for part, weight in zip(("q_proj", "k_proj"), pair, strict=True)
        }
        measured["selector"] = self._selector(program, calibration, split, tensors, min(reach, LONGEST))
        if self.prefill == "selector":
            measured["prefill"] = self._prefill(program, calibration, split, tensors, min(reach, LONGEST))
        return PassResult(split, tensors, measured)

    def tier_of_run(self) -> Tier:
        """Gates take minutes on a GPU alone."""
        return "hours" if self.choose == "gates" else self.tier

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """Detection, two causal checks and captures are forwards, and so are measurements, of longer windows."""
        context = self.context or min(max_positions, 4 * self.window_for(max_positions))
        far = min(max_positions, self.reach or LONGEST, LONGEST)
        forwards = (self.documents + 2 * 3 + 2 * self.windows) * context
        measured = (2 + 4 * (self.prefill == "selector")) * far
        kept = round(self.ratio * plan.model.layers * plan.model.heads) + self.per_layer * plan.model.layers
        resident = 2 * self.windows * kept * (2 * self.rows + 2 * context) * plan.model.head_dim * 4
        # Two windows a step of gates: the teacher's forward, the student's, and a backward through activations alone.
        trained = self.choose == "gates" and not is_start(plan)
        gates = trained * self.gate_steps * 2 * 3 * min(max_positions, self.gate_context or far)
        # A training step is a few matrix products of rows x context x head_dim a head: small beside a forward.
        return Cost(tokens=forwards + measured + gates + self.steps * context // 32, resident=resident)

    def window_for(self, readable: int) -> int:
        """The paper's 8192 belongs to models that read 128K and more: scaled to 1/16 of what this one reads."""
        return scaled_window(self.window, readable)

    def _recent(self, window: int) -> int:
        return min(window, MOST_RECENT) if self.forced_recent is None else self.forced_recent

    def _partition(self, scores: Tensor, plan: Plan, allowed: Tensor) -> tuple[Heads, dict[str, Any]]:
        """Global over layers, by query head or by KV head (a group is as good as its best head)."""
        shape, mean = plan.model, scores.mean(0)
        possible = int(allowed.sum()) * shape.heads
        chosen, stable = best_heads(scores, self.ratio, shape, allowed, self.granularity)
        chosen = with_every_layer(chosen, scores, self.per_layer, shape, allowed, self.granularity)
        heads = by_layer(chosen)
        measured = {
            "head_scores": [[round(float(s), 6) for s in row] for row in mean],
            "rank_stability": stable,
            "needles": self.documents * self.needles,
            "kept_heads": len(chosen),
            "possible_heads": possible,
        }
        return heads, measured

    def _by_gates(
        self,
        program: Program,
        calibration: Calibration,
        local: Plan,
        scores: Tensor,
        allowed: Tensor,
        measured: dict[str, Any],
    ) -> Heads:
        """The heads whose gates are open in the end, and how many of them needles would keep. local: keeps no head."""
        shape = local.model
        length = self._gate_context(program, calibration, local)
        rows = min(DECODE_ROWS, length // 4)
        count = units_kept(self.ratio, shape, allowed, self.granularity)
        windows = training_windows(
            calibration,
            "train",
            length=length,
            count=2 * self.gate_steps,
            rows=rows,
            questions=0.5,
            seed=program.seed,
        )
        gates = learn_gates(
            program.model,
            windows,
            local,
            count=count,
            unit=unit_of(shape, self.granularity),
            rows=rows,
            seed=program.seed,
            listen=program.listen,
        )
        opened = best_units(gates.scores, count, shape, allowed)
        needles, _ = best_heads(scores, self.ratio, shape, allowed, self.granularity)
        chosen = with_every_layer(opened, scores, self.per_layer, shape, allowed, self.granularity)
        last = max(1, self.gate_steps // 10)
        measured["kept_heads"] = len(chosen)
        measured["gates"] = {
            "steps": self.gate_steps,
            "context": length,
            "scores": [[round(x, 4) if x > float("-inf") else None for x in row] for row in gates.scores.tolist()],
            "text_kl": sum(gates.text[-last:]) / last,
            "questions_kl": sum(gates.questions[-last:]) / last,
            "open": len(opened),
            "agree_with_needles": len(set(opened) & set(needles)),
        }
        return by_layer(chosen)

    def _gate_context(self, program: Program, calibration: Calibration, local: Plan) -> int:
        """Tokens of a window that gates train on.

        Raises:
            CalibrationError: none is twice what local heads see, or the text has none as long as was asked for.
        """
        readable = int(program.model.config.max_position_embeddings)
        wanted = min(readable, self.gate_context or min(LONGEST, self.reach or LONGEST))
        if self.gate_context is not None and self.gate_context > readable:
            program.listen(Event("gate_context", note=f"lowered to {readable} tokens, all that the model reads"))
        found = calibration.longest("train", wanted, LEAST_WINDOWS)
        if self.gate_context is not None and found < wanted:
            raise CalibrationError(
                f"the train text has no {LEAST_WINDOWS} windows of {wanted} tokens, {found} at most: lower "
                "rtpurbo.gate_context or use longer documents"
            )
        assert local.window is not None
        least = 2 * max(local.window.size + local.window.sinks, local.min_context)
        if found < least:
            raise CalibrationError(
                f"gates need windows of {least} tokens, twice what local heads see, and have {found}: raise "
                "rtpurbo.gate_context, use longer documents, or rtpurbo.choose=needles"
            )
        return found

    def _given(self, plan: Plan, found: Heads, measured: dict[str, Any]) -> Heads:
        """The heads of the split that the compile started from; how many of them detection would keep is noted.

        Raises:
            PlanError: the split keeps no head.
        """
        heads: Heads = {i: layer.retrieval for i, layer in enumerate(plan.layers) if layer.heads and layer.retrieval}
        if not heads:
            raise PlanError(f"the split that the compile starts from keeps no head: {self.name} has nothing to fit")
        ours = {(layer, head) for layer, row in found.items() for head in row}
        theirs = {(layer, head) for layer, row in heads.items() for head in row}
        measured["given"] = {"detected": len(ours), "agree": len(ours & theirs)}
        measured["kept_heads"] = len(theirs)
        return heads

    def _split(self, plan: Plan, heads: Heads, window: Window, min_context: int | None) -> Plan:
        """Retrieval heads with an indexer, all others local."""
        selector = Selector(
            rank=min(self.rank, plan.model.head_dim),
            rope=self.rope,
            top_p=self.top_p,
            granularity=self.select,
            block=self.block,
            sinks=window.sinks,
            recent=self._recent(window.size),
            min_keep=self.min_keep,
            scope=self.sets,
            prefill=self.prefill,
            query_block=self.query_block,
            vote_every=self.vote_every,
            index_dtype=self.index_dtype,
            coarse=Coarse(min_context=self.coarse_from, one_in=self.coarse_one_in)
            if self.coarse_from is not None
            else None,
        ).model_dump()
        return split_plan(plan, heads, window, min_context, index="full", selector=selector)

    def _selector(
        self, program: Program, calibration: Calibration, plan: Plan, tensors: dict[str, Tensor], reach: int
    ) -> dict[str, Any]:
        """Mass recall, tokens kept and bytes on text that no training saw, in decode rows, at three contexts."""
        longest = max(128, calibration.longest("search", reach))
        lengths = [longest // 4, longest // 2, longest]
        found = []
        with applied(program.model, plan, tensors):
            for length in tracked(lengths, "measure selectors", program.listen, len(lengths)):
                (tokens,) = calibration.windows("search", length, 1, seed=program.seed)
                stats = SelectorStats()
                decode_rows(program.model, tokens, length - min(512, length // 4), stats)
                found.append(stats)
        reads = [read for stats in found for read in stats.reads()]
        return {
            "summary": found[-1].summary(),
            "contexts": [
                {"context": length, **{name: summary[name] for name in BY_CONTEXT}}
                for length, summary in zip(lengths, (stats.summary() for stats in found), strict=True)
                if summary
            ],
            "context": longest,
            "heads": found[-1].table(),
            "reads": [read.to_json() for read in reads],
            "break_even": break_even(reads) if reads else None,
            "resident": resident_bytes(plan, longest, program.model.dtype.itemsize),
        }

    def _prefill(
        self, program: Program, calibration: Calibration, plan: Plan, tensors: dict[str, Tensor], reach: int
    ) -> dict[str, Any]:
        """What prompt rows that choose cost, on the same text as the selectors."""
        longest = max(128, calibration.longest("search", reach, 2))
        windows = calibration.windows("search", longest, 2, seed=program.seed)
        return prefill_quality(program.model, plan, tensors, calibration.tokenizer, list(windows), program.listen)
