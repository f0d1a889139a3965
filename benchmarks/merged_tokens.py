"""Merged tokens on the demo model: what prompts lose in length and text in quality, by how embeddings are predicted.

python benchmarks/merged_tokens.py --text FILE -o FILE.json      10 minutes on an H100
python benchmarks/merged_tokens.py --text texts/eval/anarchism.txt --device cpu --merges 1500 --length 768 --windows 6 \
    --recalled 6 --asked 0 --imitation-steps 200 --steps 60 --batch 4 --context 256 --train-windows 400 \
    --held-windows 8 --depth 8 -o benchmarks/results/merged-minutes.json      the tier minutes, 30 on a CPU

Two thirds of the text train, the rest is split for choosing and for measuring; no part is in two. Every system reads
the same windows: a prompt, merged or not, and decode rows in base tokens behind it, whose bits per byte are compared.
``oldest dropped`` reads the unmerged prompt's last tokens, as many as the merged prompt has. Where far text matters:
``recalled`` rows are the prompt's own beginning once more, and questions (kv) hide what is asked for anywhere in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sparsec.calibrate.corpus import Corpus, Document
from sparsec.calibrate.hypernetwork import imitate, new_hypernetwork
from sparsec.calibrate.merged_distillation import Rows, Settings, as_windows, distil
from sparsec.calibrate.merged_embeddings import estimate
from sparsec.calibrate.merges import Mined, mine_text, saved_share
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import prompts, share_found
from sparsec.compiler.source import load_model, load_tokenizer, open_source
from sparsec.compiler.versions import versions
from sparsec.plugins.device import device_name
from sparsec.plugins.hypernetwork import Pieces, embeddings

PART = 60_000  # characters a document: one book alone could not be split
ROWS = 256  # decode rows of a window of ordinary text
RECALLED = 128  # decode rows that repeat the beginning of their prompt: dropping a fifth of 640 tokens drops them


class Exam:
    """Windows and questions, and what a system makes of them."""

    def __init__(self, model: Any, calibration: Calibration, mined: Mined, options: argparse.Namespace) -> None:
        self.model, self.tokenizer = model, calibration.tokenizer
        length, windows, recalled = options.length, options.windows, options.recalled
        every = calibration.windows("heldout", length, windows + recalled, seed=1)
        self.text = [(window[:-ROWS], window[-ROWS:]) for window in every[:windows]]
        self.recalled = [(window[:-RECALLED], window[:RECALLED]) for window in every[windows:]]
        self.asked = prompts("kv", calibration, length=length, count=options.asked, seed=1) if options.asked else []
        self.merger, self.pieces = mined.merger()

    @torch.no_grad()
    def take(self, table: torch.Tensor | None, *, drop: bool = False) -> dict[str, Any]:
        """Bits per byte of both kinds of windows, of each window too, and the share of questions answered.

        table: base and merged rows; None reads base tokens. drop: base tokens, as many as merged ones, the last.
        """
        made: dict[str, Any] = {}
        for name, windows in (("text", self.text), ("recalled", self.recalled)):
            read = [self._read(prompt, rows, table, drop) for prompt, rows in windows]
            if read:
                bits, size, positions = (sum(part) for part in zip(*read, strict=True))
                made[name] = {
                    "bits_per_byte": bits / size,
                    "positions": positions,
                    "windows": [one[0] / one[1] for one in read],
                }
        found = []
        for one in self.asked:
            inputs = self._prompt(one.tokens, table, drop)[None]
            mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
            out = self.model.generate(
                inputs_embeds=inputs, attention_mask=mask, max_new_tokens=one.budget, do_sample=False, pad_token_id=0
            )
            found.append(share_found(self.tokenizer.decode(out[0], skip_special_tokens=True), one.answers))
        return made | ({"answered": sum(found) / len(found)} if found else {})

    def _read(
        self, prompt: torch.Tensor, rows: torch.Tensor, table: torch.Tensor | None, drop: bool
    ) -> tuple[float, int, int]:
        """Bits of the rows behind the first, their bytes, and the positions of the prompt."""
        before = self._prompt(prompt, table, drop)
        inputs = torch.cat([before, self._own(rows)])
        logits = self.model(inputs_embeds=inputs[None], logits_to_keep=len(rows), use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), rows[1:].to(logits.device), reduction="sum")
        return float(loss) / math.log(2), len(self.tokenizer.decode(rows[1:]).encode()), len(before)

    def _own(self, ids: torch.Tensor) -> torch.Tensor:
        table: torch.Tensor = self.model.get_input_embeddings().weight
        return table[ids.to(table.device)]

    def _prompt(self, ids: torch.Tensor, table: torch.Tensor | None, drop: bool) -> torch.Tensor:
        if table is None and not drop:
            return self._own(ids)
        merged, _ = self.merger(ids.tolist(), self.pieces(ids.tolist()))
        if table is None:
            return self._own(ids[len(ids) - len(merged) :])
        return table[torch.tensor(merged, device=table.device)]


def main() -> int:
    options = _options()
    began = time.time()
    source = open_source("demo", cache_dir=Path(os.environ.get("SPARSEC_CACHE", "~/.cache/sparsec")))
    model, tokenizer = load_model(source, device=options.device, dtype="float32"), load_tokenizer(source)
    text = Path(options.text).read_text(encoding="utf-8")[: options.characters]
    parts = tuple(Document(f"part {at // PART}", text[at : at + PART]) for at in range(0, len(text), PART))
    calibration = Calibration(Corpus(Path(options.text).name, parts), tokenizer, shares=(0.66, 0.17, 0.17))
    table, head, tied = embeddings(model)
    started = time.time()
    mined = mine_text(calibration, options.merges, first=len(table), boundary=options.boundary)
    mining = time.time() - started
    saved = saved_share(mined, tokenizer, [one.text for one in calibration.texts("heldout")])
    exam = Exam(model, calibration, mined, options)
    size = mined.base.bytes_of
    lengths = [[len(size[part] or b"") for part in parts] for parts in mined.constituents]

    def whole(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([table, rows.to(table)])

    found: dict[str, Any] = {}
    result: dict[str, Any] = {
        "systems": found,
        "merges": len(mined.merges),
        "boundary": options.boundary,
        "heldout": saved,
        "mined_from": mined.tokens,
        "mining_seconds": mining,
        "options": vars(options) | {"text": Path(options.text).name, "out": Path(options.out).name},
        "device": device_name(torch.device(options.device)),
        "versions": versions(),
        "command": " ".join(["python", "benchmarks/merged_tokens.py", *sys.argv[1:]]),
    }
    found |= _measured(Path(options.out), result)
    if not found:
        found |= {"unmerged": exam.take(None), "oldest dropped": exam.take(None, drop=True)}
        print(found, flush=True)
        for kind in ("mean", "local", "global", "hybrid"):
            found[kind] = exam.take(whole(estimate(kind, table, mined.constituents, lengths)))
            print(kind, found[kind], flush=True)
    merger, pieces = mined.merger()
    for seed in range(options.seeds):
        if f"hypernetwork, distilled, seed {seed}" in found:
            continue
        network = new_hypernetwork(model, seed)
        imitated = imitate(network, model, mined.base, steps=options.imitation_steps, seed=seed)
        rows = Rows(network, Pieces(mined.constituents, table, head, tied), len(mined.merges), table.shape[1])
        found[f"hypernetwork, imitation, seed {seed}"] = exam.take(whole(rows.all())) | dict(imitated)
        train, held = (
            as_windows(
                calibration.windows(
                    split, options.context, min(most, calibration.available(split, options.context)), seed=seed
                ),
                merger,
                pieces,
            )
            for split, most in (("train", options.train_windows), ("search", options.held_windows))
        )
        settings = Settings(options.steps, options.batch, 5e-4, 3e-3, options.depth, seed)
        outcome = distil(model, rows, len(table), train, held, settings)
        name = f"hypernetwork, distilled, seed {seed}"
        found[name] = exam.take(whole(rows.all())) | {"checks": outcome["checks"]}
        print(name, found[name], flush=True)
        result["seconds"] = time.time() - began
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _measured(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Systems of an earlier run of the same settings, device and versions, which this one goes on from."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    same = all(before.get(name) == result[name] for name in ("merges", "heldout", "device", "versions"))
    if not same or before["options"] | {"seeds": 0} != result["options"] | {"seeds": 0}:
        return {}
    return dict(before["systems"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merged tokens on the demo model.")
    parser.add_argument("--text", required=True)
    parser.add_argument("-o", dest="out", required=True, help="a run of fewer seeds that is there goes on")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--boundary", default="phrase")
    for name, default in (
        ("characters", 6_000_000),
        ("merges", 5000),
        ("length", 2048),
        ("windows", 24),
        ("recalled", 24),
        ("asked", 50),
        ("seeds", 3),
        ("imitation-steps", 1000),
        ("steps", 600),
        ("batch", 16),
        ("context", 512),
        ("train-windows", 4000),
        ("held-windows", 32),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--depth", type=int, default=None, help="layers behind which both are compared; default: all")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
