"""Index keys in fewer bits: mass found and tokens kept by the same indexers, by context.

    sparsec compile demo --passes rtpurbo --set rtpurbo.select=block -o out/blocks
    python benchmarks/index_keys.py out/blocks

Writes benchmarks/results/index-keys-demo.json. Prompts are read once, in float32; then the same decode rows choose with
the index keys of prompt and rows rounded in each way. ``fp8, a power of two a token`` is ``index_dtype: fp8``, the
other scales are what it might have been. Text of the split that selectors are measured on, seen by no fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from decode_rows import parser, run, shown
from torch import Tensor

from sparsec.calibrate.selector_stats import SelectorStats
from sparsec.plan import Plan
from sparsec.plugins.index_keys import loaded, stored
from sparsec.plugins.runtime import new_cache, rows_as, stepping
from sparsec.plugins.selector import Indexer
from sparsec.plugins.step import Step

Way = Callable[[Tensor], Tensor]  # [batch, heads, tokens, rank] -> what is read of it


def fp8(x: Tensor, scale: Tensor | float) -> Tensor:
    """Through e4m3 under a scale."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def by_64(x: Tensor) -> Tensor:
    """fp8 with a scale for 64 tokens of a head together; tokens begin at a multiple of 64."""
    pad = -x.shape[2] % 64
    wide = torch.nn.functional.pad(x, (0, 0, 0, pad)).reshape(*x.shape[:2], -1, 64, x.shape[3])
    scale = wide.abs().amax((3, 4), keepdim=True).clamp_min(1e-30) / 448
    return fp8(wide, scale).flatten(2, 3)[:, :, : x.shape[2]]


def int8(x: Tensor) -> Tensor:
    """Eight bits evenly spaced, a float32 scale a token."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / scale).round() * scale


def ways(plan: Plan) -> dict[str, tuple[float, Way]]:
    """Bytes a token and head at this rank, and the rounding."""
    assert plan.selector is not None
    eight, rank = plan.selector.model_copy(update={"index_dtype": "fp8"}), plan.selector.rank
    return {
        "float32": (4 * rank, lambda x: x),
        "bfloat16": (2 * rank, lambda x: x.bfloat16().float()),
        "fp8, a power of two a token": (rank + 1, lambda x: loaded(stored(x, x.dtype, eight))),
        "fp8, a float32 scale a token": (rank + 4, lambda x: fp8(x, x.abs().amax(-1, keepdim=True) / 448)),
        "fp8, a float32 scale for 64 tokens": (rank + 4 / 64, by_64),
        "fp8, no scale": (rank, lambda x: fp8(x, 1.0)),
        "int8, a float32 scale a token": (rank + 4, int8),
    }


@contextmanager
def rounding(model: Any, cache: Any, exact: list[Tensor | None], way: Way) -> Iterator[None]:
    """All index keys are read as ``way`` leaves them."""
    indexers = [module for module in model.modules() if isinstance(module, Indexer)]
    for indexer in indexers:

        def keys(k: Tensor, own: Indexer = indexer) -> Tensor:
            return way(Indexer.keys(own, k))

        indexer.keys = keys  # type: ignore[method-assign]
    for layer, kept in zip(cache.layers, exact, strict=True):
        layer.index_keys = way(kept) if kept is not None else None
    try:
        yield
    finally:
        for indexer in indexers:
            del indexer.keys


@torch.no_grad()
def measure(model: Any, tokens: Tensor, rows: int) -> list[dict[str, Any]]:
    """A row a way, of one window's last decode rows. tokens: [1, length]."""
    ids, length = tokens.to(model.device), tokens.shape[1]
    cache = new_cache(model, "reference")
    prompt = (length - rows) // 64 * 64
    with rows_as("prefill"):
        model.get_decoder()(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    exact = [getattr(layer, "index_keys", None) for layer in cache.layers]
    found = []
    for name, (size, way) in ways(model.sparsec_plan).items():
        stats = SelectorStats()
        with rounding(model, cache, exact, way), stepping(Step(decode=True, commit=False, observe=stats)):
            model.get_decoder()(input_ids=ids[:, prompt:], past_key_values=cache, use_cache=True)
        found.append(shown(stats, context=length, way=name, bytes=size))
    return found


def main() -> None:
    """Measure each way, write what was found."""
    about = "Index keys in fewer bits: mass found and tokens kept."
    run(parser(about, "index-keys-demo.json", contexts="2048,4096,8192", rows=256).parse_args(), measure)


if __name__ == "__main__":
    main()
