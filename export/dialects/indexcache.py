"""IndexCache's keys in config.json: which layers have an indexer. The explicit pattern wins over the frequency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.errors import ArtifactError
from sparsec.export.dialects.foreign import Foreign, number
from sparsec.export.dsa import uniform
from sparsec.plan import ModelShape, Plan

CONFIG = "config.json"
KEYS = ("index_topk_pattern", "indexer_types", "index_topk_freq")
KINDS = {"full": "F", "shared": "S"}


def encode(plan: Plan) -> dict[str, Any]:
    """Keys for config.json.

    Raises:
        ArtifactError: some layers have no index, which the keys cannot say.
    """
    kinds = [layer.index for layer in plan.layers]
    if "none" in kinds:
        raise ArtifactError(
            f"layer {kinds.index('none')} has no index, indexcache's keys are about models where all layers have one"
        )
    keys: dict[str, Any] = {"use_index_cache": True, "index_topk_pattern": plan.pattern, "indexer_types": kinds}
    rule = uniform(kinds)
    if rule is not None:
        keys |= {"index_topk_freq": rule[0], "index_skip_topk_offset": rule[1]}
    return {CONFIG: keys}


def recognise(files: Mapping[str, Any]) -> bool:
    """One of the keys is there."""
    config = files.get(CONFIG)
    return isinstance(config, dict) and any(config.get(key) is not None for key in KEYS)


def decode(files: Mapping[str, Any], shape: ModelShape | None = None) -> Foreign:
    """What it says.

    Raises:
        ArtifactError: it is damaged, or only the frequency is given and nobody says how many layers there are.
    """
    config = files[CONFIG]
    if isinstance(config.get("index_topk_pattern"), str):
        pattern = config["index_topk_pattern"]
    elif isinstance(config.get("indexer_types"), list):
        pattern = "".join(KINDS.get(str(kind), "?") for kind in config["indexer_types"])
    else:
        freq = number(config, "index_topk_freq", CONFIG, 1)
        offset = number({"index_skip_topk_offset": 2, **config}, "index_skip_topk_offset", CONFIG)
        layers = shape.layers if shape is not None else number(config, "num_hidden_layers", CONFIG, 1)
        if layers > 4096:
            raise ArtifactError(f"{CONFIG} has {layers} layers: these files are damaged")
        pattern = "".join("F" if max(i - offset + 1, 0) % freq == 0 else "S" for i in range(layers))
    if not pattern or set(pattern) - {"F", "S"} or not pattern.startswith("F"):
        raise ArtifactError(f"the pattern {pattern[:80]!r} is none of F and S that begins with F")
    said = f"{pattern.count('F')} of {len(pattern)} layers have an indexer: {pattern}"
    return Foreign("indexcache", said, pattern=pattern)
