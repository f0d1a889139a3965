"""``sparsec export``: an artifact's plan in another engine's words."""

from __future__ import annotations

from pathlib import Path

import click

from sparsec.compiler.commands.options import HELP


@click.command("export")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--to", "dialect", required=True, help=HELP["to"])
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="A new folder.")
def export_command(artifact: Path, dialect: str, out: Path) -> None:
    """Write the head split or sharing pattern of ARTIFACT as files that another engine reads."""
    from sparsec.compiler.registry import suggest
    from sparsec.errors import UsageError
    from sparsec.export.dialects import DIALECTS
    from sparsec.export.dialects.files import write_files
    from sparsec.layout import read_plan

    writers = {name: each.encode for name, each in DIALECTS.items() if each.encode is not None}
    encode = writers.get(dialect)
    if encode is None:
        raise UsageError(f"--to {dialect}: {suggest(dialect, list(writers))}")
    write_files(out, encode(read_plan(artifact)))
    click.echo(f"{out}: read by {DIALECTS[dialect].engine}")
