"""Other engines' ways to write what a plan says: pure pairs of ``encode`` and ``decode``, one file each.

``files`` are contents by name: JSON data of ``.json`` files, text of others. What a format cannot say is an error of
``encode``, never left out silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sparsec.export.dialects import duo, headwise, indexcache, minference, modelopt
from sparsec.export.dialects.foreign import Foreign
from sparsec.plan import ModelShape, Plan

Files = Mapping[str, Any]


class Dialect(NamedTuple):
    """A format: who reads it, whether files are of it, and the pair."""

    engine: str
    recognise: Callable[[Files], bool]
    decode: Callable[[Files, ModelShape | None], Foreign]
    encode: Callable[[Plan], dict[str, Any]] | None  # None: a plan cannot be said in it


DIALECTS = {
    "headwise": Dialect("RTP-LLM", headwise.recognise, headwise.decode, headwise.encode),
    "duo": Dialect("DuoAttention, LServe", duo.recognise, duo.decode, duo.encode),
    "indexcache": Dialect("vLLM, SGLang, Transformers", indexcache.recognise, indexcache.decode, indexcache.encode),
    "minference": Dialect("MInference", minference.recognise, minference.decode, None),
    "modelopt": Dialect("Model Optimizer, vLLM, TensorRT-LLM", modelopt.recognise, modelopt.decode, None),
}
