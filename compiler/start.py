"""``sparsec compile --from``: a head split out of another engine's files, as the plan that the passes go on from.

It becomes a part of the recipe: an artifact is compiled again without those files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from sparsec.errors import ArtifactError, UsageError
from sparsec.export.dialects import DIALECTS
from sparsec.export.dialects.files import read_files
from sparsec.export.dialects.foreign import Foreign, starting_plan
from sparsec.plan import Plan, Strict

Heads = tuple[tuple[int, ...], ...]


class Start(Strict):
    """The split. By query head where the files say so, else by KV head; 1 = retrieval."""

    dialect: str = Field(description="whose files it was in")
    heads: Heads | None = Field(default=None, description="by layer and query head")
    kv_heads: Heads | None = Field(default=None, description="by layer and KV head")
    window: int | None = Field(default=None, ge=1, description="tokens that a local head sees")
    sinks: int | None = Field(default=None, ge=0, description="first tokens that local heads always see")
    min_context: int | None = Field(default=None, ge=0, description="dense up to here; null: as the engine has it")

    def plan(self, base: Plan) -> Plan:
        """On the unchanged model's plan; layers that the model runs with its own sliding window stay its own.

        Raises:
            ArtifactError: it is the split of another model, or none.
        """
        if base.dsa is not None:
            raise ArtifactError("a model with indexers of its own has no heads to split: leave --from out")
        if all(kind for row in self.heads or self.kv_heads or () for kind in row):
            raise ArtifactError(f"the split of {self.dialect} keeps every head: leave --from out")
        plan = starting_plan(Foreign(says="", **self.model_dump()), base.model, base.producer)
        layers = [own if own.heads is None else ours for own, ours in zip(base.layers, plan.layers, strict=True)]
        return plan.edit(layers=[layer.model_dump() for layer in layers])


def read_start(path: Path) -> tuple[Start | None, str | None]:
    """The head split that the files hold, and the sharing pattern; None for what they do not say.

    Raises:
        UsageError: no format that is known, or one that says neither.
        ArtifactError: the files are not there, or damaged.
    """
    files = read_files(path)
    found = [each.decode(files, None) for each in DIALECTS.values() if each.recognise(files)]
    split = next((each for each in found if each.heads is not None or each.kv_heads is not None), None)
    pattern = next((each.pattern for each in found if each.pattern is not None), None)
    if split is None and pattern is None:
        said = f"{found[0].dialect} says neither heads nor sharing" if found else "none of the known formats"
        raise UsageError(f"--from {path}: {said}; known: {', '.join(DIALECTS)}")
    fields: dict[str, Any] = {} if split is None else {name: getattr(split, name) for name in Start.model_fields}
    return (Start(**fields) if fields else None), pattern
