"""``sparsec passes``."""

from __future__ import annotations

import json

import click

from sparsec.errors import UsageError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Every option with its default as JSON.")
@click.argument("name", required=False)
def passes(name: str | None, as_json: bool) -> None:
    """List the passes, or explain one: its options and their defaults."""
    from sparsec.compiler.explain import pass_data, passes_text
    from sparsec.compiler.registry import known_passes, suggest

    known = known_passes()
    if name is not None and name not in known:
        raise UsageError(f"there is no pass {name!r}: {suggest(name, list(known))}")
    chosen = {name: known[name]} if name else known
    if as_json:
        click.echo(json.dumps([pass_data(kind) for kind in chosen.values()], indent=2))
    else:
        click.echo(passes_text(chosen, options=name is not None))
