"""The systems of an evaluation: the base model, its baselines, and artifacts, each opened when its turn comes.

Baselines are the first artifact's plan with parts left out. Artifacts whose weights no pass trained run on the base
model that is there already; an artifact with weights of its own is loaded from its folder, after the base model has
been let go, so that one model is in memory at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.evaluate import BASELINES, DENSE, Found, Keep, Suite, System, baseline_plan, evaluate
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.explain import artifact_data
from sparsec.compiler.kept_tokens import kept_tokens
from sparsec.compiler.quiet import transformers_call
from sparsec.compiler.source import Source, load_model, open_source
from sparsec.compiler.stages import Stages, code_digest, fingerprint
from sparsec.compiler.versions import versions
from sparsec.errors import ArtifactError, SourceError, UsageError
from sparsec.events import Listener, silent
from sparsec.export.dsa import leaves_out
from sparsec.layout import TENSORS
from sparsec.plan import Plan
from sparsec.plugins.auto import read_tensors
from sparsec.plugins.device import check_dtype, device_map
from sparsec.plugins.kernels.support import Kernels
from sparsec.plugins.load import load
from sparsec.plugins.runtime import applied, tensor_names, uninstall, use_kernels
from sparsec.plugins.vocabulary import unmerged

ARTIFACT = "artifact"  # in --systems: every artifact; in the table: the only one


@dataclass(frozen=True)
class Compiled:
    """An artifact that is to be evaluated."""

    name: str
    path: Path
    plan: Plan
    manifest: Mapping[str, Any]

    @property
    def trained(self) -> bool:
        """A pass changed the base weights."""
        return bool(self.manifest.get("weights", "unchanged") == "trained")

    @property
    def holds_base(self) -> bool:
        """Its weights are the base model's, all of them: none trained, no shared layer's indexer left out."""
        return not self.trained and not leaves_out(self.plan)

    def tokenizer(self) -> Any:
        """Its tokenizer, the base model's.

        Raises:
            SourceError: transformers cannot read it.
        """
        with transformers_call(f"transformers cannot read the tokenizer in {self.path}", "copy or compile it again"):
            own = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        frozen = (
            self.plan.vocabulary if self.plan.vocabulary is not None and self.plan.vocabulary.mode == "static" else None
        )
        return own if frozen is None else unmerged(own, frozen.base)

    @property
    def identity(self) -> Any:
        """All that decides its answers: its own tensors and weights, by their sha256."""
        files = {name: digest for name, digest in self.manifest["files"].items() if name.endswith(".safetensors")}
        return [self.manifest["source"]["digest"], self.plan.to_json(), files if self.trained else files.get(TENSORS)]

    def to_json(self) -> dict[str, Any]:
        """What the evaluation says about it."""
        return {
            "producer": self.manifest["producer"],
            "plan": self.plan.digest,
            "passes": [each.name for each in self.plan.passes],
            "weights": "trained" if self.trained else "unchanged",
        }


def evaluate_artifacts(
    paths: Sequence[Path],
    names: Sequence[str] | None,
    suite: Suite,
    *,
    text: str | None = None,
    base: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    cache_dir: Path,
    kernels: Kernels = "auto",
    listen: Listener = silent,
) -> dict[str, Any]:
    """Measure artifacts beside the systems ``names`` (``artifact``: all; None: all that there are) on held-out text.

    Args:
        text: what to measure on, as the calibration of a recipe; None is the first artifact's own.
        base: where the dense model is, if not where it was at the compile.
        kernels: what generated answers and texts run on; the text loss always runs on the reference.

    Returns:
        ``calibrate.evaluate.evaluate``'s JSON data, ``versions``, and ``artifacts``: what each name stands for.

    Raises:
        SparsecError: see :func:`open_artifacts`, :class:`Base` and ``evaluate``.
    """
    artifacts = open_artifacts(paths)
    if names is None:
        names = [*BASELINES, ARTIFACT] if artifacts[0].plan.dsa is None else [DENSE, ARTIFACT]
    recipe = artifacts[0].manifest["recipe"]
    corpus = read_corpus(text or recipe["calibration"])
    calibration = Calibration(corpus, artifacts[0].tokenizer(), seed=recipe["seed"], keep=kept_tokens(cache_dir))
    dense = Base(artifacts, spec=base, device=device, dtype=dtype, cache_dir=cache_dir, kernels=kernels)
    # Dense first: the long decode is compared with its text.
    rows = systems(sorted(names, key=lambda name: name != DENSE), artifacts, dense, rounding=bool(suite.decode_tokens))
    result = evaluate(rows, calibration, suite, keep=_keeping(cache_dir, device, dtype, kernels), listen=listen)
    return result | {
        "kernels": kernels,
        "versions": versions(),
        "artifacts": {each.name: each.to_json() for each in artifacts},
    }


def open_artifacts(paths: Sequence[Path]) -> list[Compiled]:
    """Artifacts under their names: the folder's own, with as many folders above as it takes to tell them apart.

    Raises:
        UsageError: none, or one twice.
        ArtifactError: no artifact, a damaged one, or two that were compiled from different models.
    """
    whole = [path.absolute().resolve() for path in paths]
    if not whole:
        raise UsageError("no artifact to evaluate: name a folder that sparsec compile wrote")
    if len(set(whole)) < len(whole):
        raise UsageError("an artifact is named twice: name each once")
    found = []
    for name, path in zip(_names(whole), paths, strict=True):
        data = artifact_data(path)
        found.append(Compiled(name, path, Plan.parse(data["plan"]), data["manifest"]))
    first = found[0]
    for other in found[1:]:
        if other.manifest["source"]["digest"] != first.manifest["source"]["digest"]:
            raise ArtifactError(
                f"{first.path} and {other.path} were compiled from different models: evaluate each on its own"
            )
    return found


class Base:
    """The dense model that the artifacts were compiled from, loaded when first asked for.

    It comes out of an artifact, where all hold the base model's weights; else, or where ``spec`` names it, from the
    source.

    Raises:
        UsageError: an unknown device or dtype, or a GPU that is not there.
        ArtifactError: the source is not there any more, or is another one.
    """

    def __init__(
        self,
        artifacts: Sequence[Compiled],
        *,
        spec: str | None,
        device: str,
        dtype: str,
        cache_dir: Path,
        kernels: Kernels = "auto",
    ) -> None:
        check_dtype(dtype)
        device_map(device)
        self.device, self.dtype, self.kernels = device, dtype, kernels
        self.artifact = artifacts[0]
        from_source = spec is not None or not all(each.holds_base for each in artifacts)
        self.source = _source(self.artifact, spec, cache_dir) if from_source else None
        self.model: Any = None

    def get(self) -> Any:
        """The model, dense."""
        if self.model is None:
            self.model = self.load(self.dtype)
        return self.model

    def identity(self, plan: Plan | None) -> Any:
        """All that decides the answers of this model under a plan."""
        return [self.artifact.manifest["source"]["digest"], plan.to_json() if plan is not None else None]

    def load(self, dtype: str) -> Any:
        """A new copy of the model."""
        if self.source is not None:
            return load_model(self.source, device=self.device, dtype=dtype)
        model = load(self.artifact.path, device=self.device, dtype=dtype).model
        uninstall(model)
        return model

    def release(self) -> None:
        """Let the model go."""
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def systems(names: Sequence[str], artifacts: Sequence[Compiled], base: Base, *, rounding: bool) -> list[System]:
    """What the evaluation runs, in the order given; ``artifact`` stands for all artifacts.

    Args:
        rounding: behind dense comes dense in another dtype, for the long decode: how much rounding alone changes.
    """
    made = []
    for name in names:
        if name == ARTIFACT:
            made += [System(each.name, partial(_artifact, each, base), each.plan, each.identity) for each in artifacts]
            continue
        plan = baseline_plan(name, artifacts[0].plan)
        made.append(System(name, partial(_planned, base, plan, {}), plan, base.identity(plan)))
        if name == DENSE and rounding:
            other = "bfloat16" if base.get().dtype == torch.float32 else "float32"
            identity = [other, base.identity(None)]
            made.append(System(f"{DENSE} {other}", partial(_rounded, base, other), None, identity, only_decodes=True))
    return made


def _source(artifact: Compiled, spec: str | None, cache_dir: Path) -> Source:
    """What the artifact was compiled from, where it was then or where ``spec`` says; it has to be the same."""
    made = artifact.manifest["source"]
    named = spec or made["spec"]
    # The commit belongs to the place that was compiled from.
    revision = made["revision"] if named == made["spec"] else None
    try:
        opened = open_source(named, revision=revision, cache_dir=cache_dir)
    except (SourceError, UsageError) as error:
        raise ArtifactError(
            f"the dense model that {artifact.path} was compiled from cannot be opened ({error}): "
            "say with --base where it is"
        ) from None
    if opened.digest != made["digest"]:
        raise ArtifactError(
            f"{named} is not the model that {artifact.path} was compiled from, or it has changed: "
            "say with --base where that one is"
        )
    return opened


def _keeping(cache_dir: Path, device: str, dtype: str, kernels: Kernels) -> Keep:
    """Parts that are done are found again when an evaluation was stopped; so is what two evaluations share."""
    stages = Stages(cache_dir / "evaluations")
    where = {"device": device.partition(":")[0], "dtype": dtype, "torch": torch.__version__, "code": code_digest()}
    where["kernels"] = kernels

    def keep(make: Callable[[], Found], **inputs: Any) -> Found:
        return stages.kept(fingerprint(**where, **inputs), make)

    return keep


@contextmanager
def _planned(base: Base, plan: Plan | None, tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    model = base.get()
    if plan is None:
        yield model
        return
    with applied(model, plan, tensors):
        use_kernels(model, base.kernels)
        yield model


@contextmanager
def _artifact(artifact: Compiled, base: Base) -> Iterator[Any]:
    if artifact.trained:
        base.release()
        yield load(artifact.path, device=base.device, dtype=base.dtype, kernels=base.kernels).model
        return
    tensors = read_tensors(artifact.path / TENSORS) if tensor_names(artifact.plan) else {}
    with _planned(base, artifact.plan, tensors) as model:
        yield model


@contextmanager
def _rounded(base: Base, dtype: str) -> Iterator[Any]:
    base.release()
    yield base.load(dtype)


def _names(paths: Sequence[Path]) -> list[str]:
    """The end of each path that no other one and no other system has; one alone is ``artifact``."""
    if len(paths) == 1:
        return [ARTIFACT]
    taken = {*BASELINES, ARTIFACT}
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names) and not taken & set(names):
            return names
    return [str(path) for path in paths]
