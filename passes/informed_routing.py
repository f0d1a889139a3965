"""informed-routing: a token runs a unit, or a forecast of the unit's output takes its place.

Informed Routing (arXiv 2510.13831): lightweight feature forecasters say what a unit would have answered, routers decide
by whether that is good enough. What the paper's code does otherwise, and what is ours: docs/passes/informed-routing.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sparsec.calibrate.forecast_fit import Forecasters, Recoverability, Tensors, closed_form, through_silu, train
from sparsec.calibrate.router_fit import calibrated, closed_form_routers, sensitivity, with_hidden
from sparsec.calibrate.router_train import RouterSettings, train_routers
from sparsec.calibrate.routing_paths import paths_of
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.unit_flops import Key, UnitCosts, unit_costs
from sparsec.calibrate.unit_states import States, unit_states
from sparsec.errors import PlanError, UsageError
from sparsec.events import Event
from sparsec.passes.base import Cost, Need, Pass, PassResult, Program, Tier
from sparsec.plan import UNITS, Plan, Unit
from sparsec.plugins.families import unit_modules
from sparsec.plugins.routed_units import prefix
from sparsec.plugins.runtime import applied

SHOWN = 96  # tokens of the sample text whose paths are kept for the report


class InformedRouting(Pass):
    """How much to remove, with what. Contexts are tokens."""

    name: ClassVar[str] = "informed-routing"
    tier: ClassVar[Tier] = "minutes"
    presets: ClassVar[Mapping[Tier, Mapping[str, Any]]] = {
        "training-free": {"epochs": 0, "steps": 0},
        "minutes": {},
        "hours": {"steps": 1000, "batch": 8, "train_context": 2048, "tokens": 65536, "samples": 32768, "hidden": 64},
    }
    summary: ClassVar[str] = "forecast units' outputs for the tokens that routers send away"
    source: ClassVar[str] = "Informed Routing, arXiv 2510.13831"
    after: ClassVar[tuple[str, ...]] = ("dynamic-tokenization", "rtpurbo", "razor", "window", "indexcache")
    gives: ClassVar[tuple[Need, ...]] = ("routing",)

    remove: float = Field(default=0.25, gt=0, lt=1, description="share of all units' FLOPs to remove, overheads paid")
    units: Literal["both", "attention", "mlp"] = Field(default="both", description="which of them are routed")
    rank: int = Field(default=64, ge=0, description="of the forecasters (the paper: 100); 0: skip, forecast nothing")
    hidden: int = Field(default=16, ge=0, description="hidden units of a router, beside its linear part")
    sinks: int = Field(default=4, ge=0, description="first tokens that run everything")
    context: int | None = Field(
        default=None, ge=64, description="tokens a window; null: as the text has them, 2048 at most"
    )
    tokens: int = Field(default=16384, ge=1, description="of train text for the closed forms")
    samples: int = Field(default=8192, ge=64, description="of these tokens kept, to train forecasters and fit routers")
    ridge: float = Field(default=1e-3, ge=0, description="of both regressions, as a share of the inputs' mean square")
    epochs: int = Field(default=3, ge=0, description="of the forecasters' training; 0: linear ones, in closed form")
    lr: float = Field(default=1e-3, gt=0, description="of the forecasters' training (the paper's)")
    sensitivity_windows: int = Field(default=8, ge=1, description="for the units' sensitivities")
    steps: int = Field(default=40, ge=0, description="of the routers' training; 0: routers in closed form")
    batch: int = Field(default=2, ge=1, description="windows a step")
    train_context: int = Field(default=256, ge=64, description="tokens of these windows")
    router_lr: float = Field(default=2e-3, gt=0, description="of the routers' training (the paper's)")
    recover: float = Field(default=0.1, ge=0, description="weight of the recoverability term (the paper's 0.1)")
    joint: bool = Field(default=True, description="forecasters learn with the routers (ours)")
    search_windows: int = Field(default=4, ge=1, description="of the search text, for thresholds and for what is shown")

    def tier_of_run(self) -> Tier:
        """Without training it is the cheap kind."""
        if not self.steps and not self.epochs:
            return "training-free"
        return "hours" if self.steps >= 500 else "minutes"

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Forecasters, routers, a threshold. See :class:`sparsec.passes.base.Pass`."""
        plan, model, listen = program.plan, program.model, program.listen
        if plan.routing is not None:
            raise PlanError("informed-routing starts from a plan that routes nothing: run it once")
        unit_modules(model, "mlp")
        width = int(model.config.get_text_config().hidden_size)
        if self.rank > width:
            raise UsageError(
                f"informed-routing.rank {self.rank} is more than the model's hidden size {width}: lower it"
            )
        routed = self._routed(plan)
        keys: list[Key] = sorted((layer, unit) for unit in UNITS for layer in routed[unit])
        if not keys:
            raise PlanError("informed-routing finds no unit to route: set units to mlp or both")
        length = self._length(calibration, int(model.config.max_position_embeddings))
        costs = unit_costs(model, plan, length, rank=self.rank, hidden=self.hidden if self.steps else 0, routed=routed)
        special = tuple(sorted(set(calibration.tokenizer.all_special_ids)))
        windows = calibration.windows("train", length, self._count(calibration, length), seed=program.seed)
        search = calibration.windows(
            "search", length, min(self.search_windows, calibration.available("search", length)), seed=program.seed
        )
        with applied(model, plan, program.tensors):
            states = unit_states(
                model, windows, keys, sinks=self.sinks, special=special, samples=self.samples, listen=listen,
                stage="states of units",
            )  # fmt: skip
            held = unit_states(
                model, search, keys, sinks=self.sinks, special=special, samples=2048, moments=False, listen=listen,
                stage="states of search text",
            )  # fmt: skip
            forecasters, activation, fits = self._forecasters(states, held, keys, program)
            short = windows[: self.sensitivity_windows, : min(length, 512)]
            sensitive = sensitivity(
                model, short, forecasters, activation, sinks=self.sinks, special=special, seed=program.seed,
                listen=listen,
            )  # fmt: skip
        routers = closed_form_routers(states, forecasters, activation, sensitive, costs, self.ridge)
        rng = torch.Generator().manual_seed(program.seed)
        routers = {key: with_hidden(router, self.hidden if self.steps else 0, rng) for key, router in routers.items()}
        routing: dict[str, Any] = {
            "width": width, "rank": self.rank, "activation": activation, "hidden": self.hidden if self.steps else 0,
            "threshold": 0.0, "sinks": self.sinks, "special": special, "attention": routed["attention"],
            "mlp": routed["mlp"],
        }  # fmt: skip
        bare = plan.edit(routing=routing)
        tensors = {**program.tensors, **_named(forecasters, routers)}
        found, rounds = calibrated(model, bare, tensors, search, costs, self.remove, listen)
        measured: dict[str, Any] = {"closed_form": self._scored(model, found, tensors, search, costs)}
        if self.steps:
            trained = self._train(program, calibration, found, routers, forecasters, costs)
            candidate = {**program.tensors, **_named(trained.forecasters, trained.routers)}
            after, rounds_after = calibrated(model, bare, candidate, search, costs, self.remove, listen)
            measured["trained"] = self._scored(model, after, candidate, search, costs)
            measured["training"] = {
                "losses": [round(loss, 4) for loss in trained.losses],
                "removed": [round(share, 4) for share in trained.removed],
            }
            if measured["trained"]["loss"] < measured["closed_form"]["loss"]:
                found, tensors, rounds = after, candidate, rounds_after
            else:
                listen(Event(self.name, note="training the routers improved nothing: the closed form stays"))
        measured |= {
            "tier": self.tier_of_run(),
            "context": length,
            "tokens": states.tokens,
            "remove": self.remove,
            "rank": self.rank,
            "activation": activation,
            "units": fits,
            "sensitivity": [{"layer": i, "unit": unit, "nats": value} for (i, unit), value in sensitive.items()],
            "rounds": rounds,
            "search_windows": len(search),
            "dense_loss": self._loss(model, plan, program.tensors, search),
            "paths": paths_of(model, found, tensors, search, costs, calibration.tokenizer, SHOWN),
        }
        return PassResult(found, tensors, measured)

    def adds_tensors(self) -> bool:
        """Forecasters and routers."""
        return True

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """The closed forms read their text once or twice; a training step is worth three forwards."""
        length = self.context or min(2048, max_positions)
        read = 2 * self.tokens + (3 * self.sensitivity_windows * 512) + 14 * self.search_windows * length
        trained = 3 * self.steps * self.batch * self.train_context
        return Cost(tokens=read + trained, resident=4 * plan.model.layers * self.samples * plan.model.head_dim * 8)

    def _routed(self, plan: Plan) -> dict[Unit, tuple[int, ...]]:
        fixed, every = plan.attention_fixed(), range(plan.model.layers)
        return {
            "attention": tuple(i for i in every if i not in fixed) if self.units != "mlp" else (),
            "mlp": tuple(every) if self.units != "attention" else (),
        }

    def _length(self, calibration: Calibration, readable: int) -> int:
        if self.context is not None:
            return self.context
        wanted = min(2048, readable)
        return max(64, min(calibration.longest(split, wanted, 2) for split in ("train", "search")))

    def _count(self, calibration: Calibration, length: int) -> int:
        return max(1, min(-(-self.tokens // length), calibration.available("train", length)))

    def _forecasters(
        self, states: States, held: States, keys: list[Key], program: Program
    ) -> tuple[Forecasters, Literal["silu", "linear"], list[dict[str, Any]]]:
        """Stage 1: the forecasters, what is between their layers, and how well they do on the search text."""
        activation: Literal["silu", "linear"] = "silu" if self.epochs and self.rank else "linear"
        found: Forecasters = {}
        fits = []
        for number, key in enumerate(keys):
            x, y = held.x[key], held.y[key]
            parts: Tensors = closed_form(states.moments[key], self.rank, self.ridge) if self.rank else {}
            fit: dict[str, Any] = {"layer": key[0], "unit": key[1]}
            fit["closed_form"] = vars(Recoverability.of(parts, "linear", x, y))
            if activation == "silu":
                start = through_silu(parts, states.moments[key])
                device = program.model.device
                parts = train(
                    start, states.x[key].to(device), states.y[key].to(device), epochs=self.epochs, lr=self.lr,
                    seed=program.seed,
                )  # fmt: skip
                fit["trained"] = vars(Recoverability.of(parts, "silu", x, y))
            found[key] = parts
            fits.append(fit)
            program.listen(Event("forecasters", number + 1, len(keys)))
        return found, activation, fits

    def _train(
        self,
        program: Program,
        calibration: Calibration,
        plan: Plan,
        routers: dict[Key, Tensors],
        forecasters: Forecasters,
        costs: UnitCosts,
    ) -> Any:
        assert plan.routing is not None
        length = self.train_context
        count = min(self.steps * self.batch, calibration.available("train", length))
        windows = calibration.windows("train", length, count, seed=program.seed + 1)
        settings = RouterSettings(
            steps=self.steps, batch=self.batch, lr=self.router_lr, target=self.remove,
            threshold=plan.routing.threshold, recover=self.recover, forecasters=self.joint, seed=program.seed,
        )  # fmt: skip
        model = program.model
        # Costs of the contexts that the artifact will read, not of the shorter ones that it trains on.
        spread = UnitCosts(
            {key: cost.mean().expand(length) for key, cost in costs.removable.items()},
            costs.total.mean().expand(length),
            costs.router,
            costs.forecaster,
        )
        with applied(model, program.plan, program.tensors):
            return train_routers(model, plan.routing, routers, forecasters, windows, spread, settings, program.listen)

    def _scored(
        self, model: Any, plan: Plan, tensors: Mapping[str, Tensor], search: Tensor, costs: UnitCosts
    ) -> dict[str, float]:
        return {"loss": self._loss(model, plan, tensors, search), "threshold": plan.routing.threshold}  # type: ignore

    @torch.no_grad()
    def _loss(self, model: Any, plan: Plan, tensors: Mapping[str, Tensor], windows: Tensor) -> float:
        """Nats a token of the search text, as prefill rows."""
        total = 0.0
        with applied(model, plan, tensors):
            for window in windows:
                ids = window[None].to(model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                total += float(F.cross_entropy(logits.float(), ids[0, 1:]))
        return total / len(windows)


def _named(forecasters: Forecasters, routers: Mapping[Key, Tensors]) -> dict[str, Tensor]:
    """Tensors by their names in the artifact."""
    found: dict[str, Tensor] = {}
    for key, router in routers.items():
        for part, tensors in (("forecaster", forecasters[key]), ("router", router)):
            found |= {f"{prefix(*key)}.{part}.{name}": tensor for name, tensor in tensors.items()}
    return found
