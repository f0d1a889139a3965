"""Asks an artifact for a number hidden in a long text, with the plan and without it, side by side.

    python benchmarks/ask.py out/demo

The text is the held-out part of what the artifact was calibrated on; the number is random, so only reading finds it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import sparsec
from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import prompts
from sparsec.compiler.answer import respond
from sparsec.compiler.explain import table
from sparsec.export.words import count, percent, size
from sparsec.layout import MANIFEST, REPORT, read_json


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Ask an artifact a question about a long text, sparse and dense.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--length", type=int, default=3000, help="tokens of the prompt (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the text and the number (default: 0)")
    options = parser.parse_args()
    try:
        print(asked(options.artifact, options.length, options.seed))
    except sparsec.SparsecError as error:
        sys.exit(f"ask: {error}")


def asked(artifact: Path, length: int, seed: int) -> str:
    """Both answers, what they cost in memory, and where the report is."""
    model, tokenizer = sparsec.load(artifact)
    recipe, window = read_json(artifact / MANIFEST)["recipe"], model.sparsec_plan.window
    calibration = Calibration(read_corpus(recipe["calibration"]), tokenizer, seed=recipe["seed"])
    gap = None if window is None else window.size + window.sinks
    [prompt] = prompts("kv", calibration, length=length, count=1, seed=seed, gap=gap)
    text = tokenizer.decode(prompt.tokens, clean_up_tokenization_spaces=False)
    asking: dict[str, Any] = {"max_new_tokens": len(prompt.answer) + 2, "chat": False, "stream": False}
    # Sparse first: asking the dense model takes the plan off.
    sparse, dense = (respond(model, tokenizer, text, dense=off, **asking) for off in (False, True))
    question = text.strip().rpartition("\n")[2]
    return "\n".join(
        [
            f"text      {calibration.corpus.made_of}, {count(sparse['prompt_tokens'])} tokens",
            f"question  {question} ...",
            f"expected  {prompt.answer} (stated {percent(prompt.depth or 0, 0)} into the text)",
            "",
            table(
                ["", "dense", "sparse"],
                [
                    ["answer", *(each["text"].strip().partition("\n")[0] for each in (dense, sparse))],
                    ["prompt tokens", *(count(each["prompt_tokens"]) for each in (dense, sparse))],
                    ["KV cache resident", *(size(each["kv_bytes"]) for each in (dense, sparse))],
                ],
            ),
            "",
            f"report    {artifact / REPORT}",
        ]
    )


if __name__ == "__main__":
    main()
