"""Triton's kernels of routed units against PyTorch: who runs, forecasts, rows scattered, attention of picked rows.

Without a GPU they run in Triton's interpreter (conftest.py). Whole models on them: test_routing.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsec.plan import LayerPlan, ModelShape, Plan
from sparsec.plugins.routed_paths import Paths
from sparsec.plugins.routed_units import Forecaster, Router, forecaster_shapes, router_shapes

pytest.importorskip("triton")
from sparsec.plugins.kernels.decide import decide
from sparsec.plugins.kernels.forecast import forecast, scatter
from sparsec.plugins.kernels.picked import Listed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 3e-6 if DEVICE.type == "cpu" else 2e-3, torch.float16: 3e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def listed(
    x: Tensor, router: Router, threshold: float, keep: Tensor | None = None, real: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """run, on, off, before."""
    run = torch.full((len(x),), 7, dtype=torch.uint8, device=DEVICE)
    on, off = torch.full((2, len(x)), -1, device=DEVICE)
    before = torch.full((len(x) + 1,), -1, dtype=torch.int32, device=DEVICE)
    flags = (None if some is None else some.view(torch.uint8) for some in (keep, real))
    decide(x, router.stacked(), threshold, *flags, run, on, off, before)
    return run, on, off, before


def router_of(width: int, hidden: int) -> Router:
    return Router({name: draw(*shape) for name, shape in router_shapes(width, hidden).items()}).to(DEVICE)


@pytest.mark.parametrize(("tokens", "width", "hidden"), [(1, 40, 3), (16, 128, 0), (17, 200, 16), (4500, 8, 1)])
def test_the_lists_are_those_of_the_scores(tokens: int, width: int, hidden: int) -> None:
    torch.manual_seed(tokens)
    x, router = draw(tokens, width), router_of(width, hidden)
    score = router(x)
    threshold = float(score.median()) + 1e-3
    keep, real = torch.rand(2, tokens, device=DEVICE) > 0.3
    for given in ((None, None), (keep, None), (keep, real)):
        wanted = score >= threshold
        if given[0] is not None:
            wanted = wanted | given[0]
        if given[1] is not None:
            wanted = wanted & given[1]
        run, on, off, before = listed(x, router, threshold, *given)
        assert torch.equal(run, wanted.to(torch.uint8))
        count = int(before[-1])
        assert torch.equal(on[:count], wanted.nonzero()[:, 0])
        assert torch.equal(off[: tokens - count], (~wanted).nonzero()[:, 0])
        assert torch.equal(before[1:], wanted.cumsum(0).int())


def test_a_token_alone_decides_as_it_does_among_others() -> None:
    torch.manual_seed(1)
    x, router = draw(40, 200), router_of(200, 5)
    if DEVICE.type == "cpu":  # NumPy's product adds a tile's rows up in different orders: here any order is exact
        x = (8 * x).round() / 8
        for name, tensor in router.state_dict().items():
            router.get_parameter(name).data = (8 * tensor).round() / 8
    scores = router(x)
    for at in range(0, 40, 3):
        run = listed(x, router, float(scores[at]))[0]
        assert listed(x[at : at + 1], router, float(scores[at]))[0][0] == run[at], "at the threshold itself"
        assert listed(x[at - 1 :], router, float(scores[at]))[0][1 if at else 0] == run[at if at else -1]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "rank", "dtype"),
    [
        (5, 40, 3, torch.float32),
        (16, 72, 20, torch.float16),
        (150, 200, 70, torch.float32),
        (200, 136, 32, torch.float16),
    ],
)
def test_forecasts_go_to_the_tokens_that_do_not_run(
    tokens: int, width: int, rank: int, dtype: torch.dtype, silu: bool
) -> None:
    torch.manual_seed(tokens)
    tensors = {name: draw(*shape) * 0.3 for name, shape in forecaster_shapes(width, rank).items()}
    forecaster = Forecaster(tensors, "silu" if silu else "linear").to(DEVICE)
    x, run = draw(tokens, width, dtype=dtype), torch.rand(tokens, device=DEVICE) > 0.4
    off = torch.full((tokens,), -1, device=DEVICE)
    off[: int((~run).sum())] = (~run).nonzero()[:, 0]
    out = torch.full_like(x, 9.0)
    down, up = forecaster.down.cast(x), forecaster.up.cast(x)
    forecast(x, down, up, silu, off, run.sum()[None].int(), out)
    wanted = forecaster.double()(x[~run].double())
    assert float((out[~run].double() - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]
    assert bool((out[run] == 9.0).all()), "the others' rows are not touched"
    found = draw(int(run.sum()), width, dtype=dtype)
    scatter(found, run.nonzero()[:, 0], out)
    assert torch.equal(out[run], found)


def plan_of(size: int, sinks: int, min_context: int) -> Plan:
    shape = ModelShape(model_type="llama", layers=1, heads=4, kv_heads=2, head_dim=16)
    window = {"size": size, "sinks": sinks}
    plan = Plan.dense(shape, "test").edit(window=window, layers=[LayerPlan(heads=(0,) * 4).model_dump()])
    return plan.edit(min_context=min_context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("past", [0, 70])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, (40, 3, 0), (30, 70, 90)], ids=["dense", "window", "many sinks, dense first"])
def test_picked_rows_attend_as_the_reference_has_them(
    window: tuple[int, int, int] | None, padded: bool, past: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    batch, new, dim, plan = 3, 150, 24, plan_of(*window) if window else None
    keys = past + new
    k, v = draw(2, batch, 2, keys, dim, dtype=dtype)
    k_pos = torch.arange(keys, device=DEVICE).repeat(batch, 1)
    run = torch.rand(batch, new, device=DEVICE) > 0.5
    if padded:
        k_pos = torch.stack([k_pos[0] - skip for skip in (0, 9, 33)]).clamp_min(-1)
        run &= k_pos[:, past:] >= 0
    run[1] = False  # a sequence of which nobody runs
    before = torch.cat((run.new_zeros(1), run.flatten())).cumsum(0).int()
    on = run.flatten().nonzero()[:, 0]
    heads = torch.tensor([0, 0, 1, 1], device=DEVICE)
    q = draw(len(on), 4, dim, dtype=dtype)
    rows = Listed(on, before, batch, new, padded)
    found = rows.attend(q.transpose(0, 1)[None], k, v, heads, k_pos, dim**-0.5, plan)[0].transpose(0, 1)
    reference, block, places = Paths(run, None).pick(q.double(), lambda: k_pos[:, past:])
    full = reference.attend(block, k.double(), v.double(), heads, k_pos, dim**-0.5, plan)
    wanted = full.transpose(1, 2).flatten(0, 1)[places]
    assert float((found.double() - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]
