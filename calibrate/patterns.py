"""Sharing patterns as plans: one flipped, one written by hand, what people do without a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from sparsec.errors import PlanError
from sparsec.plan import Plan


def share(plan: Plan, layer: int) -> Plan:
    """The plan with ``layer`` reading the index set of the nearest full layer below."""
    return with_pattern(plan, {i: "shared" if i == layer else plan.layers[i].index for i in plan.indexed()})


def with_pattern(plan: Plan, index: dict[int, str]) -> Plan:
    """The plan with index kinds replaced by layer, and one index set a layer."""
    layers = [
        layer.model_copy(update={"index": index[i]}) if i in index else layer for i, layer in enumerate(plan.layers)
    ]
    if plan.selector is None:
        return plan.edit(layers=[layer.model_dump() for layer in layers])
    selector = plan.selector.model_copy(update={"scope": "layer"})
    return plan.edit(layers=[layer.model_dump() for layer in layers], selector=selector.model_dump())


def given_pattern(plan: Plan, pattern: str) -> Plan:
    """The plan with a pattern that was written by hand.

    Args:
        plan: one index set a layer.
        pattern: F or S for every layer with an index; or a sign for every layer of the model, - for one without.

    Raises:
        PlanError: it has another length, shares where there is nothing to share, or starts with a shared layer.
    """
    every = plan.indexed()
    letters = dict(zip(every, pattern, strict=False))
    if len(pattern) == plan.model.layers:
        letters = dict(enumerate(pattern))
        for layer, letter in letters.items():
            if (letter == "-") != (layer not in every):
                why = (
                    "has an index: give it F or S" if layer in every else "is local or sliding, without one: give it -"
                )
                raise PlanError(f"indexcache.pattern has {letter} for layer {layer}, which {why}")
    elif len(pattern) != len(every) or "-" in pattern:
        raise PlanError(
            f"indexcache.pattern has {len(pattern)} letters, the plan has {len(every)} layers with an index "
            f"({', '.join(map(str, every))}): give F or S for each of them"
        )
    if letters[every[0]] != "F":
        raise PlanError(f"indexcache.pattern shares layer {every[0]}, below which no layer has an index: begin with F")
    for layer in every:
        if letters[layer] == "F" and plan.layers[layer].index == "shared":
            raise PlanError(
                f"indexcache.pattern has F for layer {layer}, which has no indexer in the source: give it S"
            )
    return with_pattern(plan, {layer: {"F": "full", "S": "shared"}[letters[layer]] for layer in every})


def stage_starts(layers: int, stages: int) -> list[int]:
    """First layers of pipeline stages as vLLM divides them: equal parts, what is left goes to those before the last.

    Raises:
        PlanError: there are more stages than layers.
    """
    if stages > layers:
        raise PlanError(f"indexcache.stages is {stages}, the model has {layers} layers: lower it")
    sizes = [layers // stages] * stages
    for number in range(layers % stages):
        sizes[-2 - number if stages > 1 else -1] += 1
    return [sum(sizes[:number]) for number in range(stages)]


def other_patterns(
    plan: Plan, full: int, flips: Sequence[Mapping[str, Any]], overlap: Sequence[Sequence[float]]
) -> dict[str, Plan]:
    """What people do without a search, with as many indexers: to be measured beside the searched pattern.

    one-shot: the layers whose first-round loss is lowest are shared. uniform: every n-th keeps its indexer. overlap:
    again and again the layer whose set is most like that of the full layer below it.

    Args:
        plan: all indexers in place.
        full: layers that keep one.
        flips: of the search; the first has a trial of every layer that may be shared.
        overlap: :func:`set_overlap`.
    """
    every = plan.indexed()
    own = [i for i in every if plan.layers[i].index == "full"]  # a source may have shared ones already
    first = {int(layer): loss for layer, loss in flips[0]["trials"].items()}
    cheapest = sorted(first, key=lambda layer: (first[layer], layer))[: len(own) - full]
    spread = {own[number * len(own) // full] for number in range(full)}
    found = {
        "one-shot": with_pattern(plan, {i: "shared" if i in cheapest else "full" for i in own}),
        "uniform": with_pattern(plan, {i: "full" if i in spread else "shared" for i in own}),
    }
    kept = list(own)
    while len(kept) > full:
        alike = {layer: overlap[every.index(layer)][every.index(below)] for below, layer in pairwise(kept)}
        kept.remove(max(alike, key=lambda layer: (alike[layer], -layer)))
    found["overlap"] = with_pattern(plan, {i: "full" if i in kept else "shared" for i in own})
    return found
