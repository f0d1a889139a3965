"""What benchmarks/sharing.py divides among processes: one search of patterns, or the judgement of one pattern.

A process begins with a :class:`Setting` and keeps the models that it has opened. Jobs and their results are plain data.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.decode import text_loss
from sparsec.calibrate.patterns import other_patterns, share, with_pattern
from sparsec.calibrate.selector_stats import SelectorStats
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import Prompt, score
from sparsec.layout import TENSORS, read_plan
from sparsec.passes.base import Program
from sparsec.passes.indexcache import IndexCache
from sparsec.plan import Plan
from sparsec.plugins.auto import read_tensors
from sparsec.plugins.device import device_name
from sparsec.plugins.load import load
from sparsec.plugins.runtime import applied, uninstall, use_kernels

RECALL = ("recall_mean", "recall_p5", "far_mean", "kept_mean", "context_mean")
WORK = ("candidates", "layer_evaluations", "layer_evaluations_plain", "layer_tokens", "layer_tokens_plain")


@dataclass(frozen=True)
class Setting:
    """All that jobs have in common. Contexts and rows are tokens."""

    artifacts: Mapping[str, Path]
    calibrations: Mapping[str, Calibration]  # by artifact: what it was compiled on
    windows: Tensor  # held-out text, [windows, length]
    prompts: Mapping[str, Sequence[Prompt]]  # by task, of held-out text too
    length: int
    search_rows: int
    rows: int  # decode rows of a held-out window
    keeps: tuple[float, ...]
    steps: int
    fit_windows: int
    batch_size: int
    device: str
    dtype: str  # of generated answers; all else is float32


@dataclass(frozen=True)
class Search:
    """Find patterns on so many windows of search text, and a third as many needle documents; seed: which ones."""

    artifact: str
    windows: int
    seed: int
    order: str


@dataclass(frozen=True)
class Judge:
    """Measure one pattern on held-out text. pattern: None is a set a head, as the artifact has them."""

    artifact: str
    pattern: str | None
    trained: bool
    tasks: bool


Job = Search | Judge
_here: dict[str, Any] = {}  # this process's setting and device


def begin(setting: bytes, number: Any) -> None:
    """At a process's start; number: a shared counter, by which processes take their GPUs in turn."""
    made: Setting = pickle.loads(setting)
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    spread = made.device == "cuda" and torch.cuda.device_count() > 1
    device = f"cuda:{mine % torch.cuda.device_count()}" if spread else made.device
    _here.update(setting=made, device=device)
    if device != "cpu":
        torch.set_num_threads(1)


def run(job: Job, scratch: Path) -> dict[str, Any]:
    """One job; JSON data. scratch: a folder of this job, where a search that was stopped is gone on with."""
    began = time.monotonic()
    setting: Setting = _here["setting"]
    found = searched(job, setting, scratch) if isinstance(job, Search) else judged(job, setting)
    where = device_name(torch.device(_here["device"]))
    return {**found, "seconds": round(time.monotonic() - began, 1), "device": where}


def unshared(setting: Setting, artifact: str) -> str:
    """The pattern in which every layer keeps its indexer."""
    return "F" * len(read_plan(setting.artifacts[artifact]).indexed())


@cache
def opened(artifact: str, dtype: str) -> tuple[Any, Any, Plan, dict[str, Tensor]]:
    """Model without a plan, tokenizer, plan and the plan's tensors."""
    path = _here["setting"].artifacts[artifact]
    model, tokenizer = load(path, device=_here["device"], dtype=dtype, kernels="reference")
    plan: Plan = model.sparsec_plan
    uninstall(model)
    return model, tokenizer, plan, read_tensors(path / TENSORS)


def searched(job: Search, setting: Setting, scratch: Path) -> dict[str, Any]:
    """Patterns by share kept and by way, all of one search: a greedy search for fewer indexers goes on from more."""
    model, _, plan, tensors = opened(job.artifact, "float32")
    config = IndexCache.model_validate(
        {
            "keep": min(setting.keeps),
            "steps": 0,
            "windows": job.windows,
            "documents": max(1, job.windows // 3),
            "context": setting.length,
            "rows": setting.search_rows,
            "order": job.order,
            "compare": False,
        }
    )
    scratch.mkdir(exist_ok=True)
    program = Program(model, plan, tensors, job.seed, scratch=scratch)
    found = config.run(program, setting.calibrations[job.artifact]).measured
    every = plan.indexed()
    unshared = with_pattern(plan, {i: plan.layers[i].index for i in every})
    patterns: dict[str, dict[str, str]] = {}
    for keep in setting.keeps:
        full = max(1, round(keep * len(every)))
        mine = unshared
        for flip in found["flips"][: len(every) - full]:
            mine = share(mine, flip["layer"])
        others = other_patterns(unshared, full, found["flips"], found["overlap"])
        patterns[f"{keep:g}"] = {"searched": mine.pattern, **{way: other.pattern for way, other in others.items()}}
    kept = ("layers", "loss_before", "flips", "overlap", *WORK)
    return {"patterns": patterns, **{name: found[name] for name in kept}}


def judged(job: Judge, setting: Setting) -> dict[str, Any]:
    """Bits per byte of each window, mass recalled, and what was found of each task's prompts."""
    model, tokenizer, plan, tensors = opened(job.artifact, "float32")
    found: dict[str, Any] = {}
    if job.pattern is not None:
        config = IndexCache.model_validate(
            {
                "pattern": job.pattern,
                "steps": setting.steps if job.trained else 0,
                "fit_windows": setting.fit_windows,
                "windows": 1,
                "documents": 0,
                "context": setting.length,
                "rows": setting.search_rows,
            }
        )
        result = config.run(Program(model, plan, tensors), setting.calibrations[job.artifact])
        plan, tensors = result.plan, dict(result.tensors)
        trained = result.measured.get("trained", {})
        found |= {name: trained[name] for name in ("kl_before", "kl_trained") if name in trained}
    stats = SelectorStats()
    with applied(model, plan, tensors):
        loss = text_loss(model, tokenizer, list(setting.windows), setting.length - setting.rows, observe=stats)
    summary = stats.summary()
    found |= {"windows": list(loss.windows), **{name: summary[name] for name in RECALL}}
    if job.tasks:
        answering = opened(job.artifact, setting.dtype)[0]
        with applied(answering, plan, tensors):
            use_kernels(answering, "auto")
            found["tasks"] = {
                task: list(score(answering, tokenizer, asked, batch_size=setting.batch_size).found)
                for task, asked in setting.prompts.items()
            }
    return found
