"""``sparsec push``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("push")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Where the repository is made now: nobody else sees it.")
@click.option("--revision", help="Branch; made from main where it is not there.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request against main instead of committing.")
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="List the files and sizes; send nothing.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def push_command(
    artifact: Path,
    repo: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish ARTIFACT on the Hub as one commit. The login is that of `hf auth login`, or HF_TOKEN.

    What is damaged, or failed its gate, is refused. An upload that broke off goes on where it was.
    """
    from sparsec.compiler.draw import drawing
    from sparsec.export.hub import Push, planned, planned_text, publish

    if dry_run:
        plan = planned(Push(artifact, repo, private, revision, create_pr, message))
        click.echo(json.dumps(plan, indent=2) if as_json else planned_text(plan))
        return
    with drawing() as listen:
        done = publish(Push(artifact, repo, private, revision, create_pr, message, listen=listen))
    click.echo(json.dumps(done, indent=2) if as_json else done["pull_request"] or done["url"])
