"""Asks an artifact for numbers hidden in long texts, with the plan and without it, side by side.

    python benchmarks/ask.py out/demo

The texts are held-out parts of what the artifact was calibrated on; the numbers are random, so only reading finds them.
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
    parser = argparse.ArgumentParser(description="Ask an artifact questions about long texts, sparse and dense.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--length", type=int, default=3000, help="tokens of a prompt (default: 3000)")
    parser.add_argument("--questions", type=int, default=4, help="each about a text of its own (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of texts and numbers (default: 0)")
    options = parser.parse_args()
    try:
        print(asked(options.artifact, options.length, options.questions, options.seed))
    except sparsec.SparsecError as error:
        sys.exit(f"ask: {error}")


def asked(artifact: Path, length: int, questions: int, seed: int) -> str:
    """Both models' answers, what they cost in memory, and where the report is."""
    model, tokenizer = sparsec.load(artifact)
    recipe, window = read_json(artifact / MANIFEST)["recipe"], model.sparsec_plan.window
    calibration = Calibration(read_corpus(recipe["calibration"]), tokenizer, seed=recipe["seed"])
    gap = None if window is None else window.size + window.sinks
    asking = prompts("kv", calibration, length=length, count=questions, seed=seed, gap=gap)
    texts = [tokenizer.decode(prompt.tokens, clean_up_tokenization_spaces=False) for prompt in asking]
    # Sparse first: asking the dense model takes the plan off.
    answers: dict[bool, list[dict[str, Any]]] = {
        dense: [
            respond(
                model,
                tokenizer,
                text,
                dense=dense,
                max_new_tokens=len(prompt.answer) + 2,
                chat=False,
                stream=False,
            )
            for text, prompt in zip(texts, asking, strict=True)
        ]
        for dense in (False, True)
    }
    rows = [
        [
            f"{text.strip().rpartition(chr(10))[2]} ...",
            prompt.answer,
            percent(prompt.depth or 0, 0),
            *(answers[dense][number]["text"].strip().partition("\n")[0] for dense in (True, False)),
        ]
        for number, (text, prompt) in enumerate(zip(texts, asking, strict=True))
    ]
    found = {
        dense: sum(prompt.answer in one["text"] for prompt, one in zip(asking, given, strict=True))
        for dense, given in answers.items()
    }
    held = {dense: max(one["kv_bytes"] for one in given) for dense, given in answers.items()}
    return "\n".join(
        [
            f"{questions} texts of {count(answers[True][0]['prompt_tokens'])} tokens, {calibration.corpus.made_of}, "
            "a random number hidden in each",
            "",
            table(["question", "expected", "stated at", "dense", "sparse"], rows),
            "",
            f"found     {found[True]} dense, {found[False]} sparse",
            f"KV cache  {size(held[True])} dense, {size(held[False])} sparse",
            f"report    {artifact / REPORT}",
        ]
    )


if __name__ == "__main__":
    main()
