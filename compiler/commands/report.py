"""``sparsec report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsec.compiler.commands.options import check_place


@click.command("report")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--eval", "eval_file", type=click.Path(path_type=Path), help="JSON of sparsec eval: the needle grid.")
@click.option("--bench", "bench_file", type=click.Path(path_type=Path), help="JSON of sparsec bench: measured speed.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="The page to write.")
def report_command(artifact: Path, eval_file: Path | None, bench_file: Path | None, out: Path) -> None:
    """Write ARTIFACT's report anew, with what was measured after its compile.

    The artifact itself is left as it is: its hashes hold.
    """
    from sparsec.compiler.explain import artifact_data
    from sparsec.compiler.results import read_result
    from sparsec.export.report import render_report
    from sparsec.plan import Plan

    check_place(out)
    data = artifact_data(artifact)
    plan = Plan.parse(data["plan"])
    more: dict[str, Any] = {
        "evaluated": read_result(eval_file, "cells", plan) if eval_file is not None else None,
        "timed": read_result(bench_file, "rows", plan) if bench_file is not None else None,
    }
    out.write_text(render_report(plan, data["measurements"], data["manifest"], **more), encoding="utf-8")
    click.echo(str(out))
