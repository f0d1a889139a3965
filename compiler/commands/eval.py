"""``sparsec eval``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsec.compiler.commands.options import (
    HELP,
    cache_dir,
    check_place,
    device_options,
    kernels_option,
    names,
    numbers,
)
from sparsec.errors import UsageError

if TYPE_CHECKING:
    from sparsec.plugins.kernels.support import Kernels


@click.command("eval")
@click.argument("artifacts", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="ARTIFACT...")
@click.option("--lengths", default="2048,4096", show_default=True, help="Context lengths in tokens.")
@click.option("--systems", help=HELP["systems"])
@click.option("--base", metavar="SOURCE", help="The dense model, where it is not where it was at the compile.")
@click.option("--tasks", default="kv,multikey,passkey", show_default=True, help=HELP["tasks"])
@click.option("--prompts", default=50, show_default=True, type=click.IntRange(min=0), help="A task and length.")
@click.option("--windows", default=8, show_default=True, type=click.IntRange(min=0), help="Text windows a length.")
@click.option("--rows", default=512, show_default=True, type=click.IntRange(min=1), help="Decode rows of each window.")
@click.option("--contexts", default=1, show_default=True, type=click.IntRange(min=1), help=HELP["contexts"])
@click.option("--decode-tokens", default=0, show_default=True, type=click.IntRange(min=0), help=HELP["decode_tokens"])
@click.option("--decode-prompts", default=8, show_default=True, type=click.IntRange(min=1), help="Of the long decode.")
@click.option("--text", help="Held-out text: as --calibration of compile.  [default: the artifact's own held-out part]")
@click.option(
    "--batch-size",
    default=4,
    show_default=True,
    type=click.IntRange(min=1),
    help="Prompts or windows at once; 100 on a GPU.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of windows, prompts, intervals."
)
@kernels_option
@device_options
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Also write the JSON here.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def eval_command(
    artifacts: tuple[Path, ...],
    lengths: str,
    systems: str | None,
    base: str | None,
    tasks: str,
    prompts: int,
    windows: int,
    rows: int,
    contexts: int,
    decode_tokens: int,
    decode_prompts: int,
    text: str | None,
    batch_size: int,
    seed: int,
    kernels: Kernels,
    device: str,
    dtype: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure ARTIFACTs by decode semantics beside dense, window-only and the training-free head split.

    Several artifacts of one model stand side by side under their folders' names; window and split follow the first
    one's plan. What a pass costs shows beside an artifact that was compiled without it.
    """
    from sparsec.calibrate.evaluate import BASELINES, Suite
    from sparsec.calibrate.tasks import GROUPS, TASKS, named
    from sparsec.compiler.draw import drawing
    from sparsec.compiler.explain import evaluation_text
    from sparsec.compiler.systems import ARTIFACT, evaluate_artifacts

    chosen = names("--systems", systems, [*BASELINES, ARTIFACT]) if systems is not None else None
    suite = Suite(
        lengths=numbers(lengths),
        tasks=named(",".join(names("--tasks", tasks, [*TASKS, *GROUPS]))),
        prompts_each=prompts,
        windows_each=windows,
        rows=rows,
        contexts=contexts,
        decode_tokens=decode_tokens,
        decode_prompts=decode_prompts,
        batch_size=batch_size,
        seed=seed,
    )
    if decode_tokens and chosen is not None and "dense" not in chosen:
        raise UsageError("--decode-tokens compares with what dense writes: add dense to --systems")
    check_place(out)
    where: dict[str, Any] = {"text": text, "base": base, "device": device, "dtype": dtype, "kernels": kernels}
    with drawing() as listen:
        result = evaluate_artifacts(artifacts, chosen, suite, **where, cache_dir=cache_dir(), listen=listen)
    result["command"] = shlex.join(["sparsec", *sys.argv[1:]])
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2) if as_json else evaluation_text(result))
