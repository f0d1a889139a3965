"""distill: train the weights under the plan until the sparse model answers as the dense one did.

RTPurbo's second stage (arXiv 2605.16928, "Low-cost Two-Stage Training"): self-distillation on the teacher's top 10
tokens, projections frozen. It trains whatever plan the passes before it left: with or without shared indexes,
rtpurbo's, razor's, windows only, or routed units alone (Informed Routing's third stage, routers and forecasters
frozen). What the papers leave open and what is chosen here: docs/passes/distill.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparsec.calibrate import ranks
from sparsec.calibrate.distillation import Lesson, Settings, distill, hold_out, precision
from sparsec.calibrate.questions import training_windows
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.teacher import TopK, identity, read_kept, save_kept, top_k, weights_digest
from sparsec.calibrate.trainable import changed_weights, copied_weights, put_weights, recomputes, trainable
from sparsec.errors import PlanError, TrainingError
from sparsec.events import Event
from sparsec.passes.base import Cost, Needs, Pass, PassResult, Program, Tier
from sparsec.plan import Plan
from sparsec.plugins.fused import fused_layers
from sparsec.plugins.runtime import applied

LONGEST = 16384  # tokens a window, unless asked for: activations grow with it
LEAST_WINDOWS = 4  # of the train text, that a length is taken for all of them


class Distill(Pass):
    """How long, on what, which weights. Contexts and rows are tokens."""

    name: ClassVar[str] = "distill"
    tier: ClassVar[Tier] = "hours"
    presets: ClassVar[Mapping[Tier, Mapping[str, Any]]] = {
        "minutes": {
            "weights": "lora",
            "steps": 20,
            "batch": 1,
            "held_windows": 2,
            "checks": 2,
            "lr": 3e-4,
            "reach": 0.25,
        },
        "hours": {"weights": "all"},
    }
    summary: ClassVar[str] = "train the weights under the plan against the dense model (RTPurbo's second stage)"
    source: ClassVar[str] = "RTPurbo, arXiv 2605.16928"
    after: ClassVar[tuple[str, ...]] = (
        "dynamic-tokenization",
        "rtpurbo",
        "razor",
        "window",
        "indexcache",
        "informed-routing",
    )
    needs: ClassVar[Needs] = (("heads", "routing"),)
    trains: ClassVar[bool] = True
    parallel: ClassVar[bool] = True

    weights: Literal["lora", "all"] = Field(default="lora", description="low-rank additions, merged; or all weights")
    lora_rank: int = Field(default=64, ge=1, le=4096, description="of the additions")
    steps: int = Field(default=600, ge=1, description="optimizer steps (the paper: about 600)")
    batch: int = Field(default=4, ge=1, description="windows a step (the paper: 8 of 48K tokens)")
    micro_batch: int | None = Field(default=None, ge=1, description="windows a forward; null: the whole batch")
    context: int | None = Field(default=None, ge=128, description="tokens a window; null: as reach says")
    reach: float = Field(
        default=1.0, gt=0, le=1, description="tokens a window, as a share of what the model reads, at most 16384"
    )
    rows: int = Field(default=512, ge=16, description="last tokens of a window, run as decode rows (the paper: 300)")
    labels: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of a window's loss on its answers, or on decode rows of natural text; null: all rows alike",
    )
    windows: int | None = Field(
        default=None, ge=1, description="different windows, each read by the teacher once; null: none trains twice"
    )
    questions: float = Field(
        default=0.5, ge=0, le=1, description="share of windows with hidden facts that are asked for"
    )
    top_k: int = Field(default=10, ge=1, le=1024, description="teacher's tokens a row (the paper: 10)")
    rest: bool = Field(
        default=True, description="all other tokens count as one more outcome (ours; paper: they do not)"
    )
    lr: float | None = Field(default=None, gt=0, description="peak rate; null: 1e-3 for lora, 5e-5 for all")
    warmup: int | None = Field(default=None, ge=0, description="steps; null: a tenth (the paper: 200 of 600)")
    checks: int = Field(default=10, ge=1, description="how often held-out KL is measured; the best weights are kept")
    held_windows: int = Field(default=4, ge=1, description="windows of the search text, and as many with questions")
    checkpointing: bool | None = Field(
        default=None, description="recompute activations; null: for models over a billion weights"
    )

    @model_validator(mode="after")
    def _check(self) -> Distill:
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise ValueError(f"micro_batch {self.micro_batch} is more than batch {self.batch}: lower it")
        return self

    @property
    def _windows(self) -> int:
        return self.steps * self.batch if self.windows is None else self.windows

    def tier_of_run(self) -> Tier:
        """LoRA takes minutes, all weights are the dear kind."""
        return "minutes" if self.weights == "lora" else "hours"

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Ask the teacher once, train, keep the best. See :class:`sparsec.passes.base.Pass`."""
        plan, model, listen = program.plan, program.model, program.listen
        if plan.is_dense:
            raise PlanError(
                "distill has nothing to recover, the plan is dense: run rtpurbo, razor, window or informed-routing "
                "before it"
            )
        length = self._context(plan, calibration, int(model.config.max_position_embeddings))
        try:
            lesson, asked = self._lesson(program, calibration, length)
        except torch.OutOfMemoryError:
            raise TrainingError(
                "asking the dense model ran out of memory: lower distill.micro_batch or distill.context"
            ) from None
        before = copied_weights(model)
        settings = Settings(
            steps=self.steps,
            lr=self.lr or (1e-3 if self.weights == "lora" else 5e-5),
            warmup=self.steps // 10 if self.warmup is None else self.warmup,
            rest=self.rest,
            labels=self.labels,
            checks=self.checks,
            seed=program.seed,
        )
        with (
            applied(model, plan, program.tensors),
            trainable(model, self.weights, self.lora_rank, self.checkpointing, program.seed),
            # A layer that is run again in the backward pass cannot be compiled with what its hooks write.
            nullcontext() if recomputes(model, self.checkpointing) else _fused(model),
        ):
            outcome = distill(model, lesson, settings, state=program.scratch, listen=listen)
        first, best = outcome.checks[0][1], min(kl for _, kl in outcome.checks)
        changed = changed_weights(model, before) if outcome.best_step else {}
        put_weights(model, before)  # what to do with a result is the caller's business
        if not outcome.best_step:
            listen(Event("distill", note="training improved nothing: the weights stay as they were"))
        measured = {
            "weights": self.weights,
            "tier": self.tier_of_run(),
            "context": length,
            "rows": lesson.rows,
            "windows": len(lesson.tokens),
            "with_questions": asked,
            "tokens": outcome.tokens,
            "teacher_mass": lesson.taught.mass(),
            "checks": [{"step": step, "kl": kl} for step, kl in outcome.checks],
            "kl_before": first,
            "kl_best": best,
            "best_step": outcome.best_step,
            "diverged": outcome.diverged,
            "losses": [round(loss, 5) for loss in outcome.losses],
            "changed_tensors": len(changed),
        }
        return PassResult(plan, dict(program.tensors), measured, changed)

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """A step is a forward and a backward, worth three forwards; the teacher reads every window once."""
        length = self.wanted_context(max_positions)
        forwards = 3 * self.steps * self.batch + self._windows + 2 * self.held_windows * (self.checks + 2)
        copies = 4 * (self.weights == "all")  # gradients, two moments, the best weights so far
        return Cost(tokens=forwards * length, resident=self._windows * length * self.top_k * 6, copies=copies)

    def wanted_context(self, readable: int) -> int:
        """Far selection and far heads only learn in windows as long as those that they will run in."""
        return self.context or int(self.reach * min(readable, LONGEST))

    def _context(self, plan: Plan, calibration: Calibration, readable: int) -> int:
        """What is wanted, or the most that the text has: a few windows to train on, one to choose by."""
        wanted = self.wanted_context(readable)
        if self.context is not None:
            return wanted
        found = min(calibration.longest("train", wanted, LEAST_WINDOWS), calibration.longest("search", wanted))
        return max(found, 2 * plan.window.size if plan.window else 128)

    def _lesson(self, program: Program, calibration: Calibration, length: int) -> tuple[Lesson, int]:
        """Windows with the teacher's answers, and how many of them have questions."""
        model, rows = program.model, min(self.rows, length // 4)
        draw = partial(training_windows, calibration, length=length, rows=rows, seed=program.seed)
        windows = draw("train", count=self._windows, questions=self.questions)
        held = draw("search", count=2 * self.held_windows, questions=0.5).tokens
        micro_batch = self.micro_batch or self.batch
        with _fused(model):
            taught = self._taught(program, windows.tokens, micro_batch)
            compared = hold_out(model, held, rows, rows)
        last = torch.arange(length) >= length - rows
        labels = torch.where(windows.asked[:, None], windows.answers, last)
        return Lesson(windows.tokens, labels, taught, compared, rows, self.batch, micro_batch), int(windows.asked.sum())

    def _taught(self, program: Program, tokens: Tensor, batch: int) -> TopK:
        """What the teacher says, kept beside the run's state so that a stopped run need not ask again."""
        model = program.model
        file = program.scratch / "teacher.safetensors" if program.scratch else None
        owner = identity(weights_digest(model), tokens, self.top_k) if file else ""
        kept = read_kept(file, owner) if file and ranks.same(file.is_file()) else None
        if kept is not None:
            return TopK(**kept)
        found = top_k(model, tokens, self.top_k, batch, precision(model.device), program.listen)
        if file is not None and ranks.is_first():
            save_kept(file, {"indices": found.indices, "logp": found.logp}, owner)
        return found


def _fused(model: Any) -> AbstractContextManager[None]:
    return fused_layers(model) if model.device.type == "cuda" else nullcontext()
