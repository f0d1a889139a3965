"""``sparsec verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sparsec.compiler.commands.options import cache_dir, check_place, device_options

GATE = "YAML with thresholds, see docs/ci.md.  [default: the recipe's]"


@click.command("verify")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Integrity and the first golden prompt only.")
@click.option(
    "--gate",
    "gate_file",
    type=click.Path(path_type=Path),
    help=GATE,
)
@click.option("--against", type=click.Path(path_type=Path), help="Another artifact of the model: the last release.")
@click.option("--base", metavar="SOURCE", help="The dense model, where it is not where it was at the compile.")
@click.option("--text", help="Held-out text, as --calibration of compile.  [default: the artifact's own]")
@device_options
@click.option("--junit", type=click.Path(path_type=Path), help="Also write JUnit XML here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write Markdown here, for a pull request.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def verify_command(
    artifact: Path,
    quick: bool,
    gate_file: Path | None,
    against: Path | None,
    base: str | None,
    text: str | None,
    device: str,
    dtype: str,
    junit: Path | None,
    markdown: Path | None,
    as_json: bool,
) -> None:
    """Check ARTIFACT: is it whole, and does it still do what its compile measured?

    Exit status 3 where a check fails.
    """
    from sparsec.compiler.draw import drawing
    from sparsec.compiler.explain import table
    from sparsec.compiler.thresholds import of_recipe, read_thresholds
    from sparsec.compiler.verify import Asked, verify
    from sparsec.errors import GateError
    from sparsec.export import verdicts

    thresholds = read_thresholds(gate_file) if gate_file is not None else of_recipe(artifact)
    check_place(junit, "--junit")
    check_place(markdown, "--markdown")
    with drawing() as listen:
        asked = Asked(artifact, thresholds, cache_dir(), quick, against, base, text, device, dtype, listen)
        result = verify(asked)
    for place, write in ((junit, verdicts.junit), (markdown, verdicts.markdown)):
        if place is not None:
            place.write_text(write(result), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(table(["", "check", "engine", ""], verdicts.rows(result)))
        click.echo(f"\n{verdicts.headline(result)}")
    if not result["passed"]:
        failed = [check for check in result["checks"] if check["status"] == verdicts.FAIL]
        raise GateError(f"{failed[0]['said']} ({len(failed)} checks failed): do not deploy this artifact")
