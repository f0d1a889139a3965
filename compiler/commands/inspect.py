"""``sparsec inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Plan, measurements and manifest as JSON.")
@click.option("--recipe", "recipe_only", is_flag=True, help="The recipe that gives this artifact again, as YAML.")
def inspect(artifact: Path, as_json: bool, recipe_only: bool) -> None:
    """Explain ARTIFACT: heads, indexers, sharing, what was measured, what runs where.

    Files of DuoAttention, RTP-LLM, MInference, IndexCache and Model Optimizer are recognised too.
    """
    from sparsec.compiler.explain import artifact_data, artifact_text
    from sparsec.compiler.foreign import foreign
    from sparsec.compiler.recipe import Recipe

    if not recipe_only:
        found = foreign(artifact)
        if found:
            said = [f"{each.dialect:<10}  {each.says}" for each in found]
            click.echo(json.dumps([each.to_json() for each in found], indent=2) if as_json else "\n".join(said))
            return
    data = artifact_data(artifact)
    if recipe_only:
        click.echo(Recipe.model_validate(data["manifest"]["recipe"]).to_yaml(), nl=False)
    else:
        click.echo(json.dumps(data, indent=2) if as_json else artifact_text(artifact, data))
