"""``sparsec export``: an artifact for another runtime, or its plan in another engine's words."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsec.compiler.commands.options import HELP, names
from sparsec.compiler.exports import RUNTIMES
from sparsec.errors import UsageError

if TYPE_CHECKING:
    from sparsec.export.tensorrt import Flavour

TRT = "Flavour of TensorRT: for RTX GPUs, built without one, or for data-centre GPUs, built on one."


@click.command("export")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, help=f"{', '.join(RUNTIMES)} (or both); or {HELP['to']}")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Another engine's words: a new folder.")
@click.option("--dtype", default="float32", show_default=True, help="Of graphs: float32, float16 or bfloat16.")
@click.option("--trt", default="auto", show_default=True, type=click.Choice(["auto", "rtx", "tensorrt"]), help=TRT)
@click.option("--slots", default=2048, show_default=True, type=click.IntRange(min=16), help="TensorRT: tokens held.")
@click.option(
    "--plugins/--no-plugins",
    default=None,
    help="TensorRT: decode attention by Triton's kernels; not with RTX by default.",
)
@click.option(
    "--trt-option",
    "trt_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="TensorRT, repeatable: refit, strip, version-compatible, hardware-compatible, timing-cache=FILE, "
    "batch=LEAST,USUAL,MOST, rows=LEAST,USUAL,MOST, capabilities=80,86,...",
)
@click.option("--json", "as_json", is_flag=True, help="The manifests of graphs and engines as JSON.")
def export_command(
    artifact: Path,
    target: str,
    out: Path | None,
    dtype: str,
    trt: Flavour,
    slots: int,
    plugins: bool | None,
    trt_options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write graphs or engines into ARTIFACT, or its head split or sharing pattern as another engine reads it."""
    from sparsec.export.dialects import DIALECTS

    writers = {name: each.encode for name, each in DIALECTS.items() if each.encode is not None}
    encode = writers.get(target)
    if encode is None:
        from sparsec.compiler.exports import export, export_text

        targets = names("--to", target, [*RUNTIMES, *writers])
        if mixed := [name for name in targets if name in writers]:
            raise UsageError(f"--to {target}: {mixed[0]} is written by itself, with -o")
        if out is not None:
            raise UsageError(f"--to {target} writes into the artifact: leave -o out")
        build = None
        if trt_options:
            from sparsec.export.tensorrt_options import parse

            if "tensorrt" not in targets:
                raise UsageError(f"--trt-option says how engines are built, --to {target} builds none: leave it")
            build = parse(trt_options)
        began = time.monotonic()
        made = export(artifact, targets, dtype=dtype, trt=trt, slots=slots, plugins=plugins, build=build)
        click.echo(json.dumps(made, indent=2) if as_json else export_text(artifact, made, time.monotonic() - began))
        return
    from sparsec.export.dialects.files import write_files
    from sparsec.layout import read_plan

    if trt_options:
        raise UsageError(f"--trt-option says how engines are built, --to {target} builds none: leave it")
    if out is None:
        raise UsageError(f"--to {target} writes a folder: name it with -o")
    write_files(out, encode(read_plan(artifact)))
    click.echo(f"{out}: read by {DIALECTS[target].engine}")
