"""Stage 1 of informed routing (arXiv 2510.13831): forecasters of units, in closed form and trained.

Closed form (ours, the training-free tier and the initialisation): ridge regression of a unit's output on the state that
it reads, reduced to rank r. With B the ridge solution and S the inputs' second moments, the best rank-r map in the
metric of the fitted values projects them on the top r eigenvectors V of B'SB: down = (BV)', up = V (reduced-rank
regression).

Trained (the paper's): down, SiLU, up by SmoothL1, the backbone frozen. SiLU(z) is z/2 + z²/4 near zero, so the closed
form with its inner values scaled down and the outer weights scaled up is where training starts; a unit that training
does not improve on tokens left out keeps what it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.calibrate.unit_flops import Key
from sparsec.calibrate.unit_states import Moments
from sparsec.plugins.routed_units import Forecaster

INNER = 0.25  # standard deviation of a scaled inner value: small enough for SiLU to be nearly linear
CHECKED = 8  # every so-manyth sample is left out of training, to see whether it helped
MINIBATCH = 512

Tensors = dict[str, Tensor]


def closed_form(moments: Moments, rank: int, ridge: float) -> Tensors:
    """A linear forecaster's tensors, float32.

    Args:
        ridge: added to the inputs' second moments, as a share of their mean diagonal.
    """
    count = moments.xx[-1, -1]
    mean_x, mean_y = moments.xx[-1, :-1] / count, moments.xy[-1] / count
    xx = moments.xx[:-1, :-1] / count - mean_x[:, None] * mean_x
    xy = moments.xy[:-1] / count - mean_x[:, None] * mean_y
    weighted = xx + torch.eye(len(xx), dtype=xx.dtype) * (ridge * xx.diagonal().mean() + 1e-12)
    solved = torch.linalg.solve(weighted, xy)  # [width, width]
    _, vectors = torch.linalg.eigh(solved.T @ xx @ solved)
    top = vectors[:, -rank:].flip(1)
    down = (solved @ top).T
    return {
        "down.weight": down.float(),
        "down.bias": torch.zeros(rank),
        "up.weight": top.float().contiguous(),
        "up.bias": (mean_y - top @ (down @ mean_x)).float(),
    }


def through_silu(linear: Mapping[str, Tensor], moments: Moments) -> Tensors:
    """Nearly the same function with SiLU inside."""
    count = moments.xx[-1, -1]
    mean_x = moments.xx[-1, :-1] / count
    xx = moments.xx[:-1, :-1] / count - mean_x[:, None] * mean_x
    down = linear["down.weight"].double()
    middle = down @ mean_x
    std = (down @ xx @ down.T).diagonal().clamp_min(1e-18).sqrt()
    scale = INNER / std
    up = linear["up.weight"].double() * (2 / scale)
    bias = linear["up.bias"].double() + linear["up.weight"].double() @ middle
    return {
        "down.weight": (down * scale[:, None]).float(),
        "down.bias": (-middle * scale).float(),
        "up.weight": up.float(),
        "up.bias": (bias - up @ torch.full_like(std, INNER**2 / 4)).float(),
    }


def train(start: Mapping[str, Tensor], x: Tensor, y: Tensor, *, epochs: int, lr: float, seed: int) -> Tensors:
    """A SiLU forecaster trained by SmoothL1 on x, y: [samples, width]; the start where training did not help."""
    check = torch.arange(len(x)) % CHECKED == 0
    device = x.device
    parts = {name: tensor.to(device).clone().requires_grad_() for name, tensor in start.items()}
    inputs, targets = x[~check].float(), y[~check].float()
    # SmoothL1's knee is at 1: outputs are brought to that scale, else it would be plain squared error everywhere.
    scale = targets.std().clamp_min(1e-9)
    optimizer = torch.optim.AdamW(parts.values(), lr=lr, weight_decay=0.01, betas=(0.9, 0.95))
    order = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(inputs) // MINIBATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for batch in torch.randperm(len(inputs), generator=order).split(MINIBATCH):  # type: ignore[no-untyped-call]
                found = forecast(parts, inputs[batch.to(device)])
                loss = F.smooth_l1_loss(found / scale, targets[batch.to(device)] / scale)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    after = {name: tensor.detach().cpu() for name, tensor in parts.items()}
    better = nmse(after, "silu", x[check], y[check]) < nmse(start, "silu", x[check], y[check])
    return after if better else dict(start)


def forecast(parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A SiLU forecaster as a function of its tensors."""
    inner = F.silu(F.linear(x, parts["down.weight"], parts["down.bias"]))
    return F.linear(inner, parts["up.weight"], parts["up.bias"])


@torch.no_grad()
def predicted(parts: Mapping[str, Tensor], activation: str, x: Tensor) -> Tensor:
    """What a forecaster says, float32; without tensors (rank 0): zero."""
    if not parts:
        return torch.zeros_like(x, dtype=torch.float32)
    found: Tensor = Forecaster(parts, activation).to(x.device)(x.float())
    return found


def nmse(parts: Mapping[str, Tensor], activation: str, x: Tensor, y: Tensor) -> float:
    """Squared error over the output's variance: 0 is exact, 1 is as good as the mean."""
    return Recoverability.of(parts, activation, x, y).nmse


@dataclass(frozen=True)
class Recoverability:
    """How well a unit's output can be forecast, on text that the fit did not see.

    Cosine flatters where outputs have a large mean (R² may be near zero beside a cosine of 0.98): judge by ``nmse``.
    """

    nmse: float
    cosine: float

    @classmethod
    def of(cls, parts: Mapping[str, Tensor], activation: str, x: Tensor, y: Tensor) -> Recoverability:
        """x, y: [tokens, width]."""
        y = y.float()
        found = predicted(parts, activation, x)
        spread = (y - y.mean(0)).square().sum().clamp_min(1e-12)
        cosine = F.cosine_similarity(found, y, dim=-1).mean() if parts else torch.zeros(())
        return cls(float((y - found).square().sum() / spread), float(cosine))


Forecasters = dict[Key, Tensors]
