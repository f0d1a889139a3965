"""Paths of a call in Triton's kernels: the router, the lists, forecasts and scattering; big products stay cuBLAS's.

A prompt's forecasts need no number on the host, so they are launched before the host waits for one: the device works
meanwhile. A few tokens (decode) mostly agree: there the host asks first, and launches what is needed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsec.plugins.kernels import decide as routers
from sparsec.plugins.kernels import forecast as forecasts
from sparsec.plugins.kernels.picked import Listed
from sparsec.plugins.kernels.support import launching_on
from sparsec.plugins.routed_paths import Paths

if TYPE_CHECKING:
    from sparsec.plugins.routing import UnitRuntime


class ListedPaths(Paths):
    """Of one call and one unit. x: [batch, rows, width], what the unit reads."""

    def __init__(self, rt: UnitRuntime, x: Tensor) -> None:
        self.forecaster, self.tokens = rt.forecaster, x.shape[0] * x.shape[1]
        self.place = launching_on(x)
        flat, step = x.flatten(0, 1), rt.step
        run = torch.empty(self.tokens, dtype=torch.uint8, device=x.device)
        self.listed, self.off = torch.empty(2, self.tokens, dtype=torch.long, device=x.device)
        self.before = torch.empty(self.tokens + 1, dtype=torch.int32, device=x.device)
        self.padded = step is not None and step.real is not None
        keep, real = (_flags(flags, x) for flags in ((step.keep, step.real) if step is not None else (None, None)))
        with self.place:
            routers.decide(flat, rt.router.stacked(), rt.threshold, keep, real, run, self.listed, self.off, self.before)
            self.run = run.view(torch.bool).view(x.shape[:2])
            self.asked = _Asked(self.before[-1:])
            self.made = self._forecast(flat) if self.tokens > forecasts.FEW else None
        self.known = self.made is None
        if step is not None and step.observe_paths is not None:
            step.observe_paths(rt.layer, rt.unit, self.run)

    @cached_property
    def count(self) -> int:
        """How many tokens run: the first to ask waits."""
        return self.asked.answer()

    @cached_property
    def on(self) -> Tensor:
        """As :attr:`Paths.on`."""
        return self.listed[: self.count]

    def forecast(self, flat: Tensor) -> Tensor:
        """As :meth:`Paths.forecast`."""
        if self.made is not None:
            return self.made
        with self.place:
            return self._forecast(flat)

    def _forecast(self, flat: Tensor) -> Tensor:
        if self.forecaster is None:
            return torch.zeros_like(flat)
        out = torch.empty_like(flat)
        down, up, silu = self.forecaster.down, self.forecaster.up, self.forecaster.activation == "silu"
        forecasts.forecast(flat, down.cast(flat), up.cast(flat), silu, self.off, self.before[-1:], out)
        return out

    def put(self, out: Tensor, found: Tensor) -> Tensor:
        """As :meth:`Paths.put`."""
        with self.place:
            forecasts.scatter(found, self.on, out)
        return out

    def pick(self, q: Tensor, numbers: Callable[[], Tensor]) -> tuple[Any, Tensor, Tensor | slice]:
        """As :meth:`Paths.pick`; the queries stay as they are, [1, heads, count, head_dim]."""
        batch, new = self.run.shape
        listed = Listed(self.on, self.before, batch, new, self.padded)
        return listed, q.transpose(0, 1)[None], slice(None)


class _Asked:
    """A number on its way to the host. value: int32 [1]."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.there: Any = None
        if value.is_cuda:
            self.value = torch.empty(1, dtype=torch.int32, pin_memory=True).copy_(value, non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record()

    def answer(self) -> int:
        """The number: waits for what was launched before it was asked for, and for nothing behind."""
        if self.there is not None:
            self.there.synchronize()
        return int(self.value)


def _flags(flags: Tensor | None, x: Tensor) -> Tensor | None:
    """bool [batch, rows] as uint8 [tokens]."""
    return None if flags is None else flags.to(x.device).flatten().view(torch.uint8)
