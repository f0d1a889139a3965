"""What another engine's files say, in our words; and the plan that says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.errors import ArtifactError
from sparsec.plan import ModelShape, Plan


@dataclass(frozen=True)
class Foreign:
    """A head split, a sharing pattern, or only words."""

    dialect: str
    says: str  # one line
    heads: tuple[tuple[int, ...], ...] | None = None  # by layer and query head, 1 = retrieval
    kv_heads: tuple[tuple[int, ...], ...] | None = None  # the same by KV head, where the model's shape is not known
    window: int | None = None  # tokens, the current one included
    sinks: int | None = None
    min_context: int | None = None
    pattern: str | None = None  # F and S, a letter a layer

    def to_json(self) -> dict[str, Any]:
        """What is there, as JSON data."""
        return {key: value for key, value in vars(self).items() if value is not None}


def starting_plan(foreign: Foreign, shape: ModelShape, producer: str) -> Plan:
    """The plan of a head split, retrieval heads dense in decode too; what the passes go on from.

    Raises:
        ArtifactError: there is no head split, or it is one of another model.
        PlanError: the plan contradicts itself.
    """
    heads = foreign.heads
    if heads is None and foreign.kv_heads is not None:
        heads = tuple(tuple(kind for kind in row for _ in range(shape.group)) for row in foreign.kv_heads)
    if heads is None:
        raise ArtifactError(f"{foreign.dialect} says nothing about heads: name files with a head split")
    if len(heads) != shape.layers or any(len(row) != shape.heads for row in heads):
        raise ArtifactError(
            f"{foreign.dialect} splits {len(heads)} layers of {len(heads[0]) if heads else 0} heads, the model has "
            f"{shape.layers} of {shape.heads}: name files of this model"
        )
    local = any(0 in row for row in heads)
    if local and (foreign.window is None or foreign.sinks is None):
        raise ArtifactError(f"{foreign.dialect} does not say how long a local head's window is: it has to")
    return Plan.dense(shape, producer).edit(
        layers=[{"heads": row} for row in heads],
        window={"size": foreign.window, "sinks": foreign.sinks} if local else None,
        min_context=foreign.min_context or 0,
    )


def split_of(plan: Plan, dialect: str) -> list[tuple[int, ...]]:
    """The plan's heads by layer, for formats that speak of all of them.

    Raises:
        ArtifactError: the plan leaves layers to the model, or has no local heads.
    """
    rows = []
    for number, layer in enumerate(plan.layers):
        if layer.heads is None:
            raise ArtifactError(f"{dialect} has no word for layer {number}, which runs as the model made it")
        rows.append(tuple(int(kind) for kind in layer.heads))
    if plan.window is None:
        raise ArtifactError(
            f"the plan has no local heads, {dialect} has nothing to say: compile with a pass that splits"
        )
    if plan.window.compensate:
        raise ArtifactError(f"{dialect} has no word for a window that compensates for what it drops")
    return rows


def bits(values: object, what: str) -> tuple[int, ...]:
    """A row of 0 and 1.

    Raises:
        ArtifactError: it is none.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(v in (0, 1) for v in values):
        raise ArtifactError(f"{what} is no list of 0 and 1: these files are damaged")
    return tuple(int(v) for v in values)


def number(data: Any, key: str, what: str, least: int = 0) -> int:
    """A count.

    Raises:
        ArtifactError: it is none.
    """
    value = data.get(key)
    if type(value) is not int or not least <= value < 2**31:
        raise ArtifactError(f"{what} has no sane {key}: these files are damaged")
    return value
