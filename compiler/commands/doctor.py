"""``sparsec doctor``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="What was found as JSON.")
def doctor(artifact: Path | None, as_json: bool) -> None:
    """Say what this machine can run, and of ARTIFACT whether each of its exports will load here."""
    from sparsec.compiler.diagnosis import diagnosis, diagnosis_text

    found = diagnosis(artifact)
    click.echo(json.dumps(found, indent=2) if as_json else diagnosis_text(found))
