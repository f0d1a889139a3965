"""The evaluation: several systems side by side, by decode semantics, at several lengths, on held-out text.

One harness, the same windows and prompts for all. A selector that keeps more looks better, so tokens kept, mass
recall of the true attention and the share of attention that is read stand beside the quality; what differs between two
systems comes with a paired bootstrap interval.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.comparisons import TOGETHER, comparisons, over_lengths
from sparsec.calibrate.decode import text_loss
from sparsec.calibrate.long_decode import compared, continued, followed
from sparsec.calibrate.needles import FIRST
from sparsec.calibrate.selector_stats import SelectorStats
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import NEEDLES, Haystack, Prompt, prompts, score
from sparsec.errors import SparsecError, UsageError
from sparsec.events import Event, Listener, silent, tracked
from sparsec.plan import Plan
from sparsec.plugins.device import device_name

DENSE = "dense"
BASELINES = (DENSE, "window", "split")
WEAK = 0.2  # a task that dense answers less of tells nothing about a sparse model


Found = tuple[dict[str, Any], dict[str, Tensor]]  # what a part of the evaluation gave: JSON data, and tensors
# keep(make, **inputs): what ``make`` gives, or what it gave for the same inputs (JSON data) before.
Keep = Callable[..., Found]


@dataclass(frozen=True)
class System:
    """A row of the evaluation.

    ``open`` gives the model ready to run, its plan installed or dense, and puts all back at the end; it is called when
    the model is first needed. ``only_decodes``: it is there for the long decode alone. ``identity`` is JSON data that
    differs wherever the system's answers may.
    """

    name: str
    open: Callable[[], AbstractContextManager[Any]]
    plan: Plan | None = None
    identity: Any = None
    only_decodes: bool = False


def unkept(make: Callable[[], Found], **inputs: Any) -> Found:
    """A :data:`Keep` that keeps nothing."""
    return make()


@dataclass(frozen=True)
class Suite:
    """What is asked of every system."""

    lengths: Sequence[int]  # tokens of a window or prompt; at least one should be twice the plan's window
    tasks: Sequence[str] = ("kv", "multikey", "passkey")
    prompts_each: int = 50  # a task and length; 0 leaves tasks out
    windows_each: int = 8  # text windows a length; 0 leaves bits per byte out
    rows: int = 512  # decode rows at the end of each window
    contexts: int = 1  # prompt lengths a window, evenly spread, at which the text loss is taken
    decode_tokens: int = 0  # generated in the long decode; 0 leaves it out
    decode_prompts: int = 8
    batch_size: int = 4
    seed: int = 0


@dataclass
class _Asked:
    """Everything that all systems get at one length."""

    length: int
    windows: Tensor | None
    tasks: dict[str, list[Prompt]] = field(default_factory=dict)
    starts: Tensor | None = None  # prompts of the long decode
    reference: Tensor | None = None  # what dense writes after them


def baseline_plan(name: str, plan: Plan) -> Plan | None:
    """The plan that a baseline of ``plan`` runs; None is the dense model.

    ``window``: every head local, sinks and window alone. ``split``: the plan's retrieval heads, dense in decode too, no
    selector.

    Raises:
        UsageError: no such baseline.
    """
    if name == DENSE:
        return None
    if name not in BASELINES:
        raise UsageError(f"there is no system {name!r}: choose from {', '.join(BASELINES)}")
    if plan.dsa is not None:
        raise UsageError(f"a model with indexers of its own has no heads for {name!r}: leave it out of --systems")
    layers = []
    for layer in plan.layers:
        heads = layer.heads if name == "split" or layer.heads is None else (0,) * len(layer.heads)
        layers.append({"heads": heads, "index": "none"})
    window = plan.window and plan.window.model_copy(update={"compensate": False})
    # Merged tokens are the artifact's, with its weights: baselines read the base model's.
    return plan.edit(layers=layers, selector=None, window=window, vocabulary=None)


def evaluate(
    systems: Sequence[System],
    calibration: Calibration,
    suite: Suite,
    *,
    keep: Keep = unkept,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Measure every system at every length.

    Systems run in the order given, each opened once; ``dense`` goes first where the long decode is asked for. Every
    task, text loss and long decode of a system and length is a part that ``keep`` may have from a run that was stopped.

    Returns:
        JSON data: ``cells`` by length and system, their ``comparisons`` and ``over_lengths``, the suite and notes.

    Raises:
        UsageError: nothing to compare the long decode with.
        SparsecError: out of memory.
    """
    if suite.decode_tokens and (not systems or systems[0].name != DENSE):
        raise UsageError("the long decode is compared with the dense model: put dense first among the systems")
    notes: list[str] = []
    haystack = Haystack(calibration)
    asked = [_asked(haystack, suite, length, notes, listen) for length in suite.lengths]
    cells: list[dict[str, Any]] = []
    about: dict[str, str] = {}
    for system in systems:
        try:
            cells += _Row(system, calibration.tokenizer, suite, keep, listen).cells(asked, about, notes)
        except torch.OutOfMemoryError as error:
            size = f"--batch-size {suite.batch_size}"
            raise SparsecError(f"{system.name} runs out of memory with {size}: use a smaller one") from error
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    order = {system.name: number for number, system in enumerate(systems)}
    cells.sort(key=lambda cell: (suite.lengths.index(cell["length"]), order[cell["system"]]))
    notes += _weak_tasks(cells)
    return {
        "cells": cells,
        "comparisons": comparisons(cells, seed=suite.seed),
        "over_lengths": over_lengths(cells, seed=suite.seed),
        "notes": list(dict.fromkeys(notes)),
        "seed": suite.seed,
        "rows": suite.rows,
        "prompts_each": suite.prompts_each,
        "decode_tokens": suite.decode_tokens,
        **about,
        "torch": torch.__version__,
        "text": calibration.describe(),
    }


def _asked(haystack: Haystack, suite: Suite, length: int, notes: list[str], listen: Listener) -> _Asked:
    calibration, windows = haystack.calibration, None
    if suite.windows_each:
        count = min(suite.windows_each, calibration.available("heldout", length))
        if count < suite.windows_each:
            notes.append(f"only {count} held-out windows of {length} tokens, {suite.windows_each} were asked for")
        windows = calibration.windows("heldout", length, max(1, count), seed=suite.seed)
    asked = _Asked(length, windows)
    if suite.prompts_each:
        for task in tracked(suite.tasks, f"prompts of {length} tokens", listen, len(suite.tasks)):
            asked.tasks[task] = prompts(
                task, calibration, length=length, count=suite.prompts_each, seed=suite.seed, haystack=haystack
            )
    if suite.decode_tokens:
        before = length - suite.decode_tokens
        if before < FIRST:
            notes.append(f"no long decode at {length} tokens: {suite.decode_tokens} new ones leave no prompt")
        else:
            asked.starts = haystack.texts(length, suite.decode_prompts, suite.seed)[:, :before]
    return asked


@dataclass
class _Row:
    """One system's turn. When it ends, nothing holds the system's model."""

    system: System
    tokenizer: Any
    suite: Suite
    keep: Keep
    listen: Listener
    opened: ExitStack = field(default_factory=ExitStack)
    model: Any = None

    def cells(self, asked: Sequence[_Asked], about: dict[str, str], notes: list[str]) -> list[dict[str, Any]]:
        """A cell a length; ``about`` and ``notes`` are added to."""
        cells, plan = [], self.system.plan
        with self.opened:
            for each in asked:
                if plan is not None and plan.span is not None and each.length < 2 * plan.span:
                    who = "local heads see" if plan.window is not None else "indexers choose"
                    what = "the window" if plan.window is not None else "what is chosen"
                    notes.append(f"{each.length} tokens is less than twice {what}: {who} most of it")
                cell: dict[str, Any] = {"length": each.length, "system": self.system.name}
                if not self.system.only_decodes:
                    cell |= self._quality(each, about)
                if each.starts is not None:
                    cell["decode"], where = self._decode(each)
                    about |= {} if self.system.only_decodes else where
                cells.append(cell)
        self.model = None
        return cells

    def _quality(self, asked: _Asked, about: dict[str, str]) -> dict[str, Any]:
        """Text loss and tasks."""
        cell: dict[str, Any] = {}
        if asked.windows is not None:
            windows = asked.windows
            inputs = {"rows": self.suite.rows, "contexts": self.suite.contexts, "windows": windows.tolist()}
            cell |= self._part("text", lambda: self._text(windows, asked.length), about, **inputs)
        for task, batch in asked.tasks.items():
            given = {"asked": [[one.tokens.tolist(), list(one.answers), one.budget] for one in batch]}
            made = partial(self._task, task, batch, asked.length)
            cell.setdefault("tasks", {})[task] = self._part(task, made, about, **given)
        needles = [found["share"] for task, found in cell.get("tasks", {}).items() if task in NEEDLES]
        if len(needles) > 1:
            cell[TOGETHER] = sum(needles) / len(needles)
        return cell

    def _part(self, name: str, make: Callable[[], dict[str, Any]], about: dict[str, str], **inputs: Any) -> Any:
        def run() -> Found:
            return {"found": make(), "about": self._where()}, {}

        kept = self.keep(run, part=name, system=self.system.identity, **inputs)[0]
        about |= kept["about"]
        return kept["found"]

    def _where(self) -> dict[str, str]:
        model = self._model()
        return {"device": device_name(model.device), "dtype": str(model.dtype).removeprefix("torch.")}

    def _model(self) -> Any:
        if self.model is None:
            self.model = self.opened.enter_context(self.system.open())
        return self.model

    def _text(self, windows: Tensor, length: int) -> dict[str, Any]:
        """Bits per byte of the windows' ends, and where asked for also nearer to their beginnings."""
        rows = min(self.suite.rows, length // 2)
        stats = SelectorStats()
        measure = partial(
            text_loss, self._model(), self.tokenizer, batch_size=self.suite.batch_size, listen=self.listen
        )
        stage = f"{self.system.name} {length}: bits per byte"
        loss = measure(list(windows), length - rows, observe=stats, stage=stage)
        selector = stats.summary()
        found: dict[str, Any] = loss.to_json() | {"selector": selector}
        found["attention_read"] = attention_read(self.system.plan, selector, length - rows, length)
        contexts = []
        for part in range(1, self.suite.contexts):
            stop = length * part // self.suite.contexts
            if stop - rows >= FIRST:
                early = measure(list(windows[:, :stop]), stop - rows, stage=f"{stage} up to {stop}")
                contexts.append({"context": stop, "bits_per_byte": early.bits_per_byte})
        if contexts:
            found["contexts"] = [*contexts, {"context": length, "bits_per_byte": loss.bits_per_byte}]
        return found

    def _task(self, task: str, batch: Sequence[Prompt], length: int) -> dict[str, Any]:
        stage = f"{self.system.name} {length}: {task}"
        self.listen(Event(stage, 0, len(batch)))
        result = score(
            self._model(),
            self.tokenizer,
            batch,
            batch_size=self.suite.batch_size,
            progress=lambda done, total: self.listen(Event(stage, done, total)),
        )
        return {
            "share": result.share,
            "exact": result.exact,
            "digits": result.digits,
            "n": result.n,
            "found": list(result.found),
            "depths": [prompt.depth for prompt in batch],
        }

    def _decode(self, asked: _Asked) -> tuple[Any, dict[str, str]]:
        """The long decode, and where it ran; the first system's text is what the others are compared with."""
        assert asked.starts is not None
        starts, reference, batch = asked.starts, asked.reference, self.suite.batch_size
        stage = f"{self.system.name} {asked.length}: long decode"

        def run() -> Found:
            model = self._model()
            texts = continued(
                model,
                self.tokenizer,
                starts,
                self.suite.decode_tokens,
                batch_size=batch,
                listen=self.listen,
                stage=stage,
            )
            said = texts if reference is None else reference
            steps = followed(model, starts, said, batch_size=batch)
            result = compared(texts, said, steps, starts.shape[1]).to_json()
            return {"found": result, "about": self._where()}, {"texts": texts.cpu()}

        found, tensors = self.keep(
            run,
            part="long decode",
            system=self.system.identity,
            starts=starts.tolist(),
            tokens=self.suite.decode_tokens,
            reference=None if reference is None else reference.tolist(),
        )
        if asked.reference is None:
            asked.reference = tensors["texts"]
        return found["found"], found["about"]


def attention_read(plan: Plan | None, selector: Mapping[str, float], first: int, last: int) -> float:
    """Share of a dense model's (query head, key) pairs that decode rows read: realised, as the plan runs them.

    Args:
        plan: None is the dense model.
        selector: the summary of :class:`SelectorStats` over these rows.
        first, last: the rows' own tokens, from 0; ``last`` is not one of them.
    """
    if plan is None:
        return 1.0
    contexts = range(first + 1, last + 1)
    dense = sum(contexts) / len(contexts)
    local = retrieval = 1.0
    if plan.window is not None:
        most = plan.window.size + plan.window.sinks
        local = sum(n if n <= plan.min_context else min(n, most) for n in contexts) / len(contexts) / dense
    if selector:
        retrieval = selector["kept_mean"] / selector["context_mean"]
    heads = plan.model.heads
    read = [
        heads
        if layer.heads is None
        else len(layer.local) * local + len(layer.retrieval) * (1.0 if layer.index == "none" else retrieval)
        for layer in plan.layers
    ]
    return sum(read) / (heads * len(read))


def _weak_tasks(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tasks that say little, because the dense model itself fails them: a line a length."""
    notes = []
    for cell in cells:
        if cell["system"] == DENSE:
            found = cell.get("tasks", {}).items()
            weak = [f"{task} ({result['share']:.0%})" for task, result in found if result["share"] < WEAK]
            if weak:
                notes.append(
                    f"at {cell['length']} tokens dense answers under {WEAK:.0%} of {', '.join(weak)}: what a sparse "
                    "model keeps of that, its recovery, means little"
                )
    return notes
