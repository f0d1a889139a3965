"""Two artifacts side by side: what their plans run, and what their compiles measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsec.export.evaluation import NONE
from sparsec.export.words import change, count, percent, size
from sparsec.plan import Plan

Row = tuple[str, ...]  # what, in A, in B, the difference


def plan_rows(a: Plan, b: Plan) -> list[Row]:
    """Every field of the plans that differs, and every layer."""
    rows: list[Row] = []
    for name in ("model", "window", "selector", "dsa", "min_context"):
        one, other = (getattr(plan, name) for plan in (a, b))
        if one != other:
            rows += list(_fields(name, one, other))
    ran, other_ran = (", ".join(each.name for each in plan.passes) for plan in (a, b))
    if ran != other_ran:
        rows.append(("passes", ran, other_ran, ""))
    for record in a.passes:
        twin = next((each for each in b.passes if each.name == record.name), record)
        for key in sorted(record.config.keys() | twin.config.keys()):
            pair = record.config.get(key), twin.config.get(key)
            if pair[0] != pair[1]:
                rows.append((f"{record.name}.{key}", str(pair[0]), str(pair[1]), ""))
    for number in range(max(len(a.layers), len(b.layers))):
        one, other = (_layer(plan, number) for plan in (a, b))
        if one != other:
            rows.append((f"layer {number}", one, other, _moved(a, b, number)))
    return rows


def measured_rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    """The gate's figures and each pass's, of two measurements.json."""
    rows = [_bits("bits per byte, dense", a["gate"]["dense"], b["gate"]["dense"])]
    rows.append(_bits("bits per byte, artifact", a["gate"]["artifact"], b["gate"]["artifact"]))
    rows.append(("against dense", change(a["gate"]["loss"]), change(b["gate"]["loss"]), ""))
    for key, name, words in (
        ("recall_mean", "mass recall", percent),
        ("kept_mean", "tokens kept", count),
    ):
        pair = [each["gate"]["selector"].get(key) for each in (a, b)]
        if any(value is not None for value in pair):
            one, other = (words(v) if v is not None else NONE for v in pair)
            rows.append((name, one, other, _relative(*pair)))
    held = [each["gate"]["artifact"]["kv_bytes"] for each in (a, b)]
    rows.append(("KV cache", size(held[0]), size(held[1]), _relative(*held)))
    after = [{p["name"]: p["after"] for p in each["passes"] if "after" in p} for each in (a, b)]
    rows += [
        _bits(f"bits per byte after {name}", after[0][name], after[1][name]) for name in after[0] if name in after[1]
    ]
    return rows


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Both gates read the same windows of the same text."""
    return bool(
        a["calibration"]["digest"] == b["calibration"]["digest"]
        and all(a["gate"][key] == b["gate"][key] for key in ("context", "decode_rows", "windows"))
    )


def _fields(name: str, one: Any, other: Any) -> Iterator[Row]:
    a, b = ({} if v is None else v.model_dump() if hasattr(v, "model_dump") else {"": v} for v in (one, other))
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield f"{name}.{key}".rstrip("."), str(a.get(key, NONE)), str(b.get(key, NONE)), ""


def _layer(plan: Plan, number: int) -> str:
    if number >= len(plan.layers):
        return NONE
    layer = plan.layers[number]
    marks = "as the model made it" if layer.heads is None else "".join("#" if h else "." for h in layer.heads)
    index = f" shared with {plan.index_source(number)}" if layer.index == "shared" else f" {layer.index}"
    return marks + (index if layer.index != "none" else "")


def _moved(a: Plan, b: Plan, number: int) -> str:
    if number >= min(len(a.layers), len(b.layers)):
        return ""
    one, other = (set(plan.layers[number].retrieval) for plan in (a, b))
    return " ".join([*(f"+{head}" for head in sorted(other - one)), *(f"-{head}" for head in sorted(one - other))])


def _bits(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Row:
    one, other = a["bits_per_byte"], b["bits_per_byte"]
    return name, f"{one:.4f}", f"{other:.4f}", _relative(one, other)


def _relative(one: float | None, other: float | None) -> str:
    return change(other / one - 1) if one and other is not None else ""
