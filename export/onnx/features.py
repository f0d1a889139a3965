"""What of a plan the graphs can say. Whatever the exporter does not know is refused, so that no graph means less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from sparsec.errors import PlanError
from sparsec.export.onnx.experts import ACTIVATION
from sparsec.plan import Dsa, Hisa, LayerPlan, Misa, Plan, Routing, Selector, Vocabulary, Window

# Fields that the graphs honour, or that say nothing about what runs. A new field is refused where it is set.
KNOWN: Mapping[type[BaseModel], frozenset[str]] = {
    Plan: frozenset(
        {
            "format",
            "producer",
            "model",
            "window",
            "selector",
            "min_context",
            "layers",
            "passes",
            "routing",
            "vocabulary",
            "dsa",
        }
    ),
    Window: frozenset({"size", "sinks"}),
    Selector: frozenset(
        {
            "kind",
            "rank",
            "rope",
            "top_p",
            "granularity",
            "block",
            "sinks",
            "recent",
            "min_keep",
            "scope",
            "query_block",
            "vote_every",
        }
    ),
    LayerPlan: frozenset({"heads", "index"}),
    Dsa: frozenset({"top_k", "heads", "dim", "hisa", "misa"}),
    Hisa: frozenset({"block", "top_blocks", "min_context"}),
    Misa: frozenset({"heads", "block", "candidates", "min_context"}),
    Routing: frozenset({"width", "rank", "activation", "hidden", "threshold", "sinks", "special", "attention", "mlp"}),
    Vocabulary: frozenset({"mode", "base", "merged", "rows", "width", "boundary"}),
}
WAYS = {
    "compensate": "compile with compensation=false of razor or window",
    "prefill": "compile with rtpurbo.prefill=dense",
    "coarse": "compile with rtpurbo.coarse_from=null",
    "write": "compile with dynamic-tokenization.write=base",
    "index_dtype": "compile with rtpurbo.index_dtype=model",
}
ROPES = ("default", "linear", "llama3", "yarn")  # the others choose their frequencies by length


def check_exportable(plan: Plan, config: Any = None) -> None:
    """The graphs mean all of the plan.

    Args:
        plan: what is to be exported.
        config: the model's, where it is at hand.

    Raises:
        PlanError: naming the first field that they cannot mean.
    """
    if plan.vocabulary is not None and plan.vocabulary.mode == "dynamic":
        raise PlanError(
            "a vocabulary that is merged by the batch cannot be exported: sparsec.load alone runs it; "
            "compile with dynamic-tokenization.mode=static"
        )
    for kind, known in KNOWN.items():
        own = (plan.dsa, plan.dsa.hisa, plan.dsa.misa) if plan.dsa is not None else ()
        parts = (plan, plan.window, plan.selector, plan.routing, plan.vocabulary, *own, *plan.layers)
        every = [each for each in parts if isinstance(each, kind)]
        for part, name in ((each, name) for each in every for name in type(each).model_fields):
            if name in known or getattr(part, name) == type(part).model_fields[name].get_default():
                continue
            way = WAYS.get(name, "run the artifact in PyTorch, or compile without it")
            raise PlanError(f"the plan's {name} cannot be exported yet: {way}")
    if plan.dsa is not None and config is not None and config.hidden_act != ACTIVATION:
        raise PlanError(f"experts with {config.hidden_act} for {ACTIVATION} cannot be exported: run it in PyTorch")
    kinds = _rope_types(config) if config is not None else set()
    if odd := sorted(kinds - set(ROPES)):
        raise PlanError(f"{odd[0]} rotary embeddings change with the length and cannot be exported: run it in PyTorch")


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embeddings in a model's config; some have one a kind of layer."""
    found: Any = getattr(config, "rope_parameters", None) or {}
    each = [found] if "rope_type" in found or not found else [part for part in found.values() if isinstance(part, dict)]
    return {str(part.get("rope_type", "default")) for part in each}
