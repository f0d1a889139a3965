"""Trains a small model with indexers of its own (DSA) on recall, so that its indexers have something to lose.

    python benchmarks/tiny_dsa.py OUT [--family glm_moe_dsa] [--layers 24] [--device cuda]

Writes OUT/model (a checkpoint) and OUT/text (JSON lines, to compile and to judge with). A document states values of
keys and asks for them, ``k17=v3 k5=v9 k17? v3 ...``: who finds the statement, however far back, can tell the answer.
Trained as DeepSeek-V3.2-Exp was: the model dense; the indexers alone on its attention; the model on what they choose,
and the indexers again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV32Config, GlmMoeDsaConfig, PreTrainedTokenizerFast

from sparsec.calibrate.dsa_fit import train_dsa
from sparsec.calibrate.trainable import put_weights
from sparsec.compiler.draw import drawing
from sparsec.events import Event, Listener
from sparsec.plugins.families import attention_modules, base_plan

KEYS, VALUES, IN_DOCUMENT = 64, 16, 48  # of each kind, keys of a document
STATED, ASKED, SAID = 3, 3 + KEYS * VALUES, 3 + KEYS * VALUES + KEYS  # where the words of a kind begin
WORDS = [
    *("<pad>", "<s>", "</s>"),
    *(f"k{key}=v{value}" for key in range(KEYS) for value in range(VALUES)),
    *(f"k{key}?" for key in range(KEYS)),
    *(f"v{value}" for value in range(VALUES)),
]
LENGTH, TOP_K = 1024, 32
SMALL = 2  # layers of the model that is grown
ENOUGH = 0.02  # nats: what can be known is known
FAMILIES = {"glm_moe_dsa": GlmMoeDsaConfig, "deepseek_v32": DeepseekV32Config}


def documents(count: int, length: int, seed: int) -> Tensor:
    """int64 [count, length], word numbers: a key's first event states its value, every later one asks and answers."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :IN_DOCUMENT]
    values = torch.randint(VALUES, (count, IN_DOCUMENT), generator=generator)
    drawn = torch.randint(IN_DOCUMENT, (count, length), generator=generator)
    key, value = keys.gather(1, drawn), values.gather(1, drawn)
    order = torch.arange(length).expand(count, -1)
    first = torch.full((count, IN_DOCUMENT), length).scatter_reduce(1, drawn, order, "amin").gather(1, drawn) == order
    at = torch.where(first, 1, 2).cumsum(1) - torch.where(first, 1, 2)  # where an event's first word stands
    out = torch.zeros(count, 2 * length + 1, dtype=torch.long)
    out.scatter_(1, at, torch.where(first, STATED + key * VALUES + value, ASKED + key))
    out.scatter_(1, torch.where(first, 2 * length, at + 1), SAID + value)
    return out[:, :length]


def known(tokens: Tensor) -> Tensor:
    """bool [count, length - 1]: rows that ask, whose next token is a value that was stated before."""
    return ((tokens >= ASKED) & (tokens < SAID))[:, :-1]


@torch.no_grad()
def accuracy(model: Any, tokens: Tensor) -> float:
    """Share of values stated before that the model names."""
    right = total = 0
    for part in torch.split(tokens, 4):
        found = model(input_ids=part.to(model.device)).logits[:, :-1].argmax(-1).cpu()
        rows = known(part)
        right += int((found == part[:, 1:])[rows].sum())
        total += int(rows.sum())
    return right / total


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def config(family: str, layers: int, **changes: Any) -> Any:
    """Dense MLPs: experts say nothing about indexers. changes: other sizes."""
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS), "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": layers,
        "first_k_dense_replace": layers, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 2,
        "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 64, "q_lora_rank": 64,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "index_head_dim": 32, "index_n_heads": 8,
        "index_topk": TOP_K, "max_position_embeddings": 2 * LENGTH, "pad_token_id": 0, "bos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "eos_token_id": 2,
        "initializer_range": 0.02,
    }  # fmt: skip
    return FAMILIES[family](**sizes | changes)


@torch.no_grad()
def grown(small: Any, family: str, layers: int) -> Any:
    """A deeper model out of a trained small one: its layers repeated, each copy adding its share of what it added.

    Deep models this narrow hardly learn recall from nothing. Grown, all layers take part, as in real models.
    """
    depth = small.config.num_hidden_layers
    deep: Any = AutoModelForCausalLM.from_config(config(family, layers)).to(small.device)
    given, state = small.state_dict(), deep.state_dict()
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) * depth // layers)
        found = given[".".join(parts)]
        share = depth / layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        tensor.copy_(found * share)
    return deep


@contextmanager
def seeing_all(model: Any) -> Iterator[None]:
    """Inside the block indexers choose every token, without being asked."""

    def every(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.arange(hidden.shape[1], device=hidden.device).int().expand(*hidden.shape[:2], -1)

    indexers = [module.indexer for module in attention_modules(model)]
    for indexer in indexers:
        object.__setattr__(indexer, "forward", every)
    try:
        yield
    finally:
        for indexer in indexers:
            indexer.__dict__.pop("forward")


def train(
    model: Any,
    steps: int,
    lr: float,
    batch: int,
    length: int,
    seed: int,
    listen: Listener,
    stage: str,
    draw: Callable[[int, int, int], Tensor] = documents,
    rows_of: Callable[[Tensor], Tensor] = known,
) -> None:
    """Next values that can be known, with the indexers as they are; the first windows are shorter (a curriculum).

    draw: (count, length, seed) -> ids [count, length]; rows_of: bool [count, length - 1] of them, rows that count.
    """
    own = [w for name, w in model.named_parameters() if ".indexer." not in name]
    for weight in own:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(own, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=model.device.type == "cuda")
    recent: list[float] = []
    for step in range(steps):
        size = min(length, 128 << (4 * step // max(1, steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (0.05 * steps)) * (1 - 0.9 * step / steps)
        tokens = draw(max(1, batch * length // size), size, seed * 1_000_003 + step)
        rows = rows_of(tokens)
        tokens = tokens.to(model.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
            hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[rows.to(hidden.device)]).float()
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:][rows.to(tokens.device)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        if step % 25 == 0:
            recent.append(loss.item())
            listen(Event(stage, step + 1, steps, f"{size} tokens, loss {recent[-1]:.3f}"))
            if size == length and len(recent) > 3 and max(recent[-3:]) < ENOUGH:
                break
    model.requires_grad_(False)


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description="Train a small DSA model on recall.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="glm_moe_dsa")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument(
        "--steps", type=int, default=400, help="of the small model at most; the grown one takes a quarter"
    )
    parser.add_argument("--batch", type=int, default=4, help="documents a step")
    parser.add_argument("--windows", type=int, default=16, help="that the indexers are trained on")
    parser.add_argument("--fit-steps", type=int, default=120, help="of the indexers; half as many again at the end")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.manual_seed(0)
    began = time.monotonic()
    plan, held = base_plan(config(asked.family, asked.layers), "benchmark"), documents(16, LENGTH, 1)
    said: dict[str, Any] = {}
    windows = [documents(1, LENGTH, 2 + number)[0] for number in range(asked.windows)]
    fit: dict[str, Any] = {"rows": 256, "seed": 0}
    with drawing() as listen:
        small: Any = AutoModelForCausalLM.from_config(config(asked.family, SMALL)).to(asked.device)
        with seeing_all(small):
            train(small, asked.steps, 3e-3, 12 * asked.batch, 96, 3, listen, "train small")
        model = grown(small, asked.family, asked.layers)
        with seeing_all(model):
            train(model, asked.steps // 4, 1e-3, asked.batch, LENGTH, 6, listen, "train")
            said["dense"] = accuracy(model, held)
        listen(Event("train", note=f"dense names {said['dense']:.1%}"))
        said["indexers untrained"] = accuracy(model, held)
        for stage, steps in (("indexers", asked.fit_steps), ("indexers again", asked.fit_steps // 2)):
            weights, measured = train_dsa(
                model, plan, windows, list(held[:4]), steps=steps, lr=1e-3 if stage == "indexers" else 3e-4,
                listen=listen, **fit,
            )  # fmt: skip
            put_weights(model, weights)
            said[stage] = accuracy(model, held)
            said[f"{stage}, nats"] = [measured["kl_before"], measured["kl_trained"]]
            if stage == "indexers":
                train(model, asked.steps // 20, 1e-4, asked.batch, LENGTH, 4, listen, "train on what they choose")
                said["model on what they choose"] = accuracy(model, held)
    said["seconds"] = round(time.monotonic() - began)
    model.float().save_pretrained(asked.out / "model", max_shard_size="12MB")
    tokenizer().save_pretrained(asked.out / "model")
    text = asked.out / "text"
    text.mkdir(exist_ok=True)
    lines = [json.dumps({"text": " ".join(WORDS[token] for token in row)}) for row in documents(160, LENGTH + 64, 5)]
    (text / "recall.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (asked.out / "training.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
