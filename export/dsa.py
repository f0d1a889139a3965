"""What other engines read of a plan for a model with indexers of its own: keys of config.json, and tensors left out.

indexer_types              Transformers' glm_moe_dsa: full or shared, by layer; a shared layer has no indexer
index_topk_pattern         SGLang, vLLM (which also wants use_index_cache): F or S, by layer
index_topk_freq,           the same where it is uniform: layer i has an indexer iff
index_skip_topk_offset     max(i - offset + 1, 0) % freq == 0
use_hisa, hisa_*           SGLang's HISA branch
use_misa, misa_*           the MISA release's vLLM patch
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsec.plan import Plan

# A family whose own code builds no indexer for a shared layer; others would make up the missing tensors.
KNOWS_SHARED = ("glm_moe_dsa",)
SHARING = ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset", "use_index_cache")


def settings(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` (the content of config.json) with the plan's keys; those of another pattern go."""
    if plan.dsa is None:
        return dict(config)
    kinds = [layer.index for layer in plan.layers]
    kept = {key: value for key, value in config.items() if key not in SHARING}
    if "shared" in kinds:
        if plan.model.model_type in KNOWS_SHARED:
            kept["indexer_types"] = kinds
        kept |= {"use_index_cache": True, "index_topk_pattern": plan.pattern}
        rule = uniform(kinds)
        if rule is not None:
            kept |= {"index_topk_freq": rule[0], "index_skip_topk_offset": rule[1]}
    hisa, misa = plan.dsa.hisa, plan.dsa.misa
    if hisa is not None:
        kept |= {"use_hisa": True, "hisa_k_block_size": hisa.block, "hisa_block_topk": hisa.top_blocks}
    if misa is not None:
        # Left out, use_qnorm is true there, which ranks heads otherwise.
        kept |= {"use_misa": True, "misa_use_qnorm": False, "misa_k_block_size": misa.block}
        kept |= {"misa_topk_heads": misa.heads, "misa_decode_topk_heads": misa.heads}
        if misa.candidates is not None:
            kept["misa_stage1_topk"] = misa.candidates
    return kept


def uniform(kinds: Sequence[str]) -> tuple[int, int] | None:
    """(freq, offset) with which the uniform rule gives exactly these layers, the smallest; None where none does."""
    layers = len(kinds)
    for freq in range(2, layers + 1):
        for offset in range(1, layers + 1):
            if all((max(i - offset + 1, 0) % freq == 0) == (kind == "full") for i, kind in enumerate(kinds)):
                return freq, offset
    return None


def leaves_out(plan: Plan) -> bool:
    """The artifact lacks the indexers of shared layers: the family's own code does without them."""
    return plan.dsa is not None and plan.model.model_type in KNOWS_SHARED and "S" in plan.pattern


def left_out(plan: Plan, names: Iterable[str]) -> set[str]:
    """Tensors of ``names`` that the artifact does not have, see :func:`leaves_out`."""
    if not leaves_out(plan):
        return set()
    shared = {f"model.layers.{i}.self_attn.indexer." for i, layer in enumerate(plan.layers) if layer.index == "shared"}
    return {name for name in names if any(name.startswith(prefix) for prefix in shared)}
