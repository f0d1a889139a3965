"""gate.yaml, or ``verify`` of a recipe: what ``sparsec verify`` allows, and what it measures.

    golden: {overlap: 0.9}
    quality: {lengths: [2048, 4096], prompts: 20, max_loss: 0.02}
    speed: {least: 1.0}
    require: [pytorch, onnx]

What is left out has its default; bounds on quality without one are those of the artifact's own recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from sparsec.compiler import plain_yaml
from sparsec.errors import SparsecError, UsageError
from sparsec.layout import MANIFEST, read_json
from sparsec.plan import Strict, first_error

Engine = Literal["pytorch", "triton", "onnx", "tensorrt", "vllm"]


class GoldenBounds(Strict):
    """Golden prompts. Rounding depends on the dtype: null is strict in float32, wider in others."""

    outputs: float | None = Field(default=None, ge=0, description="a head's output: relative distance")
    overlap: float | None = Field(default=None, ge=0, le=1, description="chosen keys: least intersection over union")
    logits: float | None = Field(default=None, ge=0, description="logits of the most likely tokens")
    greedy: float = Field(default=0.75, ge=0, le=1, description="least share of equal greedy tokens")

    def outputs_for(self, exact: bool) -> float:
        """exact: recorded and run in float32."""
        return self.outputs if self.outputs is not None else 1e-3 if exact else 0.1

    def overlap_for(self, exact: bool) -> float:
        """As :meth:`outputs_for`."""
        return self.overlap if self.overlap is not None else 0.98 if exact else 0.8

    def logits_for(self, exact: bool) -> float:
        """As :meth:`outputs_for`."""
        return self.logits if self.logits is not None else 0.02 if exact else 0.6


class QualityBounds(Strict):
    """Quality beside the dense model, and against what the compile measured."""

    lengths: tuple[int, ...] = Field(
        default=(), description="context lengths in tokens; none: two and four spans of the plan"
    )
    windows: int = Field(default=2, ge=0, le=1000, description="held-out windows a length")
    rows: int = Field(default=128, ge=16, le=65536, description="decode rows of each")
    tasks: tuple[str, ...] = Field(default=("kv",), description="tasks of sparsec eval")
    prompts: int = Field(default=4, ge=0, le=10000, description="a task and length")
    max_loss: float | None = Field(
        default=None, ge=0, description="bits per byte above dense, as a share; null: the recipe's"
    )
    max_points: float | None = Field(
        default=None, ge=0, description="share of answers below dense, certain at 95 %; null: the recipe's"
    )
    max_drift: float | None = Field(
        default=None,
        ge=0,
        description="bits per byte, recall and kept tokens beside those recorded, relative; null: by dtype",
    )
    max_regression: float = Field(
        default=0.005, ge=0, description="bits per byte above --against, as a share; and share of answers below it"
    )


class SpeedBounds(Strict):
    """Wall-clock beside the dense model, in one run."""

    context: int | None = Field(default=None, ge=16, description="tokens of the prompt; null: four spans of the plan")
    tokens: int = Field(default=8, ge=1, le=10000, description="decode steps timed")
    least: float | None = Field(default=None, ge=0, description="dense's time a token over ours; null: no bound")
    least_prefill: float | None = Field(default=None, ge=0, description="the same of the prompt")


class Thresholds(Strict):
    """All of gate.yaml."""

    golden: GoldenBounds = GoldenBounds()
    quality: QualityBounds = QualityBounds()
    speed: SpeedBounds = SpeedBounds()
    require: tuple[Engine, ...] = Field(default=(), description="engines that must run: 'not run here' fails the gate")


def of_recipe(artifact: Path) -> Thresholds:
    """Those that the artifact was compiled with; every default where it has none, or cannot be read."""
    try:
        made = read_json(artifact / MANIFEST)
        return Thresholds.model_validate(made["recipe"].get("verify") or {})
    except (SparsecError, KeyError, TypeError, AttributeError, ValidationError):
        return Thresholds()  # integrity has the word on a damaged manifest


def read_thresholds(path: Path) -> Thresholds:
    """A gate.yaml.

    Raises:
        UsageError: it cannot be read, is no YAML, or has a field that is unknown or out of bounds.
    """
    try:
        data = plain_yaml.read(path)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the path") from None
    except plain_yaml.NotPlain as error:
        raise UsageError(f"{path} is not YAML ({error}): see docs/ci.md") from None
    try:
        return Thresholds.model_validate({} if data is None else data)
    except ValidationError as error:
        raise UsageError(f"{path}: {first_error(error)}; docs/ci.md lists every field") from None
