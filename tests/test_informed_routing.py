"""What only informed-routing promises: closed forms that are optimal, FLOPs that add up, refusals in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.forecast_fit import closed_form, predicted, through_silu, train
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.unit_flops import unit_costs
from sparsec.calibrate.unit_states import Moments
from sparsec.compiler.explain import artifact_data, artifact_text
from sparsec.compiler.pipeline import Job, compile_model
from sparsec.compiler.recipe import make_recipe
from sparsec.errors import UsageError
from sparsec.layout import REPORT
from sparsec.passes.base import Program
from sparsec.passes.informed_routing import InformedRouting
from sparsec.plugins.families import base_plan
from sparsec.plugins.load import load
from sparsec.plugins.runtime import added_tensors, tensor_names

WIDTH = 12


@pytest.fixture
def moments() -> tuple[Moments, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2000, WIDTH) @ torch.randn(WIDTH, WIDTH) + 1
    y = x @ torch.randn(WIDTH, 3) @ torch.randn(3, WIDTH) + 0.5 + 0.01 * torch.randn(2000, WIDTH)
    found = Moments.none(WIDTH)
    found.add(x, y)
    return found, x, y


def test_the_closed_form_finds_a_map_of_its_rank(moments: Any) -> None:
    sums, x, y = moments
    spread = (y - y.mean(0)).square().mean()
    errors = [
        float((predicted(closed_form(sums, rank, 1e-9), "linear", x) - y).square().mean() / spread)
        for rank in (1, 2, 3, WIDTH)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3
    assert errors[3] == pytest.approx(errors[2], abs=1e-4)


def test_silu_starts_near_the_closed_form_and_training_never_ends_worse(moments: Any) -> None:
    sums, x, y = moments
    linear = closed_form(sums, 3, 1e-9)
    start = through_silu(linear, sums)
    spread = (y - y.mean(0)).square().mean()
    assert float((predicted(start, "silu", x) - predicted(linear, "linear", x)).square().mean() / spread) < 0.05
    after = train(start, x, y, epochs=5, lr=1e-3, seed=0)
    check = torch.arange(len(x)) % 8 == 0

    def error(parts: Any) -> float:
        return float((predicted(parts, "silu", x[check]) - y[check]).square().mean())

    assert error(after) <= error(start)


def test_flops_are_those_of_the_weights_and_of_the_keys_that_are_seen(small_llama: Callable[..., Any]) -> None:
    model = small_llama(layers=2)
    plan = base_plan(model.config, "test")
    costs = unit_costs(model, plan, 8, rank=2, hidden=3, routed={"attention": (0,), "mlp": (0, 1)})
    layer = model.model.layers[0]
    mlp = sum(weight.numel() for weight in layer.mlp.parameters())
    projections = layer.self_attn.q_proj.weight.numel() + layer.self_attn.o_proj.weight.numel()
    assert costs.removable[1, "mlp"].tolist() == [mlp] * 8
    assert costs.removable[0, "attention"].tolist() == [projections + 2 * 64 * seen for seen in range(1, 9)]
    assert (costs.router, costs.forecaster) == (48 + 3 * 48 + 3, 2 * 2 * 48)
    none = {key: torch.zeros(1, 8, dtype=torch.bool) for key in costs.removable}
    every = {key: ~gone for key, gone in none.items()}
    assert costs.removed(none) < 0, "routers are paid for"
    assert costs.removed(every) == pytest.approx(costs.most)
    windows = plan.edit(window={"size": 2, "sinks": 1}, layers=[{"heads": (0, 0, 0, 0)}] * 2)
    near = unit_costs(model, windows, 8, rank=2, hidden=3, routed={"attention": (0,), "mlp": ()})
    assert near.removable[0, "attention"].tolist() == [projections + 2 * 64 * min(seen, 3) for seen in range(1, 9)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove": 0.97}, r"remove=0.97 cannot be met: with every token sent away \d\d\.\d% of the units' FLOPs"),
        ({"rank": 33}, "rank 33 is more than the model's hidden size 32: lower it"),
    ],
)
def test_bad_options_are_one_line(small: tuple[Any, Calibration], options: dict[str, Any], message: str) -> None:
    model, calibration = small
    given = {
        "context": 128, "tokens": 512, "samples": 256, "epochs": 0, "steps": 0, "rank": 4, "sensitivity_windows": 1,
        "search_windows": 1,
    }  # fmt: skip
    with pytest.raises(UsageError, match=message) as caught:
        InformedRouting(**{**given, **options}).run(Program(model, base_plan(model.config, "test"), {}), calibration)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def small(tiny_deep: Path) -> tuple[Any, Calibration]:
    model = AutoModelForCausalLM.from_pretrained(tiny_deep).eval().requires_grad_(False)
    return model, Calibration(read_corpus(), AutoTokenizer.from_pretrained(tiny_deep))


def test_the_share_that_is_removed_is_the_one_asked_for(small: tuple[Any, Calibration]) -> None:
    model, calibration = small
    made = InformedRouting(
        context=128, tokens=1024, samples=512, epochs=0, steps=0, rank=4, sensitivity_windows=1, search_windows=2,
        remove=0.3,
    )  # fmt: skip
    found = made.run(Program(model, base_plan(model.config, "test"), {}), calibration).measured["paths"]
    assert found["removed"] == pytest.approx(0.3, abs=0.02)
    # Each unit's share pays its own routers, so the shares add up.
    assert sum(found["by_unit"].values()) == pytest.approx(found["removed"])


def test_an_artifact_routes_as_its_report_says(tiny_deep: Path, tmp_path: Path) -> None:
    options = {
        "context": 128, "tokens": 512, "samples": 256, "epochs": 1, "steps": 2, "train_context": 64, "rank": 4,
        "sensitivity_windows": 1, "search_windows": 1,
    }  # fmt: skip
    recipe = make_recipe({"passes": {"informed-routing": options}, "gate": {"context": 256, "max_loss": 1}})
    out = tmp_path / "out"
    compile_model(Job(str(tiny_deep), out, recipe, tmp_path / "cache"))
    model, _ = load(out)
    plan = model.sparsec_plan
    assert plan.routing is not None
    assert plan.routing.special == (0, 1, 2)
    assert added_tensors(model).keys() == tensor_names(plan).keys()
    assert "Which tokens run which units" in (out / REPORT).read_text()
    assert "routing   attention of 4 layers, MLPs of 4; forecasters of rank 4" in artifact_text(out, artifact_data(out))
    ids = torch.arange(3, 103)[None]
    wanted = model(input_ids=ids, use_cache=False).logits
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(input_ids=ids, use_cache=False).logits, wanted)
