"""Decode over a million merged tokens beside the original vocabulary, with the demo model, in one run.

python benchmarks/output_index.py -o benchmarks/results/output-index.json      ten minutes and 12 GB on a CPU

Nobody mined a million merges for this model. The rows are means of the rows of two of its tokens, drawn at random, as
merged tokens' rows lie between those of their pieces; the tokens that are then written are no text. What is measured is
``generate()``, greedy and by top_p, batch 1, with the whole model and its cache, in turns: Transformers' dense model, a
plan that changes nothing, both with all of the original output rows multiplied, and a plan that writes merged tokens.
The ratio is against the plan, which has the same attention; the dense model's is beside it. Recall is the index's
alone, against all rows multiplied, on hidden states of held-out text that it was not fitted on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import sparsec
from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.source import load_model, load_tokenizer, open_source
from sparsec.compiler.versions import versions
from sparsec.plugins.device import device_name
from sparsec.plugins.families import base_plan
from sparsec.plugins.hypernetwork import embeddings
from sparsec.plugins.merged_writing import MERGES, OUTPUT, STATES, writer_of
from sparsec.plugins.output_index import OutputIndex
from sparsec.plugins.vocabulary import INPUT, NEVER

TOP = 50
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}


class Clock:
    """Transformers' streamer: notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """A token, or the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The text's end."""

    def steps(self) -> list[float]:
        """Seconds a token, without the prompt and the first token behind it."""
        return [b - a for a, b in zip(self.times[2:], self.times[3:], strict=False)]


def main() -> int:
    options = _options()
    began = time.time()
    torch.set_num_threads(options.threads)
    source = open_source("demo", cache_dir=Path(os.environ.get("SPARSEC_CACHE", "~/.cache/sparsec")))
    model, tokenizer = load_model(source, device="cpu", dtype="float32"), load_tokenizer(source)
    calibration = Calibration(read_corpus(), tokenizer)
    table, head, _ = embeddings(model)
    fitted, fresh = (_hidden(model, calibration, split, count) for split, count in (("train", 16), ("heldout", 4)))
    prompt = calibration.windows("heldout", 128, 1, seed=2)
    merges = _pairs(len(table), options.rows)
    tensors = {
        INPUT: (table[merges[:, 0]] + table[merges[:, 1]]) / 2,
        NEVER: -head.mean(0),
        OUTPUT: (head[merges[:, 0]] + head[merges[:, 1]]) / 2,
        STATES: fitted.T @ fitted / len(fitted),
        MERGES: merges,
    }
    runs: dict[str, list[float]] = {}
    large = base_plan(model.config, "benchmark").edit(
        vocabulary={
            "mode": "static",
            "base": len(table),
            "merged": options.rows,
            "rows": -(-(len(table) + options.rows) // 64) * 64,
            "width": table.shape[1],
            "boundary": "phrase",
            "write": "merged",
        }
    )
    other = load_model(source, device="cpu", dtype="float32")
    plain = load_model(source, device="cpu", dtype="float32")
    sparsec.install(plain, base_plan(model.config, "benchmark"), {})
    started = time.time()
    sparsec.install(other, large, tensors)
    writer = writer_of(other)
    assert writer is not None
    building = time.time() - started
    systems: dict[str, tuple[Any, dict[str, Any]]] = {
        "dense": (model, {}),
        "original": (plain, {}),
        "merged": (other, {}),
        "original, top_p": (plain, SAMPLED),
        "merged, top_p": (other, SAMPLED),
    }
    for number in range(options.rounds + 1):  # the first warms up
        for name, (which, how) in systems.items():
            took = _decode(which, prompt, options.tokens, how)
            if number:
                runs.setdefault(name, []).extend(took)
        print({name: f"{statistics.median(times) * 1e3:.1f} ms" for name, times in runs.items()}, flush=True)
    parts = _parts(model, writer, fresh)
    row: dict[str, Any] = {
        name: {"step_s": statistics.median(times), "quartiles_s": statistics.quantiles(times, n=4)[::2]}
        for name, times in runs.items()
    }
    result = {
        "rows": row,
        "ratio": row["original"]["step_s"] / row["merged"]["step_s"],
        "ratio_to_dense": row["dense"]["step_s"] / row["merged"]["step_s"],
        "ratio_top_p": row["original, top_p"]["step_s"] / row["merged, top_p"]["step_s"],
        "parts": parts,
        "recall": _recall(writer, fresh),
        "base": len(table),
        "merged": options.rows,
        "candidates": writer.index.candidates,
        "building_seconds": building,
        "tokens": options.tokens * options.rounds,
        "prompt": prompt.shape[1],
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "device": device_name(torch.device("cpu")),
        "versions": versions() | {"faiss": _faiss()},
        "command": " ".join(["python", "benchmarks/output_index.py", *sys.argv[1:]]),
        "seconds": time.time() - began,
    }
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {
                key: result[key]
                for key in ("ratio", "ratio_to_dense", "ratio_top_p", "parts", "recall", "building_seconds")
            }
        )
    )
    return 0


@torch.no_grad()
def _hidden(model: Any, calibration: Calibration, split: str, count: int) -> torch.Tensor:
    """What the output layer gets on text, [rows, width]."""
    tokens = calibration.windows(split, 512, count)
    states: torch.Tensor = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def _pairs(tokens: int, count: int) -> torch.Tensor:
    """Different pairs of tokens, int32 [count, 2]."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(tokens * tokens, (count + count // 100,), generator=generator).unique()  # type: ignore[no-untyped-call]
    drawn = drawn[torch.randperm(len(drawn), generator=generator)[:count]]
    return torch.stack([drawn // tokens, drawn % tokens], 1).int()


def _decode(model: Any, prompt: torch.Tensor, tokens: int, how: dict[str, Any]) -> list[float]:
    clock = Clock()
    model.generation_config.eos_token_id = None  # texts of one length
    torch.manual_seed(0)
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0} | how
    model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **options)
    return clock.steps()


@torch.no_grad()
def _parts(model: Any, writer: Any, states: torch.Tensor, times: int = 20) -> dict[str, float]:
    """Median seconds of the output layer alone, for one state."""
    every = {
        "original rows": model.get_output_embeddings(),
        "writer": writer,
        "index": writer.index,
        "all merged rows": lambda state: state @ writer.index.rows.T,
    }
    found = {}
    for name, part in every.items():
        took = []
        for state in states[:times]:
            started = time.perf_counter()
            part(state[None])
            took.append(time.perf_counter() - started)
        found[name] = statistics.median(took)
    return found


@torch.no_grad()
def _recall(writer: Any, states: torch.Tensor, count: int = 256) -> dict[str, Any]:
    """How many of the rows with the largest logits the index finds, and of their probability (softmax over all)."""
    some = states[torch.randperm(len(states), generator=torch.Generator().manual_seed(1))[:count]]
    first = top = mass = 0.0
    for part in torch.split(some, 16):
        numbers, _ = writer.index(part)
        logits = part @ writer.index.rows.T
        best = logits.topk(TOP, dim=-1).indices
        for which, exact, found in zip(best, logits.softmax(-1), numbers, strict=True):
            inside = torch.isin(which, found)
            first += float(inside[0])
            top += float(inside.float().mean())
            mass += float(exact[found].sum())
    return {
        "states": count,
        "first": first / count,
        f"top_{TOP}": top / count,
        "mass": mass / count,
        "greedy": _same_greedy(writer, some[:64]),
    }


@torch.no_grad()
def _same_greedy(writer: Any, states: torch.Tensor) -> float:
    """Share of states behind which the same token is written as where all rows are multiplied."""
    index = writer.index
    found = torch.cat([writer(state[None]).argmax(-1) for state in states])
    writer.index = OutputIndex(index.rows, torch.empty(0), exact=len(index.rows))
    exact = torch.cat([writer(state[None]).argmax(-1) for state in states])
    writer.index = index
    return float((found == exact).float().mean())


def _faiss() -> str:
    import faiss

    return str(faiss.__version__)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A million merged tokens beside the original vocabulary.")
    parser.add_argument("-o", dest="out", required=True)
    for name, default in (("rows", 1_000_000), ("tokens", 64), ("rounds", 5), ("threads", os.cpu_count() or 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
