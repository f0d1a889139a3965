"""``sparsec generate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsec.compiler.commands.options import device_options, kernels_option
from sparsec.errors import UsageError

if TYPE_CHECKING:
    from sparsec.plugins.kernels.support import Kernels

ENGINE = "PyTorch, or ONNX Runtime with what sparsec export wrote."


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--dense", is_flag=True, help="Run the artifact's base weights without the plan.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--engine", default="pytorch", show_default=True, type=click.Choice(["pytorch", "onnx"]), help=ENGINE)
@kernels_option
@device_options
@click.option("--json", "as_json", is_flag=True, help="Text and counts as JSON.")
def generate(
    artifact: Path,
    prompt: str | None,
    max_new_tokens: int,
    dense: bool,
    raw: bool,
    engine: str,
    kernels: Kernels,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Answer PROMPT (standard input where it is left out) with ARTIFACT, greedily, tokens as they come."""
    from sparsec.compiler.answer import answer

    try:
        text = sys.stdin.read() if prompt is None else prompt
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text ({error}): give the prompt in UTF-8") from None
    if not text.strip():
        raise UsageError("the prompt is empty: give it as an argument or on standard input")
    if engine == "onnx":
        from sparsec.compiler.answer_onnx import answer_onnx

        if dense or kernels != "auto" or dtype != "auto":
            raise UsageError("--engine onnx runs the graphs as exported: leave --dense, --kernels and --dtype out")
        found = answer_onnx(
            artifact, text, max_new_tokens=max_new_tokens, chat=not raw, device=device, stream=not as_json
        )
        if as_json:
            click.echo(json.dumps(found, indent=2))
        return
    found = answer(
        artifact,
        text,
        max_new_tokens=max_new_tokens,
        dense=dense,
        chat=not raw,
        device=device,
        dtype=dtype,
        kernels=kernels,
        stream=not as_json,
    )
    if as_json:
        click.echo(json.dumps(found, indent=2))
