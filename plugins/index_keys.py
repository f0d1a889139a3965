"""Index keys as a cache holds them: in its own dtype, or in fp8 with one scale a token and head.

fp8 is e4m3, four significant bits, and the scale a power of two, stored as its biased exponent in one byte: rank + 1
bytes a token and head. A floating-point number loses nothing by such a scale, and a scale of its own makes a token's
key independent of all others: how a prompt is cut into calls changes nothing, and storing one more token reads nothing.
The largest of a key's numbers comes to lie in [128, 256), below e4m3's 448, so nothing is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsec.plan import Selector

BIAS = 127  # of the stored exponent, float32's own
LIFT = 7  # the largest number lies in [2^7, 2^8)


@dataclass(frozen=True)
class Index:
    """What a layer's retrieval heads choose by: all tokens so far, the call's own included."""

    keys: Tensor  # [batch, heads, tokens, ...], of :func:`stored`
    means: Tensor | None = None  # [batch, heads, blocks, rank], of a coarse level

    def read(self, tokens: int) -> Tensor:
        """The keys of the first tokens, float32 [batch, heads, tokens, rank]."""
        return loaded(self.keys[:, :, :tokens])


def stored(keys: Tensor, dtype: torch.dtype, selector: Selector) -> Tensor:
    """What the cache holds.

    Args:
        keys: float32 [..., rank], Wk k.
        dtype: the cache's.

    Returns:
        [..., rank] in ``dtype``; with ``index_dtype: fp8`` uint8 [..., rank + 1], e4m3 numbers and the exponent.
    """
    if selector.index_dtype == "model":
        return keys.to(dtype)
    keys = keys.float()
    largest = keys.abs().amax(-1, keepdim=True)
    exponent = ((largest.view(torch.int32) >> 23) - LIFT).clamp_min(1)
    inverse = ((2 * BIAS - exponent) << 23).view(torch.float32)
    numbers = (keys * inverse).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat((numbers, exponent.to(torch.uint8)), -1)


def loaded(index: Tensor) -> Tensor:
    """The keys that :func:`stored` gave, float32 [..., rank]."""
    if index.dtype != torch.uint8:
        return index.float()
    scale = (index[..., -1:].int() << 23).view(torch.float32)
    return index[..., :-1].view(torch.float8_e4m3fn).float() * scale


def index_bytes(selector: Selector, tokens: float, itemsize: int) -> float:
    """Bytes of a head's keys in the cache, with the means of blocks; ``itemsize``: of a number in the cache's dtype."""
    keys = _key_bytes(selector, tokens, itemsize)
    return keys + (_mean_bytes(selector, tokens, itemsize) if selector.coarse is not None else 0)


def index_read(selector: Selector, tokens: float, itemsize: int) -> float:
    """Bytes of them that a decode step reads in a context of so many tokens: forced blocks and ties not counted."""
    coarse = selector.coarse
    if coarse is None or tokens <= coarse.min_context:
        return _key_bytes(selector, tokens, itemsize)
    return _mean_bytes(selector, tokens, itemsize) + _key_bytes(selector, tokens / coarse.one_in, itemsize)


def _key_bytes(selector: Selector, tokens: float, itemsize: int) -> float:
    return tokens * (selector.rank + 1 if selector.index_dtype == "fp8" else selector.rank * itemsize)


def _mean_bytes(selector: Selector, tokens: float, itemsize: int) -> float:
    return tokens // selector.block * selector.rank * itemsize
