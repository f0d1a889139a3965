"""What HISA and MISA leave of an indexer's choice on natural text: a small DSA model, trained on its bytes.

    python benchmarks/text_dsa.py --train texts/train --texts texts/eval [--device cuda]

Writes benchmarks/results/dsa-text.json. The model of benchmarks/tiny_dsa.py reads words in random order; here those
that stand together belong together, as in what these ways are made for. Trained alike: the model dense, the indexers
alone on its attention, the model on what they choose, and the indexers again. Blocks and candidates have the papers'
proportions to the number of chosen tokens. Judged on text that no training read.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_dsa import FAMILIES, config, seeing_all, train
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.dsa_choices import MEASURES, choices
from sparsec.calibrate.dsa_fit import train_dsa
from sparsec.calibrate.trainable import put_weights
from sparsec.compiler.draw import drawing
from sparsec.compiler.versions import versions
from sparsec.plan import Plan
from sparsec.plugins.device import device_name
from sparsec.plugins.families import base_plan
from sparsec.plugins.runtime import applied

RESULT = Path(__file__).resolve().parent / "results" / "dsa-text.json"
LENGTH, TOP_K, SPECIAL = 2048, 64, 3  # bytes a window, chosen ones, and tokens before the bytes
SIZES: dict[str, Any] = {
    "vocab_size": 256 + SPECIAL, "hidden_size": 256, "intermediate_size": 768, "index_topk": TOP_K,
    "max_position_embeddings": 2 * LENGTH, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
    "q_lora_rank": 128, "kv_lora_rank": 128, "index_head_dim": 64,
}  # fmt: skip


def windows_of(spec: str) -> Callable[[int, int, int], Tensor]:
    """(count, length, seed) -> int64 [count, length]: drawn at random, long texts more often, none across two."""
    texts = [torch.frombuffer(bytearray(each.text.encode()), dtype=torch.uint8) for each in read_corpus(spec).documents]

    def draw(count: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.tensor([max(0, len(text) - length) for text in texts], dtype=torch.float64)
        found = []
        for number in torch.multinomial(sizes, count, replacement=True, generator=generator).tolist():
            start = int(torch.randint(int(sizes[number]), (1,), generator=generator))
            found.append(texts[number][start : start + length].long() + SPECIAL)
        return torch.stack(found)

    return draw


def every_row(tokens: Tensor) -> Tensor:
    """All of them count."""
    return torch.ones(len(tokens), tokens.shape[1] - 1, dtype=torch.bool)


@torch.no_grad()
def bits(model: Any, tokens: Tensor) -> float:
    """A byte, over the second halves of windows."""
    total, half = 0.0, tokens.shape[1] // 2
    for window in tokens:
        ids = window[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, half:-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, half + 1 :])) / 0.6931471805599453
    return total / len(tokens)


def ways(heads: int) -> dict[str, dict[str, Any]]:
    """What is changed of the plan's choice. heads: of an indexer."""
    found: dict[str, dict[str, Any]] = {}
    for block in (TOP_K // 16, TOP_K // 4, TOP_K):  # the paper: 128 for 2,048
        top = 4 * TOP_K // block
        found[f"hisa, {top} blocks of {block}"] = {"hisa": {"block": block, "top_blocks": top, "min_context": 0}}
    for two_stage in (False, True):
        for kept in (heads // 8, heads // 4):
            misa = {"block": TOP_K // 2, "heads": kept, "min_context": 0}  # the release: 1,024 for 2,048
            misa |= {"candidates": 4 * TOP_K} if two_stage else {}
            found[f"misa, {kept} of {heads} heads" + (", two stages" if two_stage else "")] = {"misa": misa}
    return found


def main() -> None:
    """Train, change, judge; write what was found."""
    parser = argparse.ArgumentParser(description="HISA and MISA on natural text, on a small DSA model.")
    parser.add_argument("--train", default="texts/train")
    parser.add_argument("--texts", default="texts/eval")
    parser.add_argument("--family", choices=FAMILIES, default="glm_moe_dsa")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000, help="of the dense model")
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--fit-steps", type=int, default=240, help="of the indexers; half as many again at the end")
    parser.add_argument("--windows", type=int, default=16, help="held out, and to fit indexers on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.manual_seed(0)
    began = time.monotonic()
    made = config(asked.family, asked.layers, **SIZES)
    plan = base_plan(made, "benchmark")
    assert plan.dsa is not None
    draw, held = windows_of(asked.train), windows_of(asked.texts)(asked.windows, LENGTH, 77)
    fitted, checked = list(draw(asked.windows, LENGTH, 78)), list(draw(4, LENGTH, 79))
    model: Any = AutoModelForCausalLM.from_config(made).to(asked.device)
    text: dict[str, Any] = {"length": LENGTH, "batch": asked.batch, "draw": draw, "rows_of": every_row}
    systems: dict[str, Any] = {}
    with drawing() as listen:
        with seeing_all(model):
            train(model, asked.steps, 1e-3, seed=3, listen=listen, stage="train", **text)
            systems["dense"] = {"bits_per_byte": bits(model, held)}
        for number, steps in enumerate((asked.fit_steps, asked.fit_steps // 2)):
            weights, measured = train_dsa(
                model, plan, fitted, checked, rows=256, seed=0, steps=steps, lr=3e-4 if number else 1e-3, listen=listen
            )
            put_weights(model, weights)
            if not number:
                train(model, asked.steps // 10, 1e-4, seed=4, listen=listen, stage="train on what they choose", **text)
        systems["own indexers"] = {"bits_per_byte": bits(model, held)}
        for name, change in ways(plan.dsa.heads).items():
            changed: Plan = plan.edit(dsa={**plan.dsa.model_dump(), **change})
            found = choices(model, changed, list(held), listen)
            with applied(model, changed):
                systems[name] = {"bits_per_byte": bits(model, held), **{each: found[each] for each in MEASURES}}
    result = {
        "command": f"python benchmarks/text_dsa.py {shlex.join(sys.argv[1:])}".rstrip(),
        "device": device_name(model.device),
        "systems": systems,
        "kl": [measured["kl_before"], measured["kl_trained"]],
        "family": asked.family,
        "layers": asked.layers,
        "windows": asked.windows,
        "length": LENGTH,
        "top_k": TOP_K,
        "steps": asked.steps,
        "seconds": round(time.monotonic() - began),
        "versions": versions(),
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, row in systems.items():
        print(f"{name:36} " + "  ".join(f"{measure} {value:.4f}" for measure, value in row.items()))


if __name__ == "__main__":
    main()
