"""Quality and speed of an artifact, measured again: beside what its compile recorded, beside dense, beside another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsec.calibrate.comparisons import BITS
from sparsec.calibrate.corpus import Corpus, read_corpus
from sparsec.calibrate.evaluate import DENSE, Suite, evaluate
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.bench import bench, of_artifact
from sparsec.compiler.gate import Exam
from sparsec.compiler.kept_tokens import kept_tokens
from sparsec.compiler.recipe import Gate, Recipe
from sparsec.compiler.systems import ARTIFACT, Base, Compiled, open_artifacts, systems
from sparsec.compiler.thresholds import Thresholds
from sparsec.errors import CalibrationError, SparsecError
from sparsec.events import Listener
from sparsec.export.verdicts import FAIL, NOT_RUN, PASS, Check
from sparsec.export.words import change, percent
from sparsec.layout import MEASUREMENTS, read_json
from sparsec.plan import Plan
from sparsec.plugins.load import load

DRIFT = {"float32": 1e-3}  # relative; other dtypes round more
WIDE_DRIFT = 1e-2
LARGEST_PROMPT = 8192  # tokens that a prompt of the default measures has at most


def drift(
    artifact: Path,
    thresholds: Thresholds,
    text: str | None,
    *,
    cache_dir: Path,
    device: str,
    dtype: str,
    listen: Listener,
) -> list[Check]:
    """The gate's own windows once more: bits per byte, recall and kept tokens beside those in measurements.json.

    It says that the artifact does here what it did there; the calibration text has to be the same.
    """
    name, (one,) = "as recorded", open_artifacts([artifact])
    calibration, why = _recorded_text(one, text, cache_dir)
    if calibration is None:
        return [Check("quality", name, NOT_RUN, why, "pytorch")]
    recorded = read_json(artifact / MEASUREMENTS)["gate"]
    recipe = Recipe.model_validate(one.manifest["recipe"])
    model, tokenizer = load(artifact, device=device, dtype=dtype)
    readable = int(model.config.max_position_embeddings)
    exam = Exam.drawn(recipe.gate.model_copy(update={"prompts": 0}), one.plan, calibration, recipe.seed, readable)
    found = exam.take(model, tokenizer, listen, "verify: as recorded")
    exact = str(model.dtype).removeprefix("torch.")
    allowed = thresholds.quality.max_drift
    if allowed is None:
        allowed = DRIFT.get(exact, WIDE_DRIFT)
    pairs = [(BITS, recorded["artifact"][BITS], found[BITS])]
    if recorded["selector"] and found["selector"]:
        pairs += [(key, recorded["selector"][key], found["selector"][key]) for key in ("recall_mean", "kept_mean")]
    checks = []
    for key, before, now in pairs:
        moved = now / before - 1
        said = f"{key} {now:.4f}, recorded {before:.4f} ({change(moved, 3)}, {percent(allowed, 2)} is allowed)"
        good = abs(moved) <= allowed
        checks.append(Check("quality", f"{name}: {key}", PASS if good else FAIL, said, "pytorch", {"change": moved}))
    return checks


def beside(
    artifact: Path,
    other: Path | None,
    thresholds: Thresholds,
    *,
    text: str | None,
    base: str | None,
    cache_dir: Path,
    device: str,
    dtype: str,
    listen: Listener,
) -> list[Check]:
    """Text and tasks by length, dense and the artifact (and another one) on the same windows and prompts."""
    paths = [artifact] if other is None else [other, artifact]
    artifacts = open_artifacts(paths)
    mine = artifacts[-1]
    suite = _suite(thresholds, mine.plan, read_json(artifact / "config.json"))
    seed = mine.manifest["recipe"]["seed"]
    calibration = Calibration(_text(mine, text), mine.tokenizer(), seed=seed, keep=kept_tokens(cache_dir))
    dense = Base(artifacts, spec=base, device=device, dtype=dtype, cache_dir=cache_dir)
    rows = systems([DENSE, ARTIFACT], artifacts, dense, rounding=False)
    result = evaluate(rows, calibration, suite, listen=listen)
    gate = Gate.model_validate(mine.manifest["recipe"]["gate"])
    bounds = thresholds.quality
    loss = bounds.max_loss if bounds.max_loss is not None else gate.max_loss
    points = bounds.max_points if bounds.max_points is not None else gate.max_points
    checks = [_judged(row, "dense", loss, points) for row in result["comparisons"] if _is(row, mine.name, DENSE)]
    if other is not None:
        limit = bounds.max_regression
        theirs = artifacts[0].name
        checks += [
            _judged(row, str(other), limit, limit) for row in result["comparisons"] if _is(row, mine.name, theirs)
        ]
        checks += list(_passes(artifact, other, limit))
    notes = "; ".join(result["notes"])
    return [*checks, Check("quality", "notes", PASS, notes)] if notes else checks


def speed(
    artifact: Path, thresholds: Thresholds, text: str | None, *, device: str, dtype: str, listen: Listener
) -> list[Check]:
    """Time to the first token and of a later one, dense over ours: above 1 the artifact is faster."""
    (one,) = open_artifacts([artifact])
    bounds = thresholds.speed
    context = bounds.context or min(4 * (one.plan.span or 256), LARGEST_PROMPT)
    try:
        subject = of_artifact(artifact, context, text=text, device=device, dtype=dtype, kernels="auto")
    except CalibrationError as error:
        return [Check("speed", "beside dense", NOT_RUN, str(error))]
    result = bench(subject, [context], batch=1, tokens=bounds.tokens, kernels="auto", listen=listen)
    by = {row["system"]: row for row in result["rows"]}
    checks = []
    for key, name, least in (
        ("step_s", "a token", bounds.least),
        ("prefill_s", "the prompt", bounds.least_prefill),
    ):
        if not all(key in row for row in by.values()):
            checks.append(Check("speed", name, NOT_RUN, f"{context} tokens do not fit into memory"))
            continue
        ratio = by["dense"][key] / by["artifact"][key]
        ran = f"{by['artifact']['runs']} beside {by['dense']['runs']}"
        said = f"{ratio:.2f} times as fast as dense at {context} tokens ({ran})"
        said += f", {least:g} is the least" if least is not None else ", no bound was set"
        good = least is None or ratio >= least
        checks.append(Check("speed", name, PASS if good else FAIL, said, "", {"ratio": ratio, "context": context}))
    return checks


def _suite(thresholds: Thresholds, plan: Plan, config: Mapping[str, Any]) -> Suite:
    bounds, span = thresholds.quality, plan.span or 256
    readable = int(config.get("max_position_embeddings") or LARGEST_PROMPT)
    lengths = bounds.lengths or sorted({min(n * span, readable, LARGEST_PROMPT) for n in (2, 4)})
    return Suite(
        lengths=lengths,
        tasks=bounds.tasks,
        prompts_each=bounds.prompts,
        windows_each=bounds.windows,
        rows=bounds.rows,
    )


def _recorded_text(one: Compiled, text: str | None, cache_dir: Path) -> tuple[Calibration | None, str]:
    """The calibration that the artifact was judged on, or why it cannot be had."""
    try:
        seed = one.manifest["recipe"]["seed"]
        calibration = Calibration(_text(one, text), one.tokenizer(), seed=seed, keep=kept_tokens(cache_dir))
    except SparsecError as error:
        return None, str(error)
    if calibration.digest != one.manifest["calibration"]:
        return None, "the calibration text is another one than at the compile: give that one with --text"
    return calibration, ""


def _text(one: Compiled, text: str | None) -> Corpus:
    return read_corpus(text or one.manifest["recipe"]["calibration"])


def _is(row: Mapping[str, Any], system: str, against: str) -> bool:
    return {row["system"], row["against"]} == {system, against}


def _judged(row: Mapping[str, Any], against: str, loss: float, points: float) -> Check:
    """Bits per byte must not rise by more than ``loss``. Answers are few: they fail where it is certain at 95 %."""
    name = f"{row['measure']} at {row['length']:,} tokens, against {against}"
    if row["measure"] == BITS:
        said = f"{change(row['change'])} [{change(row['low'])}, {change(row['high'])}], {change(loss)} is allowed"
        good = row["change"] <= loss
    else:
        said = (
            f"{100 * row['change']:+.1f} points [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}] over {row['n']} "
            f"prompts, {100 * -points:+.1f} is allowed"
        )
        good = row["high"] >= -points
    return Check("quality", name, PASS if good else FAIL, said, "pytorch", dict(row))


def _passes(artifact: Path, other: Path, limit: float) -> Iterator[Check]:
    """What each pass left, as both compiles recorded it; comparable where both were measured on the same windows."""
    mine, theirs = (read_json(path / MEASUREMENTS) for path in (artifact, other))
    if mine["calibration"]["digest"] != theirs["calibration"]["digest"] or any(
        mine["gate"][key] != theirs["gate"][key] for key in ("context", "decode_rows", "windows")
    ):
        yield Check("quality", "pass by pass", NOT_RUN, "the two compiles measured their passes on other text")
        return
    before = {each["name"]: each["after"] for each in theirs["passes"] if "after" in each}
    for each in mine["passes"]:
        if each["name"] in before and "after" in each:
            moved = each["after"][BITS] / before[each["name"]][BITS] - 1
            said = f"{each['after'][BITS]:.4f} bits per byte, {change(moved)} against {other}"
            good = moved <= limit
            yield Check("quality", f"after {each['name']}", PASS if good else FAIL, said, "", {"change": moved})
