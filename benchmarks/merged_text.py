"""Merged tokens as text: mining, held-out cuts, round trips, speed of encoding and of prompts, badly served languages.

python benchmarks/merged_text.py -o benchmarks/results/merged-text.json      10 minutes on two cores; needs apt-get

Reads texts/eval (make texts) and two packages with translations: gnome-user-docs (40 languages) and debian-handbook.
Merges are mined on the first two thirds of a text and judged on its last quarter; what lies between is not read.
Times are processor time (mining by the clock too), speeds medians of turns taken one after the other: other work on the
machine is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from tokenizers import Tokenizer

from sparsec.calibrate.corpus import Document
from sparsec.calibrate.merges import Mined, mine_text, saved_share
from sparsec.calibrate.token_report import by_script, lost, on_text, script
from sparsec.compiler.source import load_model, load_tokenizer, open_source
from sparsec.compiler.versions import versions
from sparsec.events import Event
from sparsec.export.tokenizer import merged_tokenizer
from sparsec.plugins.device import device_name
from texts import html_text, natural, tidy

MERGES = 5000
TOKENS = 1_700_000  # that merges are mined from
ROUND_TRIP = 10_000_000  # bytes
PIECE = 20_000  # characters a text that is tried
# Those that are translated at all, in as many scripts as there are.
LANGUAGES = ("en", "fr", "ru", "el", "gu", "ta", "te", "zh_CN", "ja", "ko")
TURNS = 7


class Part:
    """A text cut in two, as mining and judging ask a calibration for it."""

    def __init__(self, name: str, text: str, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.train = [Document(name, text[: 2 * len(text) // 3])]
        self.heldout = [Document(name, text[3 * len(text) // 4 :])]

    def texts(self, split: str) -> list[Document]:
        """Of ``train`` or ``heldout``."""
        return self.train if split == "train" else self.heldout


def packages() -> dict[str, str]:
    """The text of each language of gnome-user-docs (its English is in the folder C), and of Arabic of the handbook."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for package in ("gnome-user-docs", "debian-handbook"):
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        for deb in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", deb.name, "files"], cwd=folder, check=True)
        help_ = Path(folder) / "files/usr/share/help"
        for language in LANGUAGES:
            pages = sorted((help_ / ("C" if language == "en" else language)).rglob("*.page"))
            found[language] = tidy(" ".join(ElementTree.parse(page).getroot().itertext()) for page in pages)
        handbook = Path(folder) / "files/usr/share/doc/debian-handbook/html"
        for language, name in (("ar", "ar-MA"), ("fa", "fa-IR")):
            pages = sorted((handbook / name).rglob("*.html"), key=natural)
            found[language] = tidy(html_text(page.read_text(encoding="utf-8")) for page in pages)
    # A translation that is not done is English: paragraphs of the language's own script are kept.
    for language, text in found.items():
        lines = text.splitlines()
        whole = script("\n".join(line for line in lines if not line.isascii())) if language != "en" else "Latin"
        kept = [line for line in lines if not line.strip() or whole == "Latin" or script(line) == whole]
        found[language] = tidy(["\n".join(kept)])
    return found


def mined_on(name: str, text: str, tokenizer: Any, counts: Sequence[int], first: int) -> tuple[Mined, dict[str, Any]]:
    """Merges of a text, and what they save of its held-out part, by how many there are."""
    part: Any = Part(name, text, tokenizer)
    clocks = [(time.perf_counter(), time.process_time())]
    began = clocks[0]

    def listen(event: Event) -> None:  # the first comes when the text is read, the last when the merges are found
        clocks.append((time.perf_counter(), time.process_time()))

    mined = mine_text(part, max(counts), first=first, listen=listen)
    spent = {
        "reading_seconds": clocks[1][1] - began[1],
        "mining_seconds": clocks[-1][1] - clocks[1][1],
        "clock_seconds": clocks[-1][0] - began[0],
    }
    held = [one.text for one in part.heldout]
    cuts = {}
    for count in counts:
        kept = Mined(mined.base, mined.boundary, first, mined.merges[:count], mined.saved[:count], mined.tokens)
        cuts[str(count)] = saved_share(kept, tokenizer, held)
    return mined, {"mined_from": mined.tokens, "merges": len(mined.merges), **spent, "heldout": cuts}


def turns(ways: Sequence[Callable[[], Any]], count: int = TURNS) -> list[float]:
    """Median processor seconds of each way, taken in turns after one of each that does not count."""
    spent: list[list[float]] = [[] for _ in ways]
    for turn in range(count + 1):
        for way, times in zip(ways, spent, strict=True):
            began = time.process_time()
            way()
            if turn:
                times.append(time.process_time() - began)
    return [statistics.median(times) for times in spent]


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    source = open_source("demo", cache_dir=Path(os.environ.get("SPARSEC_CACHE", "~/.cache/sparsec")))
    tokenizer = load_tokenizer(source)
    first = len(tokenizer)
    texts = Path(options.texts)
    domains = {
        name: (texts / f"eval/{name}.txt").read_text(encoding="utf-8") for name in ("anarchism", "debian-handbook")
    }
    result: dict[str, Any] = {"device": device_name(torch.device("cpu")), "versions": versions(), "domains": {}}
    # As much of the largest text as the bar names; its train part is two thirds.
    ids = tokenizer(domains["anarchism"], verbose=False)["input_ids"]
    domains["anarchism"] = tokenizer.decode(ids[: 3 * TOKENS // 2])
    made: dict[str, Mined] = {}
    for name, text in domains.items():
        made[name], found = mined_on(name, text, tokenizer, (1000, 1500, MERGES), first)
        result["domains"][name] = found
        print(name, found, flush=True)
    mined = made["anarchism"]
    own = Tokenizer.from_str(json.dumps(mined.base.description))
    merged = Tokenizer.from_str(json.dumps(merged_tokenizer(mined.base, mined.merges, mined.boundary)))
    languages = packages()
    result["languages"] = {}
    for language, text in languages.items():
        lines = text.splitlines()
        blocks = ["\n".join(lines[at : at + 50]) for at in range(0, len(lines), 50)]
        result["languages"][language] = on_text(own, blocks, first) | {"script": script(text)}
    worst = min(result["languages"], key=lambda each: result["languages"][each]["characters_a_token"])
    for language in dict.fromkeys((worst, "ru", "ja", "ko")):
        merges, found = mined_on(language, languages[language], tokenizer, (1000, MERGES), first)
        result["languages"][language]["merged"] = found
        made[language] = merges
        print(language, found, flush=True)
    result["worst"] = worst
    everything = [text[at : at + PIECE] for text in languages.values() for at in range(0, len(text), PIECE)]
    size = sum(len(text.encode()) for text in everything)
    everything += [domains["anarchism"][at : at + PIECE] for at in range(0, max(0, ROUND_TRIP - size), PIECE)]
    result["round_trip"] = {
        "bytes": sum(len(text.encode()) for text in everything),
        "scripts": list(by_script(everything)),
        "texts": len(everything),
        "lost_before": lost(own, everything),
        "lost_after": {},
        "differ_from_before": {},
    }
    back = own.decode_batch([each.ids for each in own.encode_batch(everything)], skip_special_tokens=False)
    for name in ("anarchism", worst):
        other = Tokenizer.from_str(json.dumps(merged_tokenizer(made[name].base, made[name].merges, "phrase")))
        ids = [each.ids for each in other.encode_batch(everything)]
        again = other.decode_batch(ids, skip_special_tokens=False)
        result["round_trip"]["lost_after"][name] = lost(other, everything)
        result["round_trip"]["differ_from_before"][name] = sum(a != b for a, b in zip(back, again, strict=True))
    print(result["round_trip"], flush=True)
    held = [domains["anarchism"][-2_000_000:][at : at + PIECE] for at in range(0, 2_000_000, PIECE)]
    plain, wide = turns([lambda: [own.encode(text) for text in held], lambda: [merged.encode(text) for text in held]])
    result["encoding"] = {"base_seconds": plain, "merged_seconds": wide, "speed": plain / wide, "characters": 2_000_000}
    print(result["encoding"], flush=True)
    result["prompt"] = prompt_times(source, tokenizer, mined, domains["anarchism"], options.length)
    print(result["prompt"], flush=True)
    result["command"] = " ".join(["python", "benchmarks/merged_text.py", *sys.argv[1:]])
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


@torch.no_grad()
def prompt_times(source: Any, tokenizer: Any, mined: Mined, text: str, length: int) -> dict[str, float]:
    """A prompt of ``length`` base tokens and the same text merged, read by the base model: positions and time.

    The time of a forward does not depend on what the embeddings say, so the merged prompt reads rows that are there.
    """
    model = load_model(source, device="cpu", dtype="float32")
    ids = tokenizer(text[-400_000:], verbose=False)["input_ids"][:length]
    merger, pieces = mined.merger()
    shorter = len(merger(ids, pieces(ids))[0])
    prompts = [torch.tensor([ids]), torch.tensor([ids[:shorter]])]

    def read(prompt: torch.Tensor) -> Callable[[], Any]:
        return lambda: model(input_ids=prompt, use_cache=False, logits_to_keep=1)

    plain, merged = turns([read(prompt) for prompt in prompts], 3)
    return {
        "base_positions": length,
        "merged_positions": shorter,
        "positions": shorter / length,
        "base_seconds": plain,
        "merged_seconds": merged,
        "time": merged / plain,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merged tokens as text.")
    parser.add_argument("--texts", default="texts", help="what make texts wrote")
    parser.add_argument("--length", type=int, default=1024, help="base tokens of the prompt that is timed")
    parser.add_argument("-o", dest="out", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
