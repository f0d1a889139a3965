"""Informed routing against what costs less, at equal realised FLOPs: quality over seeds, and wall-clock.

    python benchmarks/routing.py quality --device cuda --steps 200     all systems and seeds, added to the JSON
    python benchmarks/routing.py speed --device cuda --shape llama-8b  prefill and decode, demo or a shape

Systems: informed (the pass), informed in closed form, greedy skip (the pass with rank 0: the same routers and training,
nothing forecast), static dropping (units that cost least alone, dropped for all tokens), random routing (the informed
plan's forecasters, tokens drawn). All run on the runtime that an artifact runs on. Quality is bits per byte of held-out
text, second halves of windows as decode rows; thresholds, drops and training saw train and search text only.

Speed is that of routers which decide themselves, biased so that each unit runs for as many tokens as it did in the last
quality run, or --removed share of this shape's FLOPs is removed: by plain indexing, and on Triton's kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

# The folder of this script holds a kernels.py, which Transformers would take for the package of that name.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from sparsec.calibrate.corpus import read_corpus  # noqa: E402
from sparsec.calibrate.decode import text_loss  # noqa: E402
from sparsec.calibrate.routing_paths import runs_of  # noqa: E402
from sparsec.calibrate.splits import Calibration  # noqa: E402
from sparsec.calibrate.unit_flops import Key, UnitCosts, unit_costs  # noqa: E402
from sparsec.compiler.source import load_model, load_tokenizer, open_source  # noqa: E402
from sparsec.compiler.versions import versions  # noqa: E402
from sparsec.events import Event  # noqa: E402
from sparsec.passes.base import Program  # noqa: E402
from sparsec.passes.informed_routing import InformedRouting  # noqa: E402
from sparsec.plan import UNITS, Plan  # noqa: E402
from sparsec.plugins.device import device_name  # noqa: E402
from sparsec.plugins.families import base_plan, unit_modules  # noqa: E402
from sparsec.plugins.runtime import added_tensors, applied, stepping, tensor_names, use_kernels  # noqa: E402
from sparsec.plugins.step import Step  # noqa: E402

RESULT = Path(__file__).resolve().parent / "results" / "routing-demo.json"
PROMPT, STEPS = 512, 32  # tokens before the decode steps that are timed, and these
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--remove", default="0.25,0.4")
    parser.add_argument("--text", default=None, help="file or folder; the built-in text if left out")
    parser.add_argument("--heldout", type=int, default=8, help="windows")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="options of the pass")
    parser.add_argument("--systems", default="all", help="some of: informed, closed, greedy, static, random")
    parser.add_argument("--steps", type=int, default=40, help="of router training")
    parser.add_argument("--shape", choices=("demo", "llama-8b"), default="demo")
    parser.add_argument("--removed", type=float, default=None, help="share of FLOPs; the last quality run's rates")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    result = json.loads(given.out.read_text()) if given.out.is_file() else {"runs": [], "speed": []}
    about = {"command": f"python benchmarks/routing.py {' '.join(sys.argv[1:])}", "versions": versions()}
    for row in quality(given) if given.what == "quality" else speed(given, result):
        result["runs" if given.what == "quality" else "speed"].append(row | about)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({name: value for name, value in row.items() if name != "rates"}), flush=True)


def wanted(given: argparse.Namespace, system: str) -> bool:
    """Is the system among those asked for?"""
    names = {"informed, closed form": "closed"}
    return given.systems == "all" or names.get(system, system.split(maxsplit=1)[0]) in given.systems.split(",")


def opened(given: argparse.Namespace) -> tuple[Any, Any]:
    """The demo model and its tokenizer."""
    source = open_source("demo", cache_dir=Path(".cache"))
    return load_model(source, device=given.device, dtype=given.dtype), load_tokenizer(source)


def quality(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a seed, removed share and system."""
    model, tokenizer = opened(given)
    options = {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in given.set)}
    base = base_plan(model.config, "benchmark")
    for seed in map(int, given.seeds.split(",")):
        calibration = Calibration(read_corpus(given.text) if given.text else read_corpus(), tokenizer, seed=seed)
        clock = StageClock()
        program = Program(model, base, {}, seed, clock)
        for target in map(float, given.remove.split(",")):
            made = InformedRouting(**{"steps": given.steps, **options, "remove": target})
            found: dict[str, tuple[Plan | None, Any, float | None]] = {"dense": (None, {}, None)}
            seconds: dict[str, dict[str, Any]] = {}
            for name, changes in (
                ("informed", {}),
                ("informed, closed form", {"steps": 0, "epochs": 0}),
                ("greedy skip", {"rank": 0}),
            ):
                if not wanted(given, name):
                    continue
                clock.start()
                ran = made.model_copy(update=changes).run(program, calibration)
                seconds[name] = clock.row()
                found[name] = (ran.plan, ran.tensors, None)
                length = int(ran.measured["context"])
            held = calibration.windows(
                "heldout", length, min(given.heldout, calibration.available("heldout", length)), seed=seed
            )
            search = calibration.windows("search", length, min(4, calibration.available("search", length)), seed=seed)
            if wanted(given, "static dropping"):
                found["static dropping"] = (*dropped(model, base, search, target), None)
            if wanted(given, "random routing"):
                found["random routing"] = (
                    *found["informed" if "informed" in found else "informed, closed form"][:2],
                    target,
                )
            dense = None
            for name, (plan, tensors, chance) in found.items():
                row: dict[str, Any] = {"system": name, "seed": seed, "target": target, "context": length}
                if plan is None:
                    dense = loss_of(model, tokenizer, held)
                    yield row | {"bits_per_byte": dense, "device": device_name(model.device)}
                    continue
                with applied(model, plan, tensors), drawing(model, plan, costs_of(model, plan, length), chance, seed):
                    row |= realised(model, plan, held, overhead=chance is None and name != "static dropping")
                    row["bits_per_byte"] = loss_of(model, tokenizer, held)
                assert dense is not None
                row |= {"against_dense": row["bits_per_byte"] / dense - 1} | seconds.get(name, {"seconds": None})
                yield row | {"device": device_name(model.device)}


class StageClock:
    """Listens to a pass: the seconds up to an event are those of its stage."""

    FORECASTERS = ("states of units", "states of search text", "forecasters")  # what the LFF stage consists of

    def start(self) -> None:
        """A pass begins."""
        self.last, self.stages = time.monotonic(), dict[str, float]()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        self.stages[event.stage] = self.stages.get(event.stage, 0.0) + now - self.last
        self.last = now

    def row(self) -> dict[str, Any]:
        """Seconds of the whole pass, of its forecasters alone, and by stage."""
        self(Event("what is shown"))
        fitted = sum(self.stages.get(name, 0.0) for name in self.FORECASTERS)
        return {"seconds": sum(self.stages.values()), "lff_seconds": fitted, "seconds_by_stage": self.stages}


def costs_of(model: Any, plan: Plan, length: int, overhead: bool = True) -> UnitCosts:
    """Of a routed plan; without overhead: nothing decides at run time."""
    routing = plan.routing
    assert routing is not None
    bare = plan.edit(routing=None)
    routed = {"attention": routing.attention, "mlp": routing.mlp}
    costs = unit_costs(model, bare, length, rank=routing.rank, hidden=routing.hidden, routed=routed)  # type: ignore[arg-type]
    return costs if overhead else UnitCosts(costs.removable, costs.total, 0, costs.forecaster)


def loss_of(model: Any, tokenizer: Any, windows: Tensor) -> float:
    """Bits per byte of the windows' second halves, as decode rows."""
    return text_loss(model, tokenizer, list(windows), windows.shape[1] // 2).bits_per_byte


def realised(model: Any, plan: Plan, windows: Tensor, overhead: bool) -> dict[str, Any]:
    """Removed shares as they happened on these windows, and rates by unit and layer."""
    runs: dict[Key, list[Tensor]] = {}
    for window in windows:
        for key, run in runs_of(model, window).items():
            runs.setdefault(key, []).append(run)
    away = {key: ~torch.cat(found) for key, found in runs.items()}
    costs = costs_of(model, plan, windows.shape[1], overhead)
    shares = {unit: {key: gone for key, gone in away.items() if key[1] == unit} for unit in UNITS}
    return {
        "removed": costs.removed(away),
        "removed_by_unit": {unit: costs.removed(some) if some else 0.0 for unit, some in shares.items()},
        "rates": {f"{unit} {layer}": 1 - float(gone.float().mean()) for (layer, unit), gone in away.items()},
    }


@contextmanager
def drawing(model: Any, plan: Plan, costs: UnitCosts, target: float | None, seed: int) -> Iterator[None]:
    """Inside the block tokens are sent away by lot, as many as remove ``target``; None: the routers decide."""
    with ExitStack() as stack:
        if target is not None and plan.routing is not None:
            saved = sum(float((cost - costs.forecaster).sum()) for cost in costs.removable.values())
            chance = target * float(costs.total.sum()) / saved
            hook = lots(lambda _: chance, plan.routing.threshold, seed)
            for layer, unit in plan.routing.units:
                router: Any = unit_modules(model, unit)[layer].router
                stack.callback(router.register_forward_hook(hook((layer, unit))).remove)
        yield


def lots(chance: Callable[[Key], float], threshold: float, seed: int) -> Callable[[Key], Any]:
    """Hooks of routers that score by lot: below the threshold with the unit's chance."""
    rng = torch.Generator().manual_seed(seed)

    def hook_of(key: Key) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            return (torch.rand(output.shape, generator=rng) - chance(key) + threshold).to(output.device)

        return hook

    return hook_of


def skipping(base: Plan, width: int, units: list[Key]) -> tuple[Plan, dict[str, Tensor]]:
    """A plan under which these units run for no token."""
    routing = {
        "width": width, "rank": 0, "activation": "linear", "hidden": 0, "threshold": 0.0, "sinks": 0, "special": (),
        "attention": sorted(i for i, unit in units if unit == "attention"),
        "mlp": sorted(i for i, unit in units if unit == "mlp"),
    }  # fmt: skip
    plan = base.edit(routing=routing)
    tensors = {name: torch.zeros(shape) for name, shape in tensor_names(plan).items()}
    return plan, {name: t - 1 if name.endswith("bias") else t for name, t in tensors.items()}


@torch.no_grad()
def dropped(model: Any, base: Plan, search: Tensor, target: float) -> tuple[Plan, dict[str, Tensor]]:
    """Static dropping: units by the loss of search text that each costs alone, per FLOP, up to the target."""
    width = int(model.config.hidden_size)
    layers = tuple(range(base.model.layers))
    whole = unit_costs(model, base, search.shape[1], rank=0, hidden=0, routed=dict.fromkeys(UNITS, layers))

    def loss(units: list[Key]) -> float:
        plan, tensors = skipping(base, width, units)
        with applied(model, plan, tensors):
            ids = search.to(model.device)
            return sum(float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in ids)

    start = loss([])
    prices = {key: (loss([key]) - start) / float(cost.sum()) for key, cost in whole.removable.items()}
    chosen: list[Key] = []
    for key in sorted(prices, key=lambda key: prices[key]):
        chosen.append(key)
        if sum(float(whole.removable[one].sum()) for one in chosen) / float(whole.total.sum()) >= target:
            break
    return skipping(base, width, chosen)


@torch.no_grad()
def speed(given: argparse.Namespace, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Prefill and decode steps beside the dense model on SDPA, in one run: a row a way of running routed units."""
    rates = next(
        row["rates"] for row in reversed(result["runs"]) if row["system"] == "informed" and row["target"] == 0.25
    )
    torch.manual_seed(0)
    model = opened(given)[0] if given.shape == "demo" else shaped(given.device)
    base, width = base_plan(model.config, "benchmark"), int(model.config.hidden_size)
    layers, measured = base.model.layers, max(int(name.split()[1]) for name in rates) + 1
    every = list(range(layers))
    routing = {
        "width": width, "rank": 64 if given.shape == "demo" else 256, "activation": "silu", "hidden": 16,
        "threshold": 0.0, "sinks": 4, "special": (), "attention": every, "mlp": every,
    }  # fmt: skip
    plan = base.edit(routing=routing)
    costs = costs_of(model, plan, given.length)
    chances = {key: 1 - float(rates.get(f"{key[1]} {key[0] * measured // layers}", 1.0)) for key in costs.removable}
    if given.removed is not None:
        chances = scaled(chances, costs, given.removed)
    drawn = {name: torch.randn(shape) * 0.01 for name, shape in tensor_names(plan).items()}
    ids = torch.randint(3, 1000, (given.batch, given.length), device=given.device)
    tensors = biased(model, plan, drawn, ids, chances)

    def prefill() -> float:
        return timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), given.device)

    def decode() -> float:
        cache = model(input_ids=ids[:1, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values

        def steps() -> None:
            for at in range(PROMPT, PROMPT + STEPS):
                model(input_ids=ids[:1, at : at + 1], past_key_values=cache, use_cache=True)

        return timed(steps, given.device) / STEPS

    def routed(run: Callable[[], float], kernels: Any) -> float:
        with applied(model, plan, tensors):
            use_kernels(model, kernels)
            return run()

    ways = {"plain indexing": "reference"} | ({} if given.device == "cpu" else {"kernels": "auto"})
    for name, run, decoding in (("prefill", prefill, False), ("decode step at batch 1", decode, True)):
        runs: dict[Key, list[Tensor]] = {}

        def note(layer: int, unit: Any, run: Tensor, runs: dict[Key, list[Tensor]] = runs) -> None:
            runs.setdefault((layer, unit), []).append(run.cpu())

        for kernels in ways.values():
            run(), routed(run, kernels)  # warm
        with applied(model, plan, tensors), stepping(Step(decode=decoding, observe_paths=note)):
            run()
        away = {key: ~torch.cat(found[-STEPS:] if decoding else found, 1) for key, found in runs.items()}
        rounds = [(run(), {way: routed(run, kernels) for way, kernels in ways.items()}) for _ in range(given.repeats)]
        for way in ways:
            yield {
                "what": name, "routed": way, "shape": given.shape, "batch": 1 if decoding else given.batch,
                "length": PROMPT if decoding else given.length, "dtype": str(model.dtype).removeprefix("torch."),
                "dense_seconds": statistics.median(dense for dense, _ in rounds),
                "routed_seconds": statistics.median(found[way] for _, found in rounds),
                "speedup": statistics.median(dense / found[way] for dense, found in rounds),
                "removed": None if decoding else costs.removed(away),
                "away": {unit: mean_of(gone for key, gone in away.items() if key[1] == unit) for unit in UNITS},
                "dense": f"Transformers, {model.config._attn_implementation}", "device": device_name(model.device),
                "threads": torch.get_num_threads(),
            }  # fmt: skip


def mean_of(flags: Iterable[Tensor]) -> float:
    """Share of those that are set."""
    return float(torch.stack([flag.float().mean() for flag in flags]).mean())


def scaled(chances: dict[Key, float], costs: UnitCosts, target: float) -> dict[Key, float]:
    """Chances to be sent away, all times the factor by which ``target`` of the FLOPs is removed."""
    saved = {key: float((cost - costs.forecaster).sum()) for key, cost in costs.removable.items()}
    paid = len(costs.removable) * len(costs.total) * costs.router
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        found = {key: min(1.0, chance * middle) for key, chance in chances.items()}
        removed = (sum(found[key] * saved[key] for key in found) - paid) / float(costs.total.sum())
        low, high = (middle, high) if removed < target else (low, middle)
    return found


def biased(
    model: Any, plan: Plan, tensors: dict[str, Tensor], ids: Tensor, chances: dict[Key, float]
) -> dict[str, Tensor]:
    """The tensors with routers' biases by which each unit sends away its chance of these tokens, layer by layer."""

    def hook_of(key: Key) -> Any:
        def hook(router: Any, args: Any, scores: Tensor) -> Tensor:
            cut = scores.float().flatten().sort().values[min(scores.numel() - 1, int(chances[key] * scores.numel()))]
            router.linear.bias -= cut
            return scores - cut

        return hook

    with applied(model, plan, tensors), ExitStack() as stack:
        for layer, unit in plan.routing.units if plan.routing is not None else ():
            router: Any = unit_modules(model, unit)[layer].router
            stack.callback(router.register_forward_hook(hook_of((layer, unit))).remove)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return {name: tensor.detach().cpu().clone() for name, tensor in added_tensors(model).items()}


def shaped(device: str) -> Any:
    """A model of Llama-3.1-8B's shape with random weights, bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_8B)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
