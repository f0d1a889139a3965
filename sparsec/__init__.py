"""sparsec compiles a dense Hugging Face decoder checkpoint into a sparse, deployable one.

    import sparsec
    model, tokenizer = sparsec.load("out/demo")
    model.generate(...)                       # runs the plan

Importing sparsec is light; torch and transformers come with the first call. From then on
``AutoModelForCausalLM.from_pretrained(artifact)`` runs plans too.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sparsec.errors import (
    ArtifactError,
    CalibrationError,
    GateError,
    PlanError,
    SourceError,
    SparsecError,
    UsageError,
)
from sparsec.on_import import when_imported
from sparsec.plan import Plan

if TYPE_CHECKING:
    from sparsec.plugins.load import load
    from sparsec.plugins.runtime import applied, install, kv_bytes, new_cache, uninstall

__version__ = version("sparsec")

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "GateError",
    "Plan",
    "PlanError",
    "SourceError",
    "SparsecError",
    "UsageError",
    "__version__",
    "applied",
    "install",
    "kv_bytes",
    "load",
    "new_cache",
    "uninstall",
]

_LAZY = {
    "load": "load",
    **dict.fromkeys(("applied", "install", "kv_bytes", "new_cache", "uninstall"), "runtime"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"sparsec.plugins.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'sparsec' has no attribute {name!r}")


def _register() -> None:
    import sparsec.plugins.auto  # noqa: F401  registers as it is imported


when_imported("transformers.models.auto.modeling_auto", _register)
