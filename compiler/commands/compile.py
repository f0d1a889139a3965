"""``sparsec compile``."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import sparsec
from sparsec.compiler.commands.options import HELP, cache_dir, device_options, names
from sparsec.compiler.exports import RUNTIMES, check, export, export_lines
from sparsec.errors import UsageError
from sparsec.events import silent

if TYPE_CHECKING:
    from sparsec.passes.base import Tier


@click.command("compile")
@click.argument("source", required=False)
@click.option("--passes", help=HELP["passes"])
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Folder of the artifact.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help=HELP["recipe"])
@click.option("--from-recipe", "repeated", metavar="ARTIFACT", help=HELP["from_recipe"])
@click.option("--from", "start_files", type=click.Path(path_type=Path), help=HELP["from"])
@click.option("--set", "settings", multiple=True, metavar="PASS.OPTION=VALUE", help=HELP["set"])
@click.option("--tier", type=click.Choice(["training-free", "minutes", "hours"]), help=HELP["tier"])
@click.option("--keep", help="Short for --set indexcache.keep=…, e.g. 25%.")
@click.option("--max-loss", help="Short for --set indexcache.max_loss=…, e.g. 0.5%.")
@click.option("--calibration", help=HELP["calibration"])
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--seed", type=click.IntRange(min=0), help="Of everything random.  [default: 0]")
@device_options
@click.option("--export", "exports", metavar="TARGETS", help="Then also sparsec export --to onnx, tensorrt, or both.")
@click.option("--force", is_flag=True, help="Move a folder that is not ours aside instead of refusing.")
@click.option("--dry-run", is_flag=True, help="Print stages, order, expected time, memory and files; compute nothing.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def compile_command(
    source: str | None,
    passes: str | None,
    out: Path | None,
    recipe_file: Path | None,
    repeated: str | None,
    start_files: Path | None,
    settings: tuple[str, ...],
    tier: Tier | None,
    keep: str | None,
    max_loss: str | None,
    calibration: str | None,
    revision: str | None,
    seed: int | None,
    device: str,
    dtype: str,
    exports: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compile SOURCE: analyse it on calibration text, make it sparse, check it, write an artifact.

    A compile that was stopped continues where it was. An artifact that fails its gate exits with status 3.
    """
    from sparsec.compiler.draw import drawing
    from sparsec.compiler.recipe import make_recipe, parse_setting, read_recipe
    from sparsec.compiler.registry import make_passes, with_tier

    if recipe_file is not None and repeated is not None:
        raise UsageError("--recipe and --from-recipe are two recipes: give one")
    data: dict[str, Any] = read_recipe(recipe_file) if recipe_file else {}
    if repeated is not None:
        from sparsec.compiler.published import published

        made = published(repeated)
        data = made.recipe
        if source is None:
            source, revision = made.source, revision or made.revision
    if source is None:
        raise UsageError("no source: name a Hub id, a folder, a .gguf file or demo")
    if passes is not None:
        named = [name.strip() for name in passes.split(",") if name.strip()]
        given = data.get("passes") or {}
        data["passes"] = {name: given.get(name, {}) for name in named}
    if start_files is not None:
        from sparsec.compiler.start import read_start

        split, pattern = read_start(start_files)
        if split is not None:
            data["start"] = split.model_dump(mode="json")
        if pattern is not None:
            if "indexcache" not in (data.get("passes") or {}):
                raise UsageError(f"--from {start_files} is a sharing pattern: add indexcache to --passes")
            data["passes"]["indexcache"] = {"pattern": pattern, **data["passes"]["indexcache"]}
    short = [f"indexcache.{name}={value}" for name, value in (("keep", keep), ("max_loss", max_loss)) if value]
    for setting in (*settings, *short):
        owner, option, value = parse_setting(setting)
        if owner == "gate":
            data["gate"] = {**(data.get("gate") or {}), option: value}
        elif owner in (data.get("passes") or {}):
            data["passes"][owner] = {**data["passes"][owner], option: value}
        else:
            raise UsageError(f"--set {setting}: {owner!r} is not among the passes; add it to --passes")
    for name, value in (("calibration", calibration), ("seed", seed)):
        if value is not None:
            data[name] = value
    if not data.get("passes") and not data.get("start"):
        raise UsageError("no passes: give --passes rtpurbo,indexcache or --recipe FILE")
    data.setdefault("passes", {})
    if tier is not None:
        data["passes"] = with_tier(data["passes"], tier)
    recipe = make_recipe(data)
    ordered = make_passes(recipe.passes)
    if out is None and not dry_run:
        raise UsageError("no output folder: give -o DIR, or --dry-run to see what would happen")

    targets = names("--export", exports, RUNTIMES) if exports else []
    check(targets)
    if dry_run:
        from sparsec.compiler.dry_run import expect
        from sparsec.compiler.source import open_source, weight_files
        from sparsec.export.artifact import check_free

        if out is not None:
            check_free(out, force=force)
        opened = open_source(source, revision=revision, cache_dir=cache_dir())
        expected = expect(
            opened.path, weight_files(opened.path), ordered, device, f"sparsec {sparsec.__version__}", recipe.start
        )
        click.echo(json.dumps(expected, indent=2) if as_json else _expected_text(expected))
        return

    from sparsec.calibrate import ranks
    from sparsec.compiler.pipeline import Job, compile_model

    assert out is not None
    device = ranks.join(device)
    with drawing() if ranks.is_first() else nullcontext(silent) as listen:
        job = Job(source, out, recipe, cache_dir(), revision, device, dtype, force, listen)
        outcome = compile_model(job)
    if not outcome.written:
        return
    exported = export(out, targets)
    if as_json:
        result = {
            "out": str(out),
            "plan": outcome.plan.digest,
            "seconds": dict(outcome.seconds),
            "gate": outcome.measurements["gate"],
            "pattern": outcome.plan.pattern,
            **({"exports": exported} if exported else {}),
        }
        click.echo(json.dumps(result, indent=2))
    else:
        from sparsec.compiler.explain import outcome_text

        click.echo("\n".join([outcome_text(outcome), *export_lines(out, exported)]))


def _expected_text(expected: dict[str, Any]) -> str:
    from sparsec.compiler.explain import table

    rows = [
        [stage["stage"], stage["tier"], f"{stage['seconds']:.0f} s", f"{stage['resident'] >> 20} MiB"]
        for stage in expected["stages"]
    ]
    return "\n".join(
        [
            table(["stage, in order", "tier", "about", "held"], rows),
            "",
            f"time    about {expected['seconds'] / 60:.1f} minutes (estimated from the model's size and this machine)",
            f"memory  about {expected['memory'] / 2**30:.1f} GiB",
            f"disk    {expected['disk'] / 2**20:.0f} MiB",
            f"files   {', '.join(expected['files'])}",
        ]
    )
