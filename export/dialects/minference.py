"""MInference's patterns: a list, a layer an entry, ``{"head": [pattern, a, b, score]}``. For prompts only.

``stream_llm`` heads see sinks (a) and a window (b); others choose within the whole context and are retrieval heads to
us. A plan is not written so: sizes of vertical lines and slashes are nothing that a plan knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.errors import ArtifactError
from sparsec.export.dialects.foreign import Foreign
from sparsec.plan import ModelShape

LOCAL = "stream_llm"
KINDS = (LOCAL, "vertical_and_slash", "block_sparse", "flex_vertical_and_slash")


def recognise(files: Mapping[str, Any]) -> bool:
    """A file of that form."""
    return _data(files) is not None


def decode(files: Mapping[str, Any], shape: ModelShape | None = None) -> Foreign:
    """What it says.

    Raises:
        ArtifactError: heads are left out.
    """
    layers = _data(files) or []
    heads, sizes = [], set()
    for number, layer in enumerate(layers):
        if sorted(layer, key=_place) != [str(i) for i in range(len(layer))]:
            raise ArtifactError(f"layer {number} of the patterns leaves out heads: these files are damaged")
        row = [layer[str(i)] for i in range(len(layer))]
        heads.append(tuple(int(kind[0] != LOCAL) for kind in row))
        sizes |= {(kind[1], kind[2]) for kind in row if kind[0] == LOCAL and _sane(kind)}
    one = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    kinds = [kind[0] for layer in layers for kind in layer.values()]
    said = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)
    return Foreign("minference", f"patterns for prompts: {said}", heads=tuple(heads), sinks=one[0], window=one[1])


def _data(files: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    for data in files.values():
        if isinstance(data, list) and data and all(isinstance(layer, dict) and layer for layer in data):
            entries = [kind for layer in data for kind in layer.values()]
            if all(isinstance(kind, list) and kind and kind[0] in KINDS for kind in entries):
                return data
    return None


def _place(key: str) -> int:
    return int(key) if key.isdecimal() else -1


def _sane(kind: list[Any]) -> bool:
    return len(kind) > 2 and all(type(n) is int and 0 <= n < 2**31 for n in kind[1:3])
