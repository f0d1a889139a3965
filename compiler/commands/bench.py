"""``sparsec bench``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsec.compiler.commands.options import HELP, check_place, device_options, kernels_option, numbers
from sparsec.errors import UsageError

if TYPE_CHECKING:
    from sparsec.plugins.kernels.support import Kernels


@click.command("bench")
@click.argument("artifact", type=click.Path(path_type=Path), required=False)
@click.option("--shape", type=click.Path(path_type=Path), help=HELP["shape"])
@click.option(
    "--ratio", default=0.15, show_default=True, type=click.FloatRange(0, 1), help="Of --shape: retrieval heads."
)
@click.option("--window", default=8192, show_default=True, type=click.IntRange(min=1), help="Of --shape: tokens.")
@click.option(
    "--rate",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Of --shape: blocks kept.",
)
@click.option(
    "--prefill", default="dense", show_default=True, type=click.Choice(["dense", "selector"]), help="Of --shape."
)
@click.option(
    "--granularity",
    default="query_head",
    show_default=True,
    type=click.Choice(["query_head", "kv_head"]),
    help="Of --shape: what is a retrieval head or a local one.",
)
@click.option(
    "--vote-every",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Of --shape and --prefill selector: of so many prompt rows one chooses blocks.",
)
@click.option(
    "--index-dtype",
    default="model",
    show_default=True,
    type=click.Choice(["model", "fp8"]),
    help="Of --shape: projected keys in the cache.",
)
@click.option(
    "--coarse-from",
    default=None,
    type=click.IntRange(min=0),
    help="Of --shape: contexts from which on tokens are scored in one block of four alone.  [default: never]",
)
@click.option("--no-dense", is_flag=True, help="Leave the dense model out.")
@click.option("--contexts", default="2048,4096,8192", show_default=True, help="Prompt lengths in tokens.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Sequences at once.")
@click.option("--tokens", default=32, show_default=True, type=click.IntRange(min=1), help="Decode steps timed.")
@click.option("--text", help="What prompts are cut from: as --calibration of compile.  [default: the artifact's own]")
@kernels_option
@device_options
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Also write the JSON here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw it, as SVG, here.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def bench_command(
    artifact: Path | None,
    shape: Path | None,
    ratio: float,
    window: int,
    rate: float,
    prefill: str,
    granularity: str,
    vote_every: int,
    index_dtype: str,
    coarse_from: int | None,
    no_dense: bool,
    contexts: str,
    batch: int,
    tokens: int,
    text: str | None,
    kernels: Kernels,
    device: str,
    dtype: str,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Time ARTIFACT beside the dense model: first token, later tokens, and bytes of the cache, by context."""
    from sparsec.compiler.bench import bench, bench_text, of_artifact, of_shape
    from sparsec.compiler.draw import drawing

    lengths = numbers(contexts, "--contexts")
    check_place(out)
    check_place(plot, "--plot")
    if (artifact is None) == (shape is None):
        raise UsageError("name an artifact, or a config with --shape, one of them")
    where: dict[str, Any] = {"device": device, "dtype": dtype, "kernels": kernels}
    with drawing() as listen:
        if artifact is not None:
            subject = of_artifact(artifact, max(lengths), text=text, **where)
        else:
            assert shape is not None
            made: dict[str, Any] = {
                "ratio": ratio,
                "window": window,
                "rate": rate,
                "prefill": prefill,
                "granularity": granularity,
                "vote_every": vote_every,
                "index_dtype": index_dtype,
                "coarse_from": coarse_from,
            }
            subject = of_shape(shape, max(lengths), **made, **where)
        result = bench(subject, lengths, batch=batch, tokens=tokens, kernels=kernels, dense=not no_dense, listen=listen)
    result["command"] = shlex.join(["sparsec", *sys.argv[1:]])
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        from sparsec.export.times import times_svg

        plot.write_text(times_svg(result), encoding="utf-8")
    click.echo(json.dumps(result, indent=2) if as_json else bench_text(result))
