"""``sparsec diff``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("diff")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The rows as JSON on standard output.")
def diff_command(a: Path, b: Path, as_json: bool) -> None:
    """Plans and recorded measurements of the artifacts A and B side by side; `verify --against` measures anew."""
    from sparsec.compiler.explain import artifact_data, table
    from sparsec.export.compare import comparable, measured_rows, plan_rows
    from sparsec.plan import Plan

    one, other = artifact_data(a), artifact_data(b)
    plans = plan_rows(Plan.parse(one["plan"]), Plan.parse(other["plan"]))
    measured = measured_rows(one["measurements"], other["measurements"])
    same_text = comparable(one["measurements"], other["measurements"])
    if as_json:
        click.echo(json.dumps({"plan": plans, "measured": measured, "same_text": same_text}, indent=2))
        return
    click.echo(table(["plan", str(a), str(b), "heads"], plans) if plans else "The plans are the same.")
    click.echo("\n" + table(["measured at the compile", str(a), str(b), "B against A"], measured))
    if not same_text:
        click.echo("\nThe two gates read different text or windows: their figures do not compare.")
