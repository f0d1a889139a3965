"""A model of a given shape with random weights and a plan that is made up, for timing what is too large to fetch.

Random weights attend to everything alike, so a selector's top-p keeps about that share of the blocks: ``rate`` is
stated, not measured. Which heads are retrieval heads is drawn at random with a seed, in every layer as many.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsec
from sparsec.compiler.quiet import transformers_call
from sparsec.errors import SourceError, UsageError
from sparsec.plan import Plan
from sparsec.plugins.device import check_dtype, device_map
from sparsec.plugins.families import shape_of
from sparsec.plugins.runtime import install, tensor_names

RANK, BLOCK, SINKS, RECENT = 16, 64, 4, 64  # the paper's, and the last block


def random_model(config_file: Path, *, device: str, dtype: str, seed: int = 0) -> Any:
    """The model of a config.json (or of the folder that holds one), random weights, in evaluation mode.

    Raises:
        SourceError: no readable config, or a family that is not supported.
        UsageError: an unknown device or dtype, or ``auto`` as the device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_dtype(dtype)
    device_map(device)  # refuses what is not here
    if device == "auto":
        raise UsageError(f"--device {device}: random weights are made on one device, name it")
    if not config_file.exists():
        raise SourceError(f"there is no {config_file}: name a config.json, or a folder with one")
    with transformers_call(f"transformers cannot read {config_file}", "name a config.json, or a folder with one"):
        config = AutoConfig.from_pretrained(config_file, trust_remote_code=False, local_files_only=True)
    torch.manual_seed(seed)
    wanted = (getattr(config, "dtype", None) or torch.bfloat16) if dtype == "auto" else getattr(torch, dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    return model.eval().requires_grad_(False)


def made_plan(
    model: Any,
    *,
    ratio: float,
    window: int,
    rate: float,
    prefill: str,
    granularity: str = "query_head",
    vote_every: int = 1,
    index_dtype: str = "model",
    coarse_from: int | None = None,
    seed: int = 0,
) -> Plan:
    """Retrieval heads drawn at random, blocks of 64 of which top-p keeps about ``rate``.

    Args:
        ratio: share of query heads that are retrieval heads; one a layer at least.
        window: tokens.
        prefill: ``dense``, or ``selector``: prompts choose blocks as well.
        granularity: ``query_head``, or ``kv_head``: a KV head's query heads are retrieval heads together, so that no
            other KV head keeps every token.
        vote_every: of so many prompt rows one chooses.
        index_dtype: of projected keys in the cache, ``model`` or ``fp8``.
        coarse_from: contexts longer than this score tokens in one block of four; None: never.
    """
    shape, rng = shape_of(model.config), random.Random(seed)
    size = shape.group if granularity == "kv_head" else 1
    count = max(1, round(ratio * shape.heads / size))
    layers = []
    for _ in range(shape.layers):
        chosen = set(rng.sample(range(shape.heads // size), count))
        layers.append({"heads": tuple(int(head // size in chosen) for head in range(shape.heads)), "index": "full"})
    return Plan.parse(
        {
            "producer": f"sparsec {sparsec.__version__}",
            "model": shape,
            "window": {"size": window, "sinks": SINKS},
            "selector": {
                "rank": RANK,
                "rope": "post",
                "top_p": rate,
                "granularity": "block",
                "block": BLOCK,
                "sinks": SINKS,
                "recent": RECENT,
                "scope": "head",
                "prefill": prefill,
                "vote_every": vote_every,
                "index_dtype": index_dtype,
                "coarse": {"min_context": coarse_from} if coarse_from is not None else None,
            },
            "layers": layers,
        }
    )


def installed(model: Any, plan: Plan, seed: int = 0) -> dict[str, Tensor]:
    """Run the plan with random indexers whose scores are small, that is, flat; returns them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.01 * torch.randn(size, generator=generator) for name, size in tensor_names(plan).items()}
    install(model, plan, tensors)
    return tensors
