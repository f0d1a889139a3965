"""Writes what the documents say about options, fields and files out of the code: ``<!-- generated: NAME -->`` blocks.

python docs/generate.py            write them anew
python docs/generate.py --check    exit with 1 if one is stale

plan             the plan's classes as tables, and its JSON schema
passes           every installed pass of ours in a row
options PASS     the options of a pass
recipe, gate     the keys of a recipe and of its gate
thresholds [PART]   those of gate.yaml, or of one of its parts
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from blocks import documents, main
from pydantic import BaseModel

from sparsec.compiler.recipe import Gate, Recipe
from sparsec.compiler.registry import known_passes
from sparsec.compiler.thresholds import GoldenBounds, QualityBounds, SpeedBounds, Thresholds
from sparsec.passes.base import in_words
from sparsec.plan import Coarse, Dsa, Hisa, LayerPlan, Misa, ModelShape, PassRecord, Plan, Routing, Selector, Window

THRESHOLDS: dict[str, type[BaseModel]] = {
    "": Thresholds,
    "golden": GoldenBounds,
    "quality": QualityBounds,
    "speed": SpeedBounds,
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def render(name: str) -> str:
    """One block's content.

    Raises:
        ValueError: no such block.
    """
    what, _, which = name.partition(" ")
    if what == "plan":
        return plan_text()
    if what == "passes":
        return passes_table()
    if what == "options":
        return fields_table(known_passes()[which])
    if what in ("recipe", "gate"):
        kind: type[BaseModel] = Recipe if what == "recipe" else Gate
        return fields_table(kind)
    if what == "thresholds":
        return fields_table(THRESHOLDS[which])
    raise ValueError(f"there is no generated block {name!r}: see docs/generate.py")


def plan_text() -> str:
    """A table a class, outermost first, and the JSON schema."""
    parts = []
    for kind in (Plan, ModelShape, Window, Selector, Coarse, Dsa, Hisa, Misa, LayerPlan, Routing, PassRecord):
        parts += [f"### {kind.__name__}", _first_line(kind), fields_table(kind)]
    schema = json.dumps(_untitled(Plan.model_json_schema()), indent=2, ensure_ascii=False)
    parts.append(f"### As a JSON schema\n\n```json\n{schema}\n```")
    return "\n\n".join(parts)


def passes_table() -> str:
    """Our own passes; another package's may be installed here, and are not this repository's to describe."""
    rows = [
        [
            f"[`{name}`](passes/{name}.md)",
            kind.tier,
            kind.summary,
            kind.source,
            _names(kind.after),
            _names(in_words(kind.needs)),
            _names(kind.gives),
        ]
        for name, kind in known_passes().items()
        if kind.__module__.startswith("sparsec.")
    ]
    return markdown(["pass", "tier", "what it does", "paper", "after", "needs", "gives"], rows)


def fields_table(kind: type[BaseModel]) -> str:
    """Name, type, default and meaning of every field."""
    schema = kind.model_json_schema()
    required = schema.get("required", [])
    rows = [
        [
            f"`{name}`",
            type_words(spec),
            "required" if name in required else f"`{json.dumps(default_of(kind, name))}`",
            spec.get("description", ""),
        ]
        for name, spec in schema["properties"].items()
    ]
    return markdown(["field", "type", "default", "meaning"], rows)


def default_of(kind: type[BaseModel], name: str) -> Any:
    """A field's default as JSON data."""
    default = kind.model_fields[name].get_default(call_default_factory=True)
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default


def type_words(spec: dict[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "$ref" in spec:
        return str(spec["$ref"]).rpartition("/")[2]
    if "anyOf" in spec:
        return " or ".join(type_words(each) for each in spec["anyOf"])
    if "const" in spec or "enum" in spec:
        values = spec.get("enum", [spec.get("const")])
        return ", ".join(f"`{json.dumps(value)}`" for value in values)
    if spec.get("type") == "array":
        return f"list of ({type_words(spec['items'])})"
    bounds = [f"{sign} {spec[bound]}" for bound, sign in BOUNDS.items() if bound in spec]
    return " ".join([str(spec.get("type", "any")), ", ".join(bounds)]).strip()


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _untitled(schema: Any) -> Any:
    """Without pydantic's titles, which repeat the keys."""
    if isinstance(schema, dict):
        return {key: _untitled(value) for key, value in schema.items() if key != "title"}
    return [_untitled(each) for each in schema] if isinstance(schema, list) else schema


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "–"


def _first_line(kind: type[BaseModel]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].replace(":meth:", "")


if __name__ == "__main__":
    sys.exit(main("Write the generated blocks of the documents.", "generated", render, documents()))
