"""What golden prompts give now against what they gave: by layer, by head, by row, with a tolerance for rounding."""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from sparsec.compiler.thresholds import GoldenBounds
from sparsec.errors import ArtifactError

LARGEST = 1 << 28  # bytes of an array


@dataclass(frozen=True)
class Difference:
    """One figure: what was found, what is allowed, and whether that is kept."""

    name: str
    good: bool
    said: str
    value: float


def differences(golden: Mapping[str, Any], now: Mapping[str, Any], bounds: GoldenBounds) -> list[Difference]:
    """Every comparison of two records of the same prompts.

    Args:
        golden: as recorded.
        now: :func:`sparsec.compiler.golden.again`.

    Raises:
        ArtifactError: golden.json is damaged.
    """
    try:
        exact = golden["dtype"] == now["dtype"] == "float32"
        pairs = list(zip(golden["prompts"], now["prompts"], strict=True))
        return [
            _layers(golden["layers"], now["layers"]),
            _outputs(pairs, bounds.outputs_for(exact)),
            _chosen(pairs, bounds.overlap_for(exact)),
            top(pairs, bounds.logits_for(exact)),
            greedy(pairs, bounds.greedy),
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, binascii.Error, zlib.error) as error:
        raise _damaged(error) from None


def top(pairs: list[tuple[Any, Any]], allowed: float, name: str = "next tokens") -> Difference:
    """Logits of the tokens that are the most likely ones in both records, against those of the best of them."""
    worst, disagree, rows = 0.0, 0, 0
    for before, after in pairs:
        for ids, logits, other, values in zip(
            *(each["top"][key] for each in (before, after) for key in ("ids", "logits")), strict=True
        ):
            found = dict(zip(other, values, strict=True))
            rows += 1
            # The gap tells two tokens that are as likely as each other from a change.
            if ids[0] != other[0] and logits[0] - logits[1] > 2 * allowed:
                disagree += 1
            shared = [(value, found[i]) for i, value in zip(ids, logits, strict=True) if i in found]
            worst = max([worst, *(abs(a - b) for a, b in shared)]) if shared else math.inf
    good = worst <= allowed and not disagree
    said = f"logits of the most likely tokens differ by up to {worst:.2g} ({allowed:g} is allowed)"
    if disagree:
        said += f", another token is first in {disagree} of {rows} rows"
    return Difference(name, good, said, worst)


def written(golden: Mapping[str, Any], now: list[Any], dtype: str, bounds: GoldenBounds) -> list[Difference]:
    """What an engine beside the reference gives for the same prompts: next tokens and greedy tokens.

    Args:
        golden: as recorded.
        now: ``top`` and ``greedy`` of each prompt.
        dtype: that the engine ran in.

    Raises:
        ArtifactError: golden.json is damaged.
    """
    try:
        pairs = list(zip(golden["prompts"], now, strict=True))
        allowed = bounds.logits_for(golden["dtype"] == dtype == "float32")
        return [top(pairs, allowed), greedy(pairs, bounds.greedy)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(error) from None


def _damaged(error: Exception) -> ArtifactError:
    said = " ".join(str(error).split())[:120]
    return ArtifactError(f"golden.json is damaged ({said}): copy or compile the artifact again")


def _layers(before: list[str], after: list[str]) -> Difference:
    other = [(i, a, b) for i, (a, b) in enumerate(zip_longest(before, after)) if a != b]
    if not other:
        return Difference("plan", True, f"{len(after)} layers run what they ran", 0)
    layer, was, runs = other[0]
    said = f"{len(other)} of {len(after)} layers run something else; layer {layer} had {was}, now {runs}"
    return Difference("plan", False, said, len(other))


def _outputs(pairs: list[tuple[Any, Any]], allowed: float) -> Difference:
    """Relative distance of each head's output, the median over rows: one row on the edge of a choice is no change."""
    parts = []
    for before, after in pairs:
        old, new = (unpacked(each["outputs"], "<f4").astype("f8") for each in (before, after))
        if old.shape != new.shape:
            raise ValueError("outputs of another shape")
        parts.append(np.linalg.norm(new - old, axis=-1) / (np.linalg.norm(old, axis=-1) + 1e-12))
    apart = np.median(np.concatenate(parts), axis=0)  # [layers, heads]
    wrong, worst = np.argwhere(~(apart <= allowed)), float(apart.max())
    said = f"each head's output is within {worst:.2g} of what it was ({allowed:g} is allowed)"
    if len(wrong):
        layer, head = wrong[0]
        said = (
            f"{len(wrong)} of {apart.size} heads put out something else, layer {layer} head {head} is the first "
            f"({apart[layer, head]:.2g} away, {allowed:g} is allowed)"
        )
    return Difference("outputs of heads", not len(wrong), said, worst)


def _chosen(pairs: list[tuple[Any, Any]], allowed: float) -> Difference:
    """Intersection over union of the kept keys, by layer; the least one counts."""
    found: dict[str, list[float]] = {}
    for before, after in pairs:
        if before["chosen"].keys() != after["chosen"].keys():
            lost = sorted(before["chosen"].keys() ^ after["chosen"].keys(), key=int)
            return Difference("chosen keys", False, f"layers {', '.join(lost)} chose then or choose now, not both", 0.0)
        for layer, kept in before["chosen"].items():
            found.setdefault(layer, []).append(_overlap(kept, after["chosen"][layer]))
    if not found:
        return Difference("chosen keys", True, "no layer chooses keys", 1.0)
    by_layer = {layer: min(each) for layer, each in found.items()}
    low = [layer for layer, share in by_layer.items() if not share >= allowed]
    least = min(by_layer.values())
    said = f"{len(by_layer)} layers choose the keys they chose: {least:.1%} or more ({allowed:.0%} is the least)"
    if low:
        said = f"layer {low[0]} is the first of {len(low)} that choose other keys: {by_layer[low[0]]:.1%} are the same"
    return Difference("chosen keys", not low, said, least)


def _overlap(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    old, new = (np.unpackbits(unpacked(each, "u1"), axis=-1) for each in (before, after))
    if old.shape != new.shape:
        return 0.0
    both, either = (old & new).sum(), (old | new).sum()
    return float(both / either) if either else 1.0


def greedy(pairs: list[tuple[Any, Any]], allowed: float) -> Difference:
    """Share of the greedy tokens that are the same; behind one that differs the others may."""
    equal = [a == b for before, after in pairs for a, b in zip(before["greedy"], after["greedy"], strict=True)]
    share = sum(equal) / len(equal)
    said = f"{sum(equal)} of {len(equal)} greedy tokens are the same ({allowed:.0%} is the least)"
    return Difference("greedy tokens", share >= allowed, said, share)


def unpacked(array: Mapping[str, Any], dtype: str) -> np.ndarray[Any, Any]:
    """What :func:`sparsec.compiler.golden.packed` wrote. No longer than its shape says: little can unpack to much.

    Raises:
        ValueError: it is damaged.
    """
    size = math.prod(array["shape"]) * np.dtype(dtype).itemsize
    if not 0 <= size <= LARGEST:
        raise ValueError("an array is too long")
    unpack = zlib.decompressobj()
    data = unpack.decompress(base64.b64decode(array["data"], validate=True), size + 1)
    return np.frombuffer(data, dtype).reshape(array["shape"])
