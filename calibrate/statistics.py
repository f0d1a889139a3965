"""Paired bootstrap: how sure a difference between two systems is, when both answered the same prompts.

Prompts differ far more than systems do, so intervals come from resampling prompts (or windows of text) with both
systems' results together (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13: percentile intervals).
They say what other prompts of this kind would give, not what other trainings would. Where two systems agree on every
prompt the interval has no width, however few there were: with n prompts alike, up to 3 / n of all may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure, and between which bounds it is for 95 % of the resamples."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Zero, no difference, is outside."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Paired:
    """Results of two systems on the same items, item by item: both [n]."""

    system: Sequence[float]
    against: Sequence[float]


def difference(groups: Sequence[Paired], *, seed: int) -> Interval:
    """Mean of ``system`` minus mean of ``against``; of several groups (tasks) the mean of theirs, weighed alike.

    Raises:
        ValueError: a group is empty, or its two systems have different counts.
    """
    return _bootstrap(groups, lambda system, against: system - against, seed)


def recovery(groups: Sequence[Paired], *, seed: int) -> Interval | None:
    """The share of ``against``'s score that ``system`` reaches: the ratio of their means. None where that is over zero.

    Resamples in which ``against`` has nothing are left out.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = _bootstrap(groups, lambda system, against: system / against, seed)
    return found if np.isfinite(found.value) else None


def change(system: Sequence[float], against: Sequence[float], weights: Sequence[float], *, seed: int) -> Interval:
    """Relative change of a weighted mean: sum(weights * system) / sum(weights * against) - 1, over resampled items.

    For bits per byte of windows, weighted by their bytes.
    """
    w = np.asarray(weights, dtype=np.float64)
    pair = Paired(w * np.asarray(system), w * np.asarray(against))
    return _bootstrap([pair], lambda system, against: system / against - 1, seed)


def _bootstrap(groups: Sequence[Paired], statistic: Callable[[Array, Array], Array], seed: int) -> Interval:
    """The statistic of the groups' mean means, and its percentiles where the items of each group are drawn anew."""
    rng = np.random.default_rng(seed)
    drawn, plain = [], []
    for group in groups:
        both = np.stack([np.asarray(group.system, np.float64), np.asarray(group.against, np.float64)])
        if both.ndim != 2 or both.shape[1] == 0:
            raise ValueError("a bootstrap needs one item or more")
        picks = rng.integers(both.shape[1], size=(RESAMPLES, both.shape[1]))
        drawn.append(both[:, picks].mean(-1))
        plain.append(both.mean(-1, keepdims=True))
    if not groups:
        raise ValueError("a bootstrap needs one group or more")
    system, against = np.mean(drawn, axis=0)
    values = statistic(system, against)
    values = values[np.isfinite(values)]
    [value] = statistic(*np.mean(plain, axis=0))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail]) if len(values) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))
