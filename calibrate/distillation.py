"""The training loop of self-distillation: a model under a plan learns to answer as it did without one.

RTPurbo (arXiv 2605.16928), stage 2. The student runs row-exactly as deployed: local heads windowed on every row,
retrieval heads dense on prompt rows and through their selectors on the last ``rows`` rows. Selectors are frozen; the
gradient goes through exact attention on what they chose. The loss is the forward KL on the teacher's top k tokens,

    paper:       both distributions renormalised on the k tokens: mass moved elsewhere costs nothing
    with rest:   everything else is one more outcome (ours)

What decides which weights are kept is the KL over the whole vocabulary on other documents. Batches, schedule and
order are functions of seed and step alone, so a run that was stopped continues to the same result.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsec.calibrate import ranks
from sparsec.calibrate.teacher import ROWS, Head, TopK, divergence, fused_rows, logits_of
from sparsec.errors import TrainingError
from sparsec.events import Event, Listener
from sparsec.plugins.fused import compiling, fused
from sparsec.plugins.runtime import stepping
from sparsec.plugins.step import Step

SAVE_SECONDS = 60.0
FLOOR = 1e-6  # least mass of the rest: below it float32 has nothing left to say


@dataclass(frozen=True)
class Settings:
    """How a run goes. Rates are AdamW's."""

    steps: int
    lr: float
    warmup: int
    weight_decay: float = 0.01
    clip: float = 1.0
    rest: bool = True
    labels: float | None = None  # share of the loss that label rows carry; None: every row counts alike
    checks: int = 10  # how often the held-out KL is measured
    seed: int = 0


@dataclass
class Outcome:
    """What a run gave; ``best`` holds the trained tensors with the lowest held-out KL, by parameter name."""

    best: dict[str, Tensor]
    best_step: int
    checks: list[tuple[int, float]]  # step, held-out KL over the whole vocabulary in nats a row
    losses: list[float]
    seconds: float
    resumed_at: int = 0
    diverged: bool = False
    tokens: int = 0


@dataclass
class HeldOut:
    """Windows for the checks, and what the teacher's last layer said on some of their rows."""

    tokens: Tensor  # int64 [windows, length]
    rows: Tensor  # int64, which rows of each window are compared
    hidden: Tensor  # [windows, rows, hidden]
    head: Tensor  # the teacher's output weight, a copy: the student's may be trained


def precision(device: torch.device) -> Callable[[], Any]:
    """bfloat16 autocast where the device has it, else nothing; a CPU trains in the weights' own precision."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return lambda: torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext


@dataclass
class Lesson:
    """Windows, what the teacher says on them, and those of the checks."""

    tokens: Tensor  # int64 [windows, length]
    labels: Tensor  # bool [windows, length]: the rows that a share of the loss may be given to
    taught: TopK
    held: HeldOut
    rows: int  # decode rows at the end of each window
    batch: int  # windows a step
    micro_batch: int  # windows a forward


def student_loss(
    model: Any, tokens: Tensor, indices: Tensor, logp: Tensor, weights: Tensor, *, rows: int, rest: bool
) -> Tensor:
    """Mean over windows of their rows' KL in nats.

    Args:
        tokens: [windows, length]; indices, logp: [windows, length, k].
        weights: float32 [windows, length], what each row counts, see :func:`row_weights`.
        rows: decode rows at each window's end.
        rest: see :func:`kl_top_k`.
    """
    hidden = student_hidden(model, tokens, rows)
    weights = weights.to(hidden.device).flatten() / len(tokens)
    hidden = hidden.flatten(0, 1)
    indices, logp = (x.flatten(0, 1).to(hidden.device) for x in (indices, logp))
    head = Head(model)
    part_loss, rows_held = (fused(_part_loss), fused_rows(head)) if hidden.is_cuda else (_part_loss, ROWS)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), rows_held):
        part = slice(start, start + rows_held)
        total = total + checkpoint(  # the logits of a whole window are gigabytes: made again for the gradient
            part_loss,
            hidden[part],
            head.module.weight,
            head.module.bias,
            head.softcap,
            indices[part],
            logp[part],
            weights[part],
            rest,
            use_reentrant=False,
        )
    return total


def _part_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    indices: Tensor,
    logp: Tensor,
    counts: Tensor,
    rest: bool,
) -> Tensor:
    """Sum of some rows' losses, each times what it counts."""
    return (kl_top_k(logits_of(hidden, weight, bias, softcap), indices, logp, rest) * counts).sum()


def row_weights(labels: Tensor, share: float | None) -> Tensor:
    """What each row of a window counts: float32 [windows, length], each window's sum 1.

    Args:
        labels: bool [windows, length], some but not all rows of each window.
        share: what label rows carry together, the others the rest; None: every row counts alike.
    """
    if share is None:
        return torch.full(labels.shape, 1 / labels.shape[1])
    count = labels.sum(1, keepdim=True)
    return torch.where(labels, share / count, (1 - share) / (labels.shape[1] - count)).float()


def student_hidden(model: Any, tokens: Tensor, rows: int) -> Tensor:
    """Final hidden states [windows, length, hidden]: prefill rows, and the last ``rows`` decode rows."""
    with stepping(Step(decode=True, prompt=tokens.shape[1] - rows)):
        hidden: Tensor = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def kl_top_k(logits: Tensor, indices: Tensor, logp: Tensor, rest: bool) -> Tensor:
    """Forward KL of each row, teacher first, on the teacher's k tokens.

    Args:
        logits: the student's, float32 [rows, vocabulary].
        indices, logp: the teacher's k tokens and log-probabilities, [rows, k].
        rest: all other tokens are one more outcome; else both are renormalised on the k.
    """
    logp = logp.float()
    logq = logits.gather(-1, indices.long())
    if not rest:
        logp, logq = logp.log_softmax(-1), logq.log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1)
    logq = logq - logits.logsumexp(-1, keepdim=True)
    left_p = (1 - logp.exp().sum(-1)).clamp_min(FLOOR)
    left_q = (1 - logq.exp().sum(-1)).clamp_min(FLOOR)
    return (logp.exp() * (logp - logq)).sum(-1) + left_p * (left_p.log() - left_q.log())


@torch.no_grad()
def hold_out(model: Any, tokens: Tensor, rows: int, compared: int) -> HeldOut:
    """What the dense ``model`` (no plan installed) says on all decode rows and on ``compared`` prompt rows."""
    length = tokens.shape[1]
    earlier = torch.linspace(0, length - rows - 1, min(compared, length - rows)).round().long()
    at = torch.cat((earlier, torch.arange(length - rows, length)))
    context = precision(model.device)
    hidden = []
    for window in tokens:
        with context():
            seen = model.get_decoder()(input_ids=window[None].to(model.device), use_cache=False).last_hidden_state
        hidden.append(seen[0, at.to(seen.device)])
    return HeldOut(tokens, at, torch.stack(hidden), Head(model).module.weight.detach().clone())


@torch.no_grad()
def full_kl(model: Any, held: HeldOut, rows: int) -> float:
    """Mean forward KL a row over the whole vocabulary, in nats, under the installed plan."""
    head, context, sums = Head(model), precision(model.device), []
    pairs = list(zip(held.tokens, held.hidden, strict=True))
    for window, taught in ranks.own(pairs):
        total = 0.0
        with context():
            hidden = student_hidden(model, window[None].to(model.device), rows)[0]
            hidden = hidden[held.rows.to(hidden.device)]
            for start in range(0, len(hidden), ROWS):
                part = slice(start, start + ROWS)
                total += float(divergence(head(taught[part], held.head), head(hidden[part])).sum())
        sums.append(total)
    return sum(ranks.in_order(sums)) / max(1, len(pairs) * len(held.rows))


def distill(model: Any, lesson: Lesson, settings: Settings, *, state: Path | None, listen: Listener) -> Outcome:
    """Train what of ``model`` requires a gradient, and leave the best weights in it.

    Args:
        model: its plan installed.
        state: folder of the run's saved state, or None.

    Raises:
        TrainingError: out of memory, with what to lower; or a saved state of another run.
    """
    run = _Run(model, settings, state)
    run.resume()
    ranks.wait()  # all have read the state before the first process writes another
    try:
        with compiling() if model.device.type == "cuda" else nullcontext():
            run.go(lesson, listen)
    except torch.OutOfMemoryError:
        raise TrainingError(
            "distillation ran out of memory: lower distill.micro_batch or distill.context, "
            "or set distill.checkpointing=true, or distill.weights=lora"
        ) from None
    run.keep_best()
    return run.outcome


@dataclass
class _Run:
    """State of one run."""

    model: Any
    settings: Settings
    folder: Path | None
    step: int = 0
    outcome: Outcome = field(default_factory=lambda: Outcome({}, 0, [], [], 0.0))

    def __post_init__(self) -> None:
        s = self.settings
        self.trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        # Norms and biases are not decayed: their scale is meant.
        groups = [
            {"params": [w for w in self.trained.values() if w.dim() >= 2], "weight_decay": s.weight_decay},
            {"params": [w for w in self.trained.values() if w.dim() < 2], "weight_decay": 0.0},
        ]
        self.fused = self.model.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=s.lr, betas=(0.9, 0.95), fused=self.fused
        )
        self.when = {round(s.steps * (number + 1) / s.checks) for number in range(s.checks)}
        self.saved = time.monotonic()

    def go(self, lesson: Lesson, listen: Listener) -> None:
        """All steps that are left, and the checks among them."""
        if not self.outcome.checks:
            self.check(lesson, listen)
        for step in range(self.step, self.settings.steps):
            self.advance(step, lesson)
            listen(Event("distill", step + 1, self.settings.steps))
            if self.outcome.diverged:
                break
            if step + 1 in self.when:
                self.check(lesson, listen)
            self.save_if_due()

    def rate(self, step: int) -> float:
        """Linear warm-up, cosine to nothing."""
        s = self.settings
        if step < s.warmup:
            return s.lr * (step + 1) / s.warmup
        share = (step - s.warmup) / max(1, s.steps - s.warmup)
        return s.lr * 0.5 * (1 + math.cos(math.pi * share))

    def advance(self, step: int, lesson: Lesson) -> None:
        """One optimizer step."""
        s, began, device = self.settings, time.monotonic(), self.model.device
        chosen = batch_of(step, lesson.batch, len(lesson.tokens), s.seed)
        share = ranks.own(chosen)
        total = torch.zeros((), device=device)
        for start in range(0, len(share), lesson.micro_batch):
            part = share[start : start + lesson.micro_batch]
            weights = row_weights(lesson.labels[part], s.labels)
            inputs = (lesson.tokens[part], lesson.taught.indices[part], lesson.taught.logp[part], weights)
            with precision(device)():
                loss = student_loss(self.model, *(x.to(device) for x in inputs), rows=lesson.rows, rest=s.rest)
                loss = loss * (len(part) / len(chosen))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().to(device)
        self._add_up(total)
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), s.clip))
        self.outcome.losses.append(float(total))
        self.outcome.diverged = not (math.isfinite(float(total)) and math.isfinite(norm))
        if not self.outcome.diverged:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step = step + 1
        self.outcome.tokens += len(chosen) * lesson.tokens.shape[1]
        self.outcome.seconds += time.monotonic() - began

    def _add_up(self, total: Tensor) -> None:
        """Loss and gradients over all processes; one without a window of this step adds nothing."""
        if ranks.count() > 1:
            for weight in self.trained.values():
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            ranks.add_up([total, *(w.grad for w in self.trained.values() if w.grad is not None)])

    def check(self, lesson: Lesson, listen: Listener) -> None:
        """Measure on what is not trained on; keep the weights if they are the best so far."""
        found = full_kl(self.model, lesson.held, lesson.rows)
        best = min((kl for _, kl in self.outcome.checks), default=math.inf)
        self.outcome.checks.append((self.step, found))
        listen(Event("distill", self.step, self.settings.steps, f"held-out KL {found:.5f}"))
        if found < best:
            self.outcome.best = {name: weight.detach().clone() for name, weight in self.trained.items()}
            self.outcome.best_step = self.step

    @torch.no_grad()
    def keep_best(self) -> None:
        """The best weights go into the model."""
        for name, weight in self.trained.items():
            weight.copy_(self.outcome.best[name])

    def save_if_due(self) -> None:
        """Once a minute, so that a stopped run loses little."""
        if self.folder is not None and ranks.is_first() and time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Weights, best weights, optimizer and history: one file, whole or not at all."""
        assert self.folder is not None
        tensors: dict[str, Tensor] = {}
        for name, weight in self.trained.items():
            tensors[f"now.{name}"] = weight.detach().cpu().contiguous()
            tensors[f"best.{name}"] = self.outcome.best[name].cpu().contiguous()
            for key, value in self.optimizer.state.get(weight, {}).items():
                tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        history = {
            "step": self.step,
            "best_step": self.outcome.best_step,
            "checks": self.outcome.checks,
            "losses": self.outcome.losses,
            "seconds": self.outcome.seconds,
            "tokens": self.outcome.tokens,
        }
        aside = self.folder / "state.part"
        save_file(tensors, aside, metadata={"history": json.dumps(history)})
        aside.rename(self.folder / "state.safetensors")
        self.saved = time.monotonic()

    def resume(self) -> None:
        """Continue a saved run, if there is one."""
        file = self.folder / "state.safetensors" if self.folder is not None else None
        if file is None or not ranks.same(file.is_file()):
            return
        history, tensors = read_state(file)
        if any(f"now.{name}" not in tensors for name in self.trained):
            raise TrainingError(f"the training state {file} is another run's: delete it")
        device = self.model.device
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(tensors[f"now.{name}"])
                self.outcome.best[name] = tensors[f"best.{name}"].to(device)
                if f"exp_avg.{name}" in tensors:
                    self.optimizer.state[weight] = {
                        "step": tensors[f"step.{name}"].to(weight.device if self.fused else "cpu"),
                        **{key: tensors[f"{key}.{name}"].to(weight.device) for key in ("exp_avg", "exp_avg_sq")},
                    }
        self.step = self.outcome.resumed_at = history["step"]
        self.outcome.best_step = history["best_step"]
        self.outcome.checks = [(step, kl) for step, kl in history["checks"]]
        self.outcome.losses, self.outcome.seconds = history["losses"], history["seconds"]
        self.outcome.tokens = history["tokens"]


def read_state(file: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """History and tensors of a saved run.

    Raises:
        TrainingError: the file is damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as kept:
            history = json.loads(kept.metadata()["history"])
        return history, load_file(file)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"the training state {file} is damaged ({error}): delete it") from None


def batch_of(step: int, batch: int, windows: int, seed: int) -> Sequence[int]:
    """Which windows step ``step`` trains on: every epoch all windows once, in an order of its own."""
    chosen = []
    for number in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(number, windows)
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(int(order[at]))
    return chosen
