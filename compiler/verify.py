"""``sparsec verify``: is an artifact whole, and is it still what it was when its compile measured it?

integrity   hashes, names, plan against tensors, keys of other engines       :mod:`sparsec.export.integrity`
golden      fixed prompts: next tokens, heads' outputs, chosen keys          :mod:`sparsec.compiler.golden`
quality     bits per byte and answers beside dense, paired; and beside what the compile recorded
speed       wall-clock beside dense in one run
engines     each that can run the plan: pass, fail, or not run here and why

What is damaged is not run. Every check says pass, fail or not run; nothing is left out silently.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsec.compiler import golden
from sparsec.compiler.engines import NotHere, not_run, on_onnx
from sparsec.compiler.golden_compare import Difference, differences, written
from sparsec.compiler.recheck import beside, drift, speed
from sparsec.compiler.thresholds import Thresholds
from sparsec.compiler.versions import versions
from sparsec.errors import SparsecError
from sparsec.events import Event, Listener, silent
from sparsec.export import integrity
from sparsec.export.verdicts import FAIL, NOT_RUN, PASS, Check
from sparsec.layout import GOLDEN, read_json
from sparsec.plugins.kernels.support import reason_against
from sparsec.plugins.load import load


@dataclass(frozen=True)
class Asked:
    """What to verify, and where."""

    artifact: Path
    thresholds: Thresholds
    cache_dir: Path
    quick: bool = False
    against: Path | None = None
    base: str | None = None
    text: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    listen: Listener = field(default=silent, compare=False)


def verify(asked: Asked) -> dict[str, Any]:
    """All checks, as JSON data: ``passed``, ``checks``, and what they ran on.

    Raises:
        ArtifactError: there is no such folder.
        UsageError: an unknown device or dtype.
    """
    run = _Run(asked)
    for finding in integrity.check(asked.artifact):
        run.checks.append(Check("integrity", finding.name, PASS if finding.good else FAIL, finding.said))
    if run.broken:
        run.skip("golden", "prompts", "the artifact is damaged")
        run.skip("quality", "text and tasks", "the artifact is damaged")
    else:
        run.golden()
        run.measured()
    run.required()
    return {
        "artifact": str(asked.artifact),
        "passed": not run.broken,
        "quick": asked.quick,
        "against": str(asked.against) if asked.against is not None else None,
        "checks": [check.to_json() for check in run.checks],
        "thresholds": asked.thresholds.model_dump(mode="json"),
        "device": asked.device,
        "dtype": asked.dtype,
        "versions": versions(),
    }


class _Run:
    """The checks so far."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.checks: list[Check] = []
        self.model: Any = None

    @property
    def broken(self) -> bool:
        return any(check.status == FAIL for check in self.checks)

    def skip(self, group: str, name: str, why: str, engine: str = "") -> None:
        self.checks.append(Check(group, name, NOT_RUN, why, engine))

    def take(self, group: str, name: str, work: Callable[[], list[Check]], engine: str = "") -> None:
        """The checks of some work; what it cannot do is a failure that says why."""
        self.asked.listen(Event(f"verify {name}", 0, 1))
        began = time.monotonic()
        try:
            found = work()
        except SparsecError as error:
            found = [Check(group, name, FAIL, str(error), engine)]
        share = (time.monotonic() - began) / max(1, len(found))
        self.checks += [check.timed(share) for check in found]
        self.asked.listen(Event(f"verify {name}", 1, 1))

    def golden(self) -> None:
        """The golden prompts on every engine."""
        asked = self.asked
        if not (asked.artifact / GOLDEN).is_file():
            self.checks.append(Check("golden", "prompts", FAIL, f"{asked.artifact} has no {GOLDEN}: compile it again"))
            return
        self.take("golden", "prompts", self._loaded, "pytorch")
        if self.model is not None:
            self.take("golden", "next tokens", self._triton, "triton")
        self.model = None  # one at a time in memory
        self.take("golden", "next tokens", self._onnx, "onnx")
        for engine, why in not_run(asked.artifact):
            self.skip("golden", "next tokens", why, engine)

    def _loaded(self) -> list[Check]:
        """On the reference."""
        asked = self.asked
        recorded = _recorded(asked)
        self.model = load(asked.artifact, device=asked.device, dtype=asked.dtype).model
        found = differences(recorded, golden.again(self.model, recorded), asked.thresholds.golden)
        return _judged(found, "pytorch")

    def _triton(self) -> list[Check]:
        """One step at a time on the kernels, on a GPU only: interpreted on a CPU they would take hours."""
        asked, model = self.asked, self.model
        first = next(model.parameters())
        why = reason_against(model.sparsec_plan, first.device, first.dtype)
        if first.device.type != "cuda":
            why = "the kernels need a GPU: --device cuda"
        if why is not None:
            return [Check("golden", "next tokens", NOT_RUN, why, "triton")]
        recorded = _recorded(asked)
        vocabulary = int(model.config.get_text_config().vocab_size)
        prompts = golden.tokens_of(recorded, vocabulary)
        now = [golden.on_kernels(model, tokens, "triton") for tokens in prompts]
        dtype = str(model.dtype).removeprefix("torch.")
        return _judged(written(recorded, now, dtype, asked.thresholds.golden), "triton")

    def _onnx(self) -> list[Check]:
        """The exported graphs, where there are any."""
        asked = self.asked
        recorded = _recorded(asked)
        try:
            return _judged(on_onnx(asked.artifact, recorded, asked.thresholds.golden, asked.device), "onnx")
        except NotHere as why:
            return [Check("golden", "next tokens", NOT_RUN, str(why), "onnx")]

    def measured(self) -> None:
        """Quality and speed: minutes, so not where it has to be quick."""
        asked = self.asked
        if asked.quick:
            for group, name in (("quality", "text and tasks"), ("quality", "as recorded"), ("speed", "beside dense")):
                self.skip(group, name, "--quick leaves it out")
            return
        where: Mapping[str, Any] = {"device": asked.device, "dtype": asked.dtype, "listen": asked.listen}
        self.take(
            "quality",
            "as recorded",
            lambda: drift(asked.artifact, asked.thresholds, asked.text, cache_dir=asked.cache_dir, **where),
        )
        self.take(
            "quality",
            "beside dense",
            lambda: beside(
                asked.artifact,
                asked.against,
                asked.thresholds,
                text=asked.text,
                base=asked.base,
                cache_dir=asked.cache_dir,
                **where,
            ),
        )
        self.take("speed", "beside dense", lambda: speed(asked.artifact, asked.thresholds, asked.text, **where))

    def required(self) -> None:
        """Engines that the thresholds demand have run."""
        for engine in self.asked.thresholds.require:
            mine = [check for check in self.checks if check.engine == engine]
            if not any(check.status == PASS for check in mine):
                why = mine[0].said if mine else "it was not reached"
                said = f"{engine} has to run, and did not: {why}"
                self.checks.append(Check("engines", "required", FAIL, said, engine))


def _recorded(asked: Asked) -> Any:
    """golden.json; where it has to be quick, its first prompt."""
    recorded = read_json(asked.artifact / GOLDEN)
    if asked.quick and isinstance(recorded, dict) and isinstance(recorded.get("prompts"), list):
        return recorded | {"prompts": recorded["prompts"][:1]}
    return recorded


def _judged(found: list[Difference], engine: str) -> list[Check]:
    return [
        Check("golden", each.name, PASS if each.good else FAIL, each.said, engine, {"value": each.value})
        for each in found
    ]
