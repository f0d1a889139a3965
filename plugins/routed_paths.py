"""Which tokens of a call run a routed unit, and what is done with either kind: gather, forecast, scatter.

In plain PyTorch, on any device and under autograd; :mod:`sparsec.plugins.kernels.paths` does the same in Triton. Tokens
are those of [batch, rows] as one row. The host waits for the device once, to learn how many tokens run.
"""

from __future__ import annotations

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

    def __init__(self, run: Tensor, forecaster: Forecaster | None) -> None:
        self.run, self.forecaster = run, forecaster
        flat, self.tokens = run.flatten(), run.numel()
        self.count = int(flat.sum())
        self.on = torch.nonzero_static(flat, size=self.count)[:, 0]

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
            return self.forecaster(flat).to(flat.dtype)
        off = torch.nonzero_static(~self.run.flatten(), size=self.tokens - self.count)[:, 0]
        return torch.empty_like(flat).index_copy_(0, off, self.forecaster(flat[off]).to(flat.dtype))

    def put(self, out: Tensor, found: Tensor) -> Tensor:
        """``out``, [tokens, width], with the rows ``found`` [count, width] of the tokens that run.

        Autocast may have run the unit in another dtype.
        """
        return out.index_copy_(0, self.on, found.to(out.dtype))

    def pick(self, q: Tensor, pos: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Queries as attention takes them: a padded block of rows for each sequence.

        Args:
            q: [count, heads, head_dim].
            pos: [batch, rows], token numbers of the call.

        Returns:
            What knows the rows (:class:`~sparsec.plugins.masked.Picked`), queries [batch, heads, most, head_dim], and
            where the tokens that run are in the block as one row, [count].
        """
        batch, rows = self.run.shape
        counts = self.run.sum(1)
        wide = int(counts.max())
        order = (self.run.cumsum(1) - 1).flatten()[self.on]
        places = self.on // rows * wide + order
        numbers = torch.full((batch * wide,), -1, dtype=torch.long, device=q.device)
        columns = torch.zeros_like(numbers)
        numbers[places] = pos.flatten()[self.on]
        columns[places] = self.on % rows + 1
        last = columns.view(batch, wide).amax(0) if wide else columns
        ends: Any = F.pad(last, (0, -wide % PICKED)).view(-1, PICKED).amax(1)
        return (
            Picked(numbers.view(batch, wide), tuple(map(int, ends)), rows),
            self.block(q, places, batch, wide),
            places,
        )

    def block(self, q: Tensor, places: Tensor, batch: int, wide: int) -> Tensor:
        """[batch, heads, wide, head_dim] with the queries q, [count, heads, head_dim], at ``places``; else zero."""
        full = q.new_zeros(batch * wide, *q.shape[1:]).index_copy(0, places, q)
        return full.view(batch, wide, *full.shape[1:]).transpose(1, 2)
