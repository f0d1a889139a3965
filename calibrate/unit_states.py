"""What units read and give: the post-norm state of every token, and the unit's output, under the plan so far.

Taken at the modules' own doors, so no family needs a branch. Sinks, special tokens and padding are left out: nothing of
theirs is ever forecast, and what the first token holds (massive activations) would rule every fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.unit_flops import Key
from sparsec.events import Listener, tracked
from sparsec.plugins.families import unit_modules

Seen = Callable[[Key, Tensor, Tensor], Tensor | None]


@contextmanager
def watching(model: Any, units: Sequence[Key], see: Seen) -> Iterator[None]:
    """Inside the block ``see`` gets (unit, input, output), [batch, rows, width] each; its answer is the output."""
    hooks = []

    def hook_of(key: Key) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            first = output[0] if isinstance(output, tuple) else output
            other = see(key, x, first)
            if other is None:
                return output
            return (other, *output[1:]) if isinstance(output, tuple) else other

        return hook

    for layer, unit in units:
        module = unit_modules(model, unit)[layer]
        hooks.append(module.register_forward_hook(hook_of((layer, unit)), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def routable(ids: Tensor, sinks: int, special: Sequence[int]) -> Tensor:
    """bool [batch, length]: tokens that a router may send away."""
    free = torch.arange(ids.shape[1], device=ids.device) >= sinks
    return free & ~torch.isin(ids, torch.tensor(list(special), dtype=ids.dtype, device=ids.device))


@dataclass
class Moments:
    """Sums over tokens of (x, 1)(x, 1)' and (x, 1)y', float64 on the CPU: all that a ridge regression needs."""

    xx: Tensor  # [width + 1, width + 1]
    xy: Tensor  # [width + 1, width]
    yy: float = 0.0

    @classmethod
    def none(cls, width: int) -> Moments:
        """Of no tokens."""
        return cls(
            torch.zeros(width + 1, width + 1, dtype=torch.float64), torch.zeros(width + 1, width, dtype=torch.float64)
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """x, y: [tokens, width]."""
        wide = torch.cat((x.float(), x.new_ones(len(x), 1).float()), 1)
        self.xx += (wide.T @ wide).double().cpu()
        self.xy += (wide.T @ y.float()).double().cpu()
        self.yy += float(y.float().square().sum())


@dataclass
class States:
    """Of every unit: moments over all tokens, and some tokens themselves."""

    moments: dict[Key, Moments]
    x: dict[Key, Tensor]  # bfloat16 [samples, width]
    y: dict[Key, Tensor]
    tokens: int


@torch.no_grad()
def unit_states(
    model: Any,
    windows: Tensor,
    units: Sequence[Key],
    *,
    sinks: int,
    special: Sequence[int],
    samples: int,
    moments: bool = True,
    listen: Listener,
    stage: str,
) -> States:
    """One forward over [count, length] windows under whatever plan is installed.

    samples: tokens kept a unit, the same ones for all, evenly spread over the windows.
    """
    width = int(model.config.get_text_config().hidden_size)
    found = States({key: Moments.none(width) for key in units} if moments else {}, {}, {}, 0)
    kept: dict[Key, tuple[list[Tensor], list[Tensor]]] = {key: ([], []) for key in units}
    share = -(-samples // len(windows))
    for window in tracked(windows, stage, listen, len(windows)):
        ids = window[None].to(model.device)
        free = routable(ids, sinks, special)[0].nonzero()[:, 0]
        some = free[torch.linspace(0, len(free) - 1, min(share, len(free))).round().long()]

        def see(key: Key, x: Tensor, y: Tensor, free: Tensor = free, some: Tensor = some) -> None:
            if moments:
                found.moments[key].add(x[0, free], y[0, free])
            kept[key][0].append(_small(x[0, some]))
            kept[key][1].append(_small(y[0, some]))

        with watching(model, units, see):
            model.get_decoder()(input_ids=ids, use_cache=False)
        found.tokens += len(free)
    for key, (xs, ys) in kept.items():
        found.x[key], found.y[key] = torch.cat(xs), torch.cat(ys)
    return found


def _small(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).cpu()
