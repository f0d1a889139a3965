"""The recipe: everything that decides a compile's result, beside the source. YAML in, YAML out.

    passes:
      rtpurbo: {ratio: 0.15}
      indexcache: {keep: 0.25}
    calibration: builtin
    seed: 0
    gate: {max_loss: 0.05}

Every artifact carries the recipe it was made with (``sparsec inspect ARTIFACT --recipe``), options spelled out; it
gives the same plan again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from sparsec.compiler import plain_yaml
from sparsec.compiler.registry import suggest
from sparsec.compiler.start import Start
from sparsec.compiler.thresholds import Thresholds
from sparsec.errors import UsageError
from sparsec.plan import Strict, first_error


class Gate(Strict):
    """Held-out quality that an artifact must have, measured on it as loaded afresh."""

    max_loss: float = Field(
        default=0.05, ge=0, description="bits per byte above dense, as a share, in the decode regime"
    )
    min_recall: float = Field(
        default=0.85,
        ge=0,
        le=1,
        description="attention mass that selectors find; of a model's own indexers: share of what they found",
    )
    windows: int = Field(default=1, ge=1, description="held-out windows")
    context: int | None = Field(
        default=None, ge=64, description="tokens each; null: 4 times a local window, or what own indexers choose"
    )
    rows: int = Field(default=512, ge=16, description="decode rows of each; the rest is the prompt")
    prompts: int = Field(default=0, ge=0, description="long-range questions of each kind (kv, multikey); 0: none")
    max_points: float = Field(
        default=0.05, ge=0, description="share of the questions that may be answered less often than dense does"
    )


class Recipe(Strict):
    """What ``sparsec compile`` does to a source."""

    passes: dict[str, dict[str, Any]] = Field(description="options by pass; none only behind a start")
    calibration: str = Field(default="builtin", description="file, folder, Hub data set or 'builtin'")
    seed: int = Field(default=0, ge=0, lt=2**63)
    gate: Gate = Gate()
    start: Start | None = Field(default=None, description="null, or absent: the dense model; else a head split")
    verify: Thresholds | None = Field(default=None, description="null, or absent: the defaults of [gate.yaml](ci.md)")

    @model_serializer(mode="wrap")
    def _without_null(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that came later are not in recipes that do not use them."""
        data: dict[str, Any] = write(self)
        return {key: value for key, value in data.items() if value is not None or key not in ("start", "verify")}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.passes and self.start is None:
            raise ValueError("no passes: name one or more")
        return self

    def to_yaml(self) -> str:
        """The recipe as a file."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file as data, checked for its shape when merged with the command line.

    Raises:
        UsageError: the file is missing, no YAML, or has unknown keys.
    """
    try:
        data = plain_yaml.read(path)
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path} ({error.strerror}): check the path") from None
    except plain_yaml.NotPlain as error:
        raise UsageError(f"the recipe {path} is not YAML ({error}): see docs/artifact.md") from None
    if not isinstance(data, dict):
        raise UsageError(f"the recipe {path} must be a mapping with the key 'passes'")
    for key in data:
        if key not in Recipe.model_fields:
            raise UsageError(
                f"the recipe {path} has an unknown key {key!r}: {suggest(str(key), list(Recipe.model_fields))}"
            )
    passes = data.get("passes") or {}
    if not isinstance(passes, dict) or not all(isinstance(options or {}, dict) for options in passes.values()):
        raise UsageError(f"passes of the recipe {path} must map a name to options, e.g. rtpurbo: {{ratio: 0.15}}")
    gate = data.get("gate") or {}
    if not isinstance(gate, dict):
        raise UsageError(f"gate of the recipe {path} must map options to values, e.g. max_loss: 0.05")
    return {**data, "passes": {name: options or {} for name, options in passes.items()}, "gate": gate}


def make_recipe(data: dict[str, Any]) -> Recipe:
    """Validate.

    Raises:
        UsageError: naming the first field that is wrong.
    """
    for option in data.get("gate") or {}:
        if option not in Gate.model_fields:
            raise UsageError(f"gate has no option {option!r}: {suggest(str(option), list(Gate.model_fields))}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"recipe: {first_error(error)}") from None


def parse_setting(text: str) -> tuple[str, str, Any]:
    """``rtpurbo.ratio=0.2`` -> ('rtpurbo', 'ratio', 0.2). Values are YAML.

    Raises:
        UsageError: not of that form.
    """
    target, equals, value = text.partition("=")
    owner, dot, option = target.partition(".")
    if not (equals and dot and owner and option):
        raise UsageError(f"--set {text!r}: write pass.option=value, e.g. rtpurbo.ratio=0.2")
    try:
        return owner, option, plain_yaml.parse(value)
    except plain_yaml.NotPlain:
        raise UsageError(f"--set {text!r}: the value is not YAML") from None
