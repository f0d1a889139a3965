"""RTP-LLM's ``headwise_config``: 1 = retrieval, by layer and query head; sinks, window, and up to where all is dense.

It says which heads see everything and no more: how retrieval heads choose keys is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.errors import ArtifactError
from sparsec.export.dialects.foreign import Foreign, bits, number, split_of
from sparsec.plan import ModelShape, Plan

NAME = "headwise_config.json"
KEY = "headwise_config"


def encode(plan: Plan) -> dict[str, Any]:
    """``headwise_config.json``."""
    heads = split_of(plan, "headwise")
    assert plan.window is not None
    return {
        NAME: {
            "sink_token_num": plan.window.sinks,
            "swa_token_num": plan.window.size,
            "seqlen_threshold": plan.min_context,
            **{str(layer): list(row) for layer, row in enumerate(heads)},
        }
    }


def recognise(files: Mapping[str, Any]) -> bool:
    """A file of these keys, or a config.json with ``headwise_config``."""
    return _data(files) is not None


def decode(files: Mapping[str, Any], shape: ModelShape | None = None) -> Foreign:
    """What it says.

    Raises:
        ArtifactError: it is damaged.
    """
    data = _data(files) or {}
    layers = sorted((key for key in data if key.isdecimal()), key=int)
    if [int(key) for key in layers] != list(range(len(layers))) or not layers:
        raise ArtifactError("headwise_config leaves out layers: these files are damaged")
    heads = tuple(bits(data[key], f"layer {key} of headwise_config") for key in layers)
    return Foreign(
        "headwise",
        f"{sum(map(sum, heads))} of {sum(map(len, heads))} query heads are retrieval heads",
        heads=heads,
        window=number(data, "swa_token_num", KEY, 1),
        sinks=number(data, "sink_token_num", KEY),
        min_context=number(data, "seqlen_threshold", KEY),
    )


def _data(files: Mapping[str, Any]) -> dict[str, Any] | None:
    for data in files.values():
        inner = data.get(KEY, data) if isinstance(data, dict) else None
        if isinstance(inner, dict) and "swa_token_num" in inner:
            return inner
    return None
