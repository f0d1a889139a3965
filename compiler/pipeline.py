"""The order of a compile, on one page.

source -> dense model, tokenizer -> calibration windows -> passes, each stored when done
       -> artifact written aside -> gate on it as loaded afresh -> report -> renamed into place
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsec
from sparsec.calibrate import ranks
from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.evaluate import baseline_plan
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.token_report import by_script, compare
from sparsec.calibrate.trainable import put_weights
from sparsec.compiler import golden
from sparsec.compiler.checkpoint import load_config
from sparsec.compiler.gate import Exam, shown, verdict
from sparsec.compiler.kept_tokens import kept_tokens
from sparsec.compiler.recipe import Recipe
from sparsec.compiler.registry import check_needs, make_passes
from sparsec.compiler.source import Source, load_model, load_tokenizer, open_source, weight_files
from sparsec.compiler.stages import Stages, Stored, code_digest, fingerprint, tensors_digest
from sparsec.compiler.versions import versions
from sparsec.errors import ArtifactError, GateError, UsageError
from sparsec.events import Event, Listener, silent
from sparsec.export.artifact import (
    check_free,
    check_room,
    put,
    recover,
    write_json,
    write_manifest,
    write_model,
    writing,
)
from sparsec.export.card import model_card
from sparsec.export.eval_results import eval_results
from sparsec.export.report import render_report
from sparsec.export.tokenizer import merged_tokenizer, with_description
from sparsec.layout import CARD, GOLDEN, MEASUREMENTS, REPORT
from sparsec.passes.base import Pass, Program, lacks
from sparsec.plan import PassRecord, Plan, Vocabulary
from sparsec.plugins import vocabulary
from sparsec.plugins.byte_level import ByteLevel
from sparsec.plugins.device import check_dtype, device_map
from sparsec.plugins.families import base_plan
from sparsec.plugins.load import load
from sparsec.plugins.runtime import applied

WEIGHTS = "weights/"  # marks base weights among a stage's tensors
PRODUCER = f"sparsec {sparsec.__version__}"


@dataclass(frozen=True)
class Job:
    """What ``sparsec compile`` was asked to do."""

    source: str
    out: Path
    recipe: Recipe
    cache_dir: Path
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    force: bool = False
    listen: Listener = field(default=silent, compare=False)


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    plan: Plan
    measurements: Mapping[str, Any]
    out: Path
    seconds: Mapping[str, float]  # by stage; 0 for one that was stored
    written: bool = True  # by this process; where several compile together, the first one judges and writes


def compile_model(job: Job) -> Outcome:
    """Run a job from source to artifact.

    Raises:
        SparsecError: anything that is wrong with source, text, recipe or output; GateError where the artifact is
            worse than its gate allows: it is then kept as ``<out>.rejected``.
    """
    passes = make_passes(job.recipe.passes)
    check_dtype(job.dtype)
    device_map(job.device)
    with ranks.first_alone():  # it mends and unpacks, the others find it done
        recover(job.out)
        check_free(job.out, force=job.force)
        source = open_source(job.source, revision=job.revision, cache_dir=job.cache_dir, progress=_say(job))
    base = base_plan(load_config(source.path), PRODUCER)
    check_needs(passes, job.recipe.start.plan(base) if job.recipe.start is not None else base)
    check_room(job.out, sum(file.stat().st_size for file in weight_files(source.path)))
    tokenizer = load_tokenizer(source)
    calibration = Calibration(
        read_corpus(job.recipe.calibration), tokenizer, seed=job.recipe.seed, keep=kept_tokens(job.cache_dir)
    )
    compile_ = _Compile(job, source, load_model(source, device=job.device, dtype=job.dtype), calibration)
    for each in passes:
        if each.trains:
            compile_.measure_dense()
        compile_.run_pass(each)
        if each is not passes[-1]:
            compile_.measure_pass()
    compile_.measure_dense()
    compile_.free_model()
    if not ranks.leave():
        return Outcome(compile_.program.plan, {}, job.out, compile_.seconds, written=False)

    plan = compile_.program.plan
    with writing(job.out, force=job.force) as aside:
        program = compile_.program
        write_model(
            aside, source.path, weight_files(source.path), plan, program.tensors, compile_.weights, compile_.tokenizer
        )
        judged, answers = compile_.judge(aside)
        measurements = compile_.measurements(judged)
        manifest = compile_.manifest(passes)
        write_json(aside / MEASUREMENTS, measurements)
        write_json(aside / GOLDEN, answers)
        (aside / REPORT).write_text(render_report(plan, measurements, manifest), encoding="utf-8")
        (aside / CARD).write_text(model_card(plan, measurements, manifest), encoding="utf-8")
        results = eval_results(measurements)
        if results is not None:
            (aside / results[0]).parent.mkdir()
            (aside / results[0]).write_text(results[1], encoding="utf-8")
        write_manifest(aside, manifest)
        if not judged["passed"]:
            out = job.out.resolve()
            rejected = out.with_name(f"{out.name}.rejected")
            put(aside, rejected)
            raise GateError(f"the gate failed: {'; '.join(judged['failures'])}; the artifact is kept as {rejected}")
    return Outcome(plan, measurements, job.out, compile_.seconds)


class _Compile:
    """State of one compile: the model, what is stored, what was measured."""

    def __init__(self, job: Job, source: Source, model: Any, calibration: Calibration) -> None:
        self.job = job
        self.source = source
        self.calibration = calibration
        self.stages = Stages(job.cache_dir / "stages")
        self.passes: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.text = calibration  # as the base model's tokenizer reads it: what the exam is drawn from
        self.tokenizer: dict[str, Any] | None = None  # tokenizer.json, where a pass merged tokens
        self.weights: dict[str, Tensor] = {}  # base weights that passes trained
        self.found: dict[str, dict[str, Any]] = {}  # the exam's results of the dense model, whole and in windows
        self._exam: Exam | None = None
        base, start = base_plan(model.config, PRODUCER), job.recipe.start
        plan = start.plan(base) if start is not None else base
        self.program = Program(model, plan, {}, job.recipe.seed, job.listen)

    def run_pass(self, each: Pass) -> None:
        """One pass, or its stored result."""
        own, program = _without_own(self.program)
        missing = lacks(program.plan, each.needs)
        if missing:
            raise ArtifactError(f"{each.name} needs {missing[0]}, which the passes before it did not leave")
        config = each.model_dump(mode="json")
        data, tensors = self._stage(
            each.name,
            lambda scratch: _run(each, replace(program, scratch=scratch), self.calibration),
            each.parallel,
            plan=program.plan.to_json(),
            tensors=tensors_digest(program.tensors),
            config=config,
            code=code_digest(each),
        )
        plan = Plan.parse(data["plan"])
        if own:
            plan, tensors = plan.edit(vocabulary=self.program.plan.vocabulary), tensors | own
        record = PassRecord(name=each.name, config=config).model_dump(mode="json")
        plan = plan.edit(passes=[*(p.model_dump(mode="json") for p in program.plan.passes), record])
        trained = {name.removeprefix(WEIGHTS): tensors.pop(name) for name in list(tensors) if name.startswith(WEIGHTS)}
        if plan.frozen is not None and program.plan.vocabulary is None:
            tensors = self._extend(plan.frozen, data["measured"]["pairs"], tensors)
            data["measured"]["tokenizer"] = self._tokenizers()
        put_weights(program.model, trained)
        self.weights |= trained
        tier = each.tier_of_run()
        self.passes.append({"name": each.name, "tier": tier, "config": config, "measured": data["measured"]})
        if each.budget() is not None:
            self.passes[-1]["budget"] = each.budget()
        self.program = replace(program, plan=plan, tensors=tensors)

    def _extend(self, merged: Vocabulary, pairs: list[list[int]], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From here on the model has the merged tokens' rows, and passes measure on text in merged tokens."""
        vocabulary.extend(self.program.model, merged, tensors)
        self.weights |= vocabulary.extended_weights(self.program.model)
        merges = [(left, right, merged.base + number) for number, (left, right) in enumerate(pairs)]
        own = self.text.tokenizer
        self.tokenizer = merged_tokenizer(ByteLevel.of(own), merges, merged.boundary)
        read = with_description(own, self.tokenizer)
        self.calibration = Calibration(
            self.text.corpus, read, seed=self.job.recipe.seed, keep=kept_tokens(self.job.cache_dir)
        )
        return {name: tensor for name, tensor in tensors.items() if name not in (vocabulary.INPUT, vocabulary.NEVER)}

    def _tokenizers(self) -> dict[str, Any]:
        """The base tokenizer beside the artifact's on held-out text, by script."""
        assert self.tokenizer is not None
        texts = by_script([document.text for document in self.text.texts("heldout")])
        return compare(ByteLevel.of(self.text.tokenizer), ByteLevel(self.tokenizer), texts)

    def free_model(self) -> None:
        """The dense model goes before the artifact is loaded: one model in memory at a time."""
        self.program = replace(self.program, model=None)

    def measure_dense(self) -> None:
        """What the gate compares with, measured before any pass trains the weights: dense, and in windows only."""
        if "dense" in self.found:
            return
        base = base_plan(self.program.model.config, PRODUCER)
        self.found["dense"] = self._measure("measure dense", base if base.dsa is not None else None)
        if self.program.plan.window is not None:
            # Without the record of passes: whatever split the heads, windows alone are the same.
            blind = baseline_plan("window", self.program.plan)
            assert blind is not None
            self.found["near"] = self._measure("measure windows", blind.edit(passes=[]))

    def measure_pass(self) -> None:
        """What the passes so far cost: the same measure as the gate's, on the program in memory."""
        if not self.program.plan.is_dense or self.program.plan.vocabulary is not None:
            name = self.passes[-1]["name"]
            after = self._measure(f"measure {name}", self.program.plan)
            self.passes[-1]["after"] = shown(after) | {"selector": after["selector"]}

    def _measure(self, stage: str, plan: Plan | None) -> dict[str, Any]:
        """The exam, stored, so that a resumed compile need not measure again."""
        program, exam = self.program, self.exam
        tensors = program.tensors if plan is program.plan else {}

        def measure(_: Path) -> Stored:
            with applied(program.model, plan, tensors) if plan else nullcontext():
                if plan is program.plan:
                    vocabulary.set_reader(program.model, self.calibration.tokenizer)
                return exam.take(program.model, self.text.tokenizer, self.job.listen, stage), {}

        found = self._stage(
            stage,
            measure,
            exam=exam.inputs,
            code=code_digest(),
            plan=plan.to_json() if plan else None,
            tensors=tensors_digest({**tensors, **self.weights}) if plan else None,
        )
        return dict(found[0])

    @property
    def exam(self) -> Exam:
        """Drawn once the plan says how long a local window is."""
        if self._exam is None:
            recipe = self.job.recipe
            readable = int(self.program.model.config.max_position_embeddings)
            self._exam = Exam.drawn(recipe.gate, self.program.plan, self.text, recipe.seed, readable)
        return self._exam

    def judge(self, aside: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The gate, on the artifact as loaded afresh from the disk; and what it does on the golden prompts."""
        job, exam = self.job, self.exam
        began = time.monotonic()
        model, tokenizer = load(aside, device=job.device, dtype=job.dtype)
        found = exam.take(model, tokenizer, job.listen, "gate")
        self.seconds["gate"] = time.monotonic() - began
        judged = verdict(job.recipe.gate, self.found["dense"], found, self.found.get("near"), self.passes)
        rows = len(exam.windows[0]) - exam.prompt
        asked = sum(map(len, exam.asked.values()))
        judged |= {
            "context": len(exam.windows[0]),
            "decode_rows": rows,
            "windows": len(exam.windows),
            "questions": asked,
        }
        readable = int(model.config.max_position_embeddings)
        return judged, golden.record(model, golden.prompts_for(self.program.plan, tokenizer, readable))

    def measurements(self, gate: Mapping[str, Any]) -> dict[str, Any]:
        """measurements.json: what was measured, on what, with which seeds."""
        return {
            "producer": PRODUCER,
            "seed": self.job.recipe.seed,
            "passes": self.passes,
            "gate": dict(gate),
            "calibration": self.text.describe(),
        }

    def manifest(self, passes: list[Pass]) -> dict[str, Any]:
        """manifest.json without the files: how the artifact was made."""
        resolved = {each.name: each.model_dump(mode="json") for each in passes}
        return {
            "producer": PRODUCER,
            "source": {
                "spec": self.source.spec,
                "kind": self.source.kind,
                "revision": self.source.revision,
                "digest": self.source.digest,
                "license": self.source.license,
                "base_model": self.source.base_model,
                "language": list(self.source.language),
            },
            "recipe": self.job.recipe.model_copy(update={"passes": resolved}).model_dump(mode="json"),
            "calibration": self.text.digest,
            "weights": "trained" if self.weights else "unchanged",
            "device": self.job.device,
            "dtype": self.job.dtype,
            "versions": versions(),
        }

    def _stage(self, name: str, run: Callable[[Path], Stored], parallel: bool = False, **inputs: Any) -> Stored:
        """A stage's result, stored or new. Several processes run a parallel one together, any other the first alone."""
        key = fingerprint(
            stage=name,
            source=self.source.digest,
            calibration=self.calibration.digest,
            seed=self.job.recipe.seed,
            device=self.job.device.partition(":")[0],
            dtype=self.job.dtype,
            torch=torch.__version__,
            **inputs,
        )
        stored = self.stages.load(key)
        if ranks.same(stored is None):
            with self.stages.scratch(key) if ranks.is_first() else nullcontext(self.stages.place(key)) as scratch:
                stored = self.stages.load(key)  # by another compile, while this one waited for the folder
                if ranks.same(stored is None):
                    began = time.monotonic()
                    stored = run(scratch) if parallel or ranks.is_first() else None
                    if stored is not None and ranks.is_first():
                        self.stages.store(key, *stored)
                    ranks.wait()
                    self.seconds[name] = time.monotonic() - began
                    return stored or self._find(key)
        self.job.listen(Event(name, 1, 1, "stored result"))
        self.seconds[name] = 0.0
        return stored or self._find(key)

    def _find(self, key: str) -> Stored:
        """What the first process stored."""
        stored = self.stages.load(key)
        if stored is None:
            raise UsageError(
                f"{self.stages.folder} lacks what the first process stored: point SPARSEC_CACHE to a folder all share"
            )
        return stored


def _without_own(program: Program) -> tuple[dict[str, Tensor], Program]:
    """The tensors that merging by the batch, or writing merged tokens, needs, and the program without them.

    Passes measure on base tokens where a batch is merged, and what they measure writes base tokens.
    """
    names = vocabulary.stored_names(program.plan)
    if not names:
        return {}, program
    rest = {name: tensor for name, tensor in program.tensors.items() if name not in names}
    own = {name: program.tensors[name] for name in names}
    frozen = program.plan.frozen
    plain = None if frozen is None else {**frozen.model_dump(), "write": "base"}
    return own, replace(program, plan=program.plan.edit(vocabulary=plain), tensors=rest)


def _run(each: Pass, program: Program, calibration: Calibration) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(program.seed)
    result = each.run(program, calibration)
    weights = {f"{WEIGHTS}{name}": weight for name, weight in result.weights.items()}
    return {"plan": result.plan.to_json(), "measured": dict(result.measured)}, {**result.tensors, **weights}


def _say(job: Job) -> Any:
    return lambda note: job.listen(Event("open source", note=note))
