"""An artifact with merged tokens in real vLLM on a CPU: does it write what stock Transformers writes?

python benchmarks/vllm_merged.py ARTIFACT -o benchmarks/results/vllm-merged.json

In an environment of its own, with vLLM and without sparsec: both engines open the artifact as an ordinary model with
its own tokenizer. Greedy text of a few prompts is compared token by token. Run with VLLM_CPU_KVCACHE_SPACE=2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

PROMPTS = (
    "The function returns the value of the",
    "In the following example, the name of the class is",
    "If the argument is not a string, a TypeError",
    "The capital of France is",
)


def main() -> int:
    options = _options()
    import torch
    import transformers
    import vllm

    config = json.loads((Path(options.artifact) / "config.json").read_text(encoding="utf-8"))
    own = config["sparsec_config"]["vocabulary"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.artifact)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    stock = transformers.AutoModelForCausalLM.from_pretrained(options.artifact, dtype=getattr(torch, options.dtype))
    expected = []
    for ids in prompts:
        out = stock.generate(
            torch.tensor([ids]), max_new_tokens=options.tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        expected.append(out[0, len(ids) :].tolist())
    del stock
    engine = vllm.LLM(
        options.artifact, max_model_len=1024, dtype=options.dtype, enforce_eager=True, generation_config="vllm", seed=0
    )
    settings = vllm.SamplingParams(temperature=0.0, max_tokens=options.tokens)
    found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings)
    read = engine.generate(list(PROMPTS), settings)
    rows, pieces = [], _pieces(Path(options.artifact), own["base"])
    for prompt, ids, theirs, one, other in zip(PROMPTS, prompts, expected, found, read, strict=True):
        ours = list(one.outputs[0].token_ids)
        if list(other.prompt_token_ids) != ids:
            raise SystemExit(f"vLLM reads {prompt!r} as other tokens than Transformers")
        same = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        merged = [token for token in ids if token >= own["base"]]
        row = {
            "prompt": prompt,
            "positions": len(ids),
            "merged_positions": len(merged),
            "base_positions": len(ids) + sum(pieces(token) - 1 for token in merged),
            "tokens": len(theirs),
            "same": same if same is not None else min(len(ours), len(theirs)),
            "wrote_merged": sum(token >= own["base"] for token in ours),
            "text": one.outputs[0].text,
        }
        rows.append(row)
        print(row, flush=True)
    result = {
        "rows": rows,
        "merged": own["merged"],
        "write": own.get("write", "base"),
        "dtype": options.dtype,
        "vllm": vllm.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "command": f"python benchmarks/vllm_merged.py ARTIFACT -o {options.out}",
    }
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    whole = all(row["same"] == row["tokens"] for row in rows)
    return 0 if whole and not any(row["wrote_merged"] for row in rows) else 1


def _pieces(artifact: Path, base: int) -> Callable[[int], int]:
    """Counts the base tokens of a token."""
    model = json.loads((artifact / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = {model["vocab"]["".join(pair)]: pair for pair in model["merges"]}

    def count(number: int) -> int:
        return 1 if number < base else sum(count(model["vocab"][part]) for part in merges[number])

    return count


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An artifact with merged tokens in vLLM and in stock Transformers.")
    parser.add_argument("artifact")
    parser.add_argument("-o", dest="out", default="")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
