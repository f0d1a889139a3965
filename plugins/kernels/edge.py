"""One program finds the edge above which enough lies, of values that it holds in registers.

Each pass puts three candidate edges into an interval, sums up what lies above each, and keeps the quarter that holds
the edge. The threads of a program meet once a pass, and a meeting costs more than what a few threads do alone: values
are K tiles of few places, tile k, place t is item k * TILE + t. Nothing is read twice.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from sparsec.plugins.kernels.support import MOST_ITEMS
from sparsec.plugins.selector import TIE

HELD, WIDEST = 40, 2048  # tiles, and places of one, at most


@triton.jit
def loaded(at, here, other, K: tl.constexpr, TILE: tl.constexpr):
    """K tiles of the ``here`` values at ``at``; ``other`` behind them."""
    t = tl.arange(0, TILE)
    tiles = ()
    for k in tl.static_range(K):
        tiles = tiles + (tl.load(at + k * TILE + t, mask=k * TILE + t < here, other=other),)  # noqa: RUF005
    return tiles


@triton.jit
def _three(a1, a2, a3, b1, b2, b3):
    return a1 + b1, a2 + b2, a3 + b3


@triton.jit
def quarter(tiles, e1, e2, e3, least, COUNT: tl.constexpr, K: tl.constexpr):
    """How many of three rising edges have ``least`` above them: of the values themselves, or COUNT of them."""
    s1 = tl.zeros_like(tiles[0])
    s2, s3 = s1, s1
    for k in tl.static_range(K):
        value = tiles[k]
        what = value
        if COUNT:
            what = tl.full(value.shape, 1.0, tl.float32)
        s1 += tl.where(value > e1, what, 0.0)
        s2 += tl.where(value > e2, what, 0.0)
        s3 += tl.where(value > e3, what, 0.0)
    s1, s2, s3 = tl.reduce((s1, s2, s3), 0, _three)
    return (s1 >= least).to(tl.float32) + (s2 >= least).to(tl.float32) + (s3 >= least).to(tl.float32)


@triton.jit
def edge_of_weight(tiles, low, high, least, PASSES: tl.constexpr, K: tl.constexpr):
    """The edge of a summed weight.

    tiles: weights, the exponentials of values; low, high: values, of which ``low`` has ``least`` or more above it.
    Returns a value, at most (high - low) / 4^PASSES below the highest with as much above it.
    """
    step = (high - low) / 4
    for _ in tl.range(0, PASSES):
        parts = quarter(
            tiles, tl.exp(low + step), tl.exp(low + 2 * step), tl.exp(low + 3 * step), least, False, K
        )  # fmt: skip
        low += parts * step
        step = step / 4
    return low


@triton.jit
def edge_of_count(tiles, low, high, least, PASSES: tl.constexpr, K: tl.constexpr):
    """The same of how many values lie above; tiles: the values themselves."""
    step = (high - low) / 4
    for _ in tl.range(0, PASSES):
        low += quarter(tiles, low + step, low + 2 * step, low + 3 * step, least, True, K) * step
        step = step / 4
    return low


@triton.jit
def _extremes(a_high, a_low, b_high, b_low):
    return tl.maximum(a_high, b_high), tl.minimum(a_low, b_low)


@triton.jit
def extremes(tiles, K: tl.constexpr):
    """The largest and the smallest value, -inf aside; where there is none, -inf and inf."""
    high = tiles[0]
    low = tl.where(high == float("-inf"), float("inf"), high)
    for k in tl.static_range(1, K):
        high = tl.maximum(high, tiles[k])
        low = tl.minimum(low, tl.where(tiles[k] == float("-inf"), float("inf"), tiles[k]))
    return tl.reduce((high, low), 0, _extremes)


@triton.jit
def _four(a1, a2, a3, a4, b1, b2, b3, b4):
    return a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def written(to, keeps, K: tl.constexpr, TILE: tl.constexpr):
    """Write the numbers of the kept items down in ascending order; returns how many they are.

    keeps: K tiles of bool, of at most 2048 places. Counts of five tiles are the digits, of twelve bits, of one word, so
    that twenty tiles are numbered in one scan.
    """
    t = tl.arange(0, TILE)
    count = 0
    for group in tl.static_range(0, K, 20):
        words = ()
        for first in tl.static_range(0, 20, 5):
            word = tl.zeros([TILE], tl.int64)
            for k in tl.static_range(5):
                if group + first + k < K:
                    word += keeps[group + first + k].to(tl.int64) << (12 * k)
            words = words + (word,)  # noqa: RUF005
        places = tl.associative_scan(words, 0, _four)
        totals = tl.reduce(words, 0, _four)
        for k in tl.static_range(20):
            if group + k < K:
                place = count + ((places[k // 5] >> (12 * (k % 5))) & 4095).to(tl.int32) - 1
                tl.store(to + place, (group + k) * TILE + t, mask=keeps[group + k])
                count += ((totals[k // 5] >> (12 * (k % 5))) & 4095).to(tl.int32)
    return count


def fits(items: int) -> bool:
    """So many items are few enough for one program."""
    return items <= MOST_ITEMS


def tiling(items: int) -> tuple[int, int, int]:
    """Tiles, places of one, and warps: the fewest, in a power of two, of which no thread holds more than it can.

    Raises:
        ValueError: a tile would have more places than are counted in twelve bits.
    """
    tile = 128
    while triton.cdiv(items, tile) > HELD:
        tile *= 2
    if tile > WIDEST:
        raise ValueError(f"one program takes up to {HELD * WIDEST} items a head, not {items}: use larger blocks")
    return triton.cdiv(items, tile), tile, min(tile, 512) // 32


def passes(width: float) -> int:
    """So many make an interval of this width finer than what counts as a tie."""
    return max(1, math.ceil(math.log(width / TIE, 4) + 1e-9))
