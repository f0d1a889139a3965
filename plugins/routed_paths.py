"""Which tokens of a call run a routed unit, and what is done with either kind: gather, forecast, scatter.

In plain PyTorch, on any device and under autograd; :mod:`sparsec.plugins.kernels.paths` does the same in Triton. Tokens
are those of [batch, rows] as one row. The host waits for the device once, to learn how many tokens run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.plugins.masked import PICKED, Picked
from sparsec.plugins.routed_units import Forecaster


class Paths:
    """Of one call and one unit.

    Args:
        run: bool [batch, rows], which tokens run it.
        forecaster: stands in for those that do not; None: zero does.
    """

    known = True  # nothing is gained by asking how many run only when other work is under way

    def __init__(self, run: Tensor, forecaster: Forecaster | None) -> None:
        self.run, self.forecaster = run, forecaster
        self.tokens = run.numel()

    @cached_property
    def count(self) -> int:
        """How many tokens run."""
        return int(self.run.sum())

    @cached_property
    def on(self) -> Tensor:
        """int64 [count], the tokens that run, ascending."""
        return torch.nonzero_static(self.run.flatten(), size=self.count)[:, 0]

    @property
    def everyone(self) -> bool:
        """All tokens run: nothing is gathered, the unit runs as it is."""
        return self.count == self.tokens

    def forecast(self, flat: Tensor) -> Tensor:
        """[tokens, width], forecasts for the tokens that do not run; the others' rows are for :meth:`put` to write.

        flat: [tokens, width], what the unit reads.
        """
        if self.forecaster is None:
            return torch.zeros_like(flat)
        if not self.count:
            every: Tensor = self.forecaster(flat)
            return every.to(flat.dtype)
        off = torch.nonzero_static(~self.run.flatten(), size=self.tokens - self.count)[:, 0]
        return torch.empty_like(flat).index_copy_(0, off, self.forecaster(flat[off]).to(flat.dtype))

    def put(self, out: Tensor, found: Tensor) -> Tensor:
        """``out``, [tokens, width], with the rows ``found`` [count, width] of the tokens that run.

        Autocast may have run the unit in another dtype.
        """
        return out.index_copy_(0, self.on, found.to(out.dtype))

    def pick(self, q: Tensor, numbers: Callable[[], Tensor]) -> tuple[Any, Tensor, Tensor | slice]:
        """Queries as attention takes them: a padded block of rows for each sequence.

        Args:
            q: [count, heads, head_dim].
            numbers: makes the call's token numbers, [batch, rows], where they are needed.

        Returns:
            What knows the rows (:class:`~sparsec.plugins.masked.Picked`), queries [batch, heads, most, head_dim], and
            where the tokens that run are in the block as one row, [count].
        """
        batch, rows = self.run.shape
        if not self.count:
            nobody = self.run.new_empty(batch, 0, dtype=torch.long)
            return Picked(nobody, (), rows), q.view(batch, 0, *q.shape[1:]).transpose(1, 2), slice(None)
        pos, wide = numbers(), int(self.run.sum(1).max())
        order = (self.run.cumsum(1) - 1).flatten()[self.on]
        places = self.on // rows * wide + order
        picked = torch.full((batch * wide,), -1, dtype=torch.long, device=q.device)
        columns = torch.zeros_like(picked)
        picked[places] = pos.flatten()[self.on]
        columns[places] = self.on % rows + 1
        ends: Any = F.pad(columns.view(batch, wide).amax(0), (0, -wide % PICKED)).view(-1, PICKED).amax(1)
        return (
            Picked(picked.view(batch, wide), tuple(map(int, ends)), rows),
            self.block(q, places, batch, wide),
            places,
        )

    def block(self, q: Tensor, places: Tensor, batch: int, wide: int) -> Tensor:
        """[batch, heads, wide, head_dim] with the queries q, [count, heads, head_dim], at ``places``; else zero."""
        full = q.new_zeros(batch * wide, *q.shape[1:]).index_copy(0, places, q)
        return full.view(batch, wide, *full.shape[1:]).transpose(1, 2)
