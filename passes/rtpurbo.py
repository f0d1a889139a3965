"""rtpurbo: keep the retrieval heads, window the others, fit a low-rank indexer to each head that is kept.

RTPurbo, "Full Attention Strikes Back" (arXiv 2605.16928): about 15 % of query heads do long-range retrieval. They stay
dense in prefill; in decode a rank-16 projection of q and k before RoPE scores the cache, top-p 0.9 of its softmax mass
is kept, and attention on that set is exact. All other heads see sinks and a window.

This is detection, partition, the causal check and stage 1 (projections, backbone frozen). Weights do not change.
What the paper leaves open and what is chosen here: docs/passes/rtpurbo.md.
"""

from __future__ import annotations

import random
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsec.calibrate.decode import SelectorStats, decode_rows
from sparsec.calibrate.indexer_fit import (
    Forced,
    closed_form,
    mean_kl,
    needle_rows,
    sample_window,
    text_rows,
    train,
)
from sparsec.calibrate.indexer_fit import Window as SampledWindow
from sparsec.calibrate.needles import NeedleDocument, needle_documents
from sparsec.calibrate.retrieval_heads import copying_accuracy, needle_mass, stability, top_heads
from sparsec.calibrate.splits import Calibration
from sparsec.errors import PlanError
from sparsec.events import Event, tracked
from sparsec.passes.base import Cost, Pass, PassResult, Program
from sparsec.plan import Plan, Selector, Window
from sparsec.plugins.families import native_local_layers
from sparsec.plugins.runtime import applied

Heads = dict[int, tuple[int, ...]]  # by layer


class Rtpurbo(Pass):
    """Head split and indexers. Windows, sinks and contexts are tokens."""

    name: ClassVar[str] = "rtpurbo"
    tier: ClassVar[Literal["minutes"]] = "minutes"
    summary: ClassVar[str] = "keep retrieval heads with low-rank indexers, window the other heads"
    source: ClassVar[str] = "RTPurbo, arXiv 2605.16928"
    gives: ClassVar[tuple[Literal["heads", "indexers"], ...]] = ("heads", "indexers")

    ratio: float = Field(default=0.15, gt=0, lt=1, description="share of heads kept as retrieval heads")
    granularity: Literal["query_head", "kv_head"] = Field(
        default="query_head",
        description="kv_head decides for whole GQA groups, so that every local KV head is freed",
    )
    window: int | None = Field(default=None, ge=1, description="null: 1/16 of what the model reads, at most 8192")
    sinks: int = Field(default=4, ge=0, description="first tokens that local heads always see")
    min_context: int | None = Field(default=None, ge=0, description="dense up to here; null: window + sinks")
    rank: int = Field(
        default=16, ge=1, le=256, description="rows of the projections, at most head_dim; 16 fills a tensor-core tile"
    )
    rope: Literal["pre", "post"] = Field(default="pre", description="q and k before (the paper) or after RoPE")
    top_p: float = Field(default=0.9, gt=0, le=1, description="kept share of the selector's mass")
    select: Literal["token", "block"] = Field(default="token", description="granularity of the selection")
    block: int = Field(default=64, ge=1, description="tokens a block")
    forced_recent: int = Field(default=64, ge=0, description="latest tokens that retrieval heads always keep (ours)")
    min_keep: int = Field(default=64, ge=0, description="unforced tokens kept at least (ours); the paper's block is 64")
    context: int | None = Field(default=None, ge=128, description="tokens a calibration window; null: 4 windows")
    documents: int = Field(default=8, ge=2, description="documents that needles are hidden in")
    needles: int = Field(default=4, ge=1, description="needles a document")
    needle_words: int = Field(default=24, ge=4, description="words a needle")
    target: Literal["lumped", "all"] = Field(
        default="lumped", description="stage-1 target: forced tokens as one outcome (ours), or each by itself (paper)"
    )
    windows: int = Field(default=6, ge=1, description="text windows, and as many needle documents, of stage 1")
    rows: int = Field(default=512, ge=64, description="query rows sampled from each")
    mined: int = Field(default=256, ge=0, description="more rows of each, those with the sharpest far attention (ours)")
    steps: int = Field(default=600, ge=0, description="stage-1 steps of 64 rows (the paper: 600 of one sequence each)")
    lr: float = Field(default=5e-3, gt=0, description="peak learning rate of stage 1 (the paper: 1e-3)")

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Detect, split, check, fit. See :class:`sparsec.passes.base.Pass`."""
        plan, model, listen = program.plan, program.model, program.listen
        if any(layer.local for layer in plan.layers):
            raise PlanError("rtpurbo starts from a dense plan, this one already has local heads: run it first")
        readable = int(model.config.max_position_embeddings)
        window = self.window_for(readable)
        context = self.context or min(readable, 4 * window)
        allowed = torch.ones(plan.model.layers, dtype=torch.bool)
        allowed[list(native_local_layers(model.config))] = False
        if not allowed.any():
            raise PlanError("the model runs every layer with its own sliding window: there is nothing left to split")

        documents = self._documents(calibration, context, window, self.documents, program.seed)
        scores = needle_mass(model, documents, plan.model, listen)
        heads, measured = self._partition(scores, plan, allowed)
        listen(Event("detect retrieval heads", note=f"kept {sum(map(len, heads.values()))} heads"))
        measured |= {"window": window, "context": context, "readable": readable}
        measured["causal_check"] = self._causal_check(program, documents[:3], heads, allowed, window)

        split = self._split(plan, heads, window)
        samples = self._samples(program, calibration, split, heads, context, window)
        forced = Forced(self.sinks, self.forced_recent, lump=self.target == "lumped")
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
        measured["selector"] = self._selector(program, calibration, split, tensors, context)
        return PassResult(split, tensors, measured)

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """Detection, two causal checks, captures and the selector's measurement are forwards of one window each."""
        context = self.context or min(max_positions, 4 * self.window_for(max_positions))
        forwards = self.documents + 2 * 3 + 2 * self.windows + 2
        kept = round(self.ratio * plan.model.layers * plan.model.heads)
        resident = 2 * self.windows * kept * (2 * self.rows + 2 * context) * plan.model.head_dim * 4
        # A training step is a few matrix products of rows x context x head_dim a head: small beside a forward.
        return Cost(tokens=forwards * context + self.steps * context // 32, resident=resident)

    def window_for(self, readable: int) -> int:
        """The paper's 8192 belongs to models that read 128K and more: scaled to 1/16 of what this one reads."""
        return self.window or max(16, min(8192, readable // 16))

    def _documents(
        self, calibration: Calibration, length: int, window: int, count: int, seed: int
    ) -> list[NeedleDocument]:
        return needle_documents(
            calibration,
            split="train",
            count=count,
            length=length,
            window=window,
            sinks=self.sinks,
            needles_per_document=self.needles,
            words=self.needle_words,
            seed=seed,
        )

    def _partition(self, scores: Tensor, plan: Plan, allowed: Tensor) -> tuple[Heads, dict[str, Any]]:
        """Global over layers, by query head or by KV head (a group is as good as its best head)."""
        shape, mean = plan.model, scores.mean(0)
        possible = int(allowed.sum()) * shape.heads
        if self.granularity == "query_head":
            count = max(1, round(self.ratio * possible))
            chosen = top_heads(mean, count, allowed)
            stable = stability(scores, count, allowed)
        else:
            count = max(1, round(self.ratio * possible / shape.group))
            grouped = scores.reshape(*scores.shape[:-1], shape.kv_heads, shape.group).amax(-1)
            stable = stability(grouped, count, allowed)
            chosen = [
                (layer, kv * shape.group + place)
                for layer, kv in top_heads(grouped.mean(0), count, allowed)
                for place in range(shape.group)
            ]
        heads: Heads = {}
        for layer, head in chosen:
            heads[layer] = (*heads.get(layer, ()), head)
        measured = {
            "head_scores": [[round(float(s), 6) for s in row] for row in mean],
            "rank_stability": stable,
            "needles": self.documents * self.needles,
            "kept_heads": len(chosen),
            "possible_heads": possible,
        }
        return heads, measured

    def _split(self, plan: Plan, heads: Heads, window: int, index: str = "full") -> Plan:
        """Retrieval heads with an indexer, all others local."""
        layers = [
            layer.model_dump()
            if layer.heads is None
            else {
                "heads": tuple(int(h in heads.get(i, ())) for h in range(plan.model.heads)),
                "index": index if heads.get(i) else "none",
            }
            for i, layer in enumerate(plan.layers)
        ]
        selector = Selector(
            rank=min(self.rank, plan.model.head_dim),
            rope=self.rope,
            top_p=self.top_p,
            granularity=self.select,
            block=self.block,
            sinks=self.sinks,
            recent=self.forced_recent,
            min_keep=self.min_keep,
        )
        return plan.edit(
            layers=layers,
            window=Window(size=window, sinks=self.sinks).model_dump(),
            selector=selector.model_dump(),
            min_context=self.min_context if self.min_context is not None else window + self.sinks,
        )

    def _causal_check(
        self, program: Program, documents: list[NeedleDocument], heads: Heads, allowed: Tensor, window: int
    ) -> dict[str, Any]:
        """The kept heads made local must break copying; as many random other heads must not."""
        shape = program.plan.model
        kept = {(layer, head) for layer, found in heads.items() for head in found}
        others = [
            (layer, head)
            for layer in range(shape.layers)
            if bool(allowed[layer])
            for head in range(shape.heads)
            if (layer, head) not in kept
        ]
        drawn = set(random.Random(program.seed).sample(others, min(len(kept), len(others))))
        found: dict[str, Any] = {"heads": len(kept)}
        found["dense"], found["tokens"] = copying_accuracy(program.model, documents)
        for name, local in (("kept_heads_local", kept), ("random_heads_local", drawn)):
            rest: Heads = {
                layer: tuple(h for h in range(shape.heads) if (layer, h) not in local) for layer in range(shape.layers)
            }
            with applied(program.model, self._split(program.plan, rest, window, index="none")):
                found[name] = copying_accuracy(program.model, documents)[0]
            program.listen(Event("causal check", note=f"{name}: copies {found[name]:.0%} of needle tokens"))
        return found

    def _samples(
        self, program: Program, calibration: Calibration, split: Plan, heads: Heads, context: int, window: int
    ) -> list[SampledWindow]:
        """Text windows and needle documents in turn; other needles than those that heads were detected with."""
        generator = torch.Generator().manual_seed(program.seed)
        texts = calibration.windows("train", context, self.windows, seed=program.seed)
        documents = self._documents(calibration, context, window, self.windows, program.seed + 1)
        wanted = []
        for text, document in zip(texts, documents, strict=True):
            wanted.append((text, text_rows(context, window, self.rows, generator)))
            wanted.append((document.tokens, needle_rows(document, window, self.rows, generator)))
        forced = Forced(self.sinks, self.forced_recent)
        return [
            sample_window(
                program.model,
                split,
                heads,
                tokens,
                at,
                rope=self.rope,
                mined=self.mined,
                forced=forced,
                generator=generator,
            )
            for tokens, at in tracked(wanted, "capture attention", program.listen, len(wanted))
        ]

    def _selector(
        self, program: Program, calibration: Calibration, plan: Plan, tensors: dict[str, Tensor], context: int
    ) -> dict[str, Any]:
        """Mass recall and tokens kept on text that no training saw, in decode rows."""
        stats = SelectorStats()
        windows = calibration.windows("search", context, 2, seed=program.seed)
        with applied(program.model, plan, tensors):
            for tokens in tracked(windows, "measure selectors", program.listen, len(windows)):
                decode_rows(program.model, tokens, context - min(256, context // 4), stats)
        return {"summary": stats.summary(), "heads": stats.table()}
