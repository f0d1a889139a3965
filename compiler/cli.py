"""The command line: gathers the commands, and turns errors into one line and an exit status.

Exit status 0 done, 1 failed, 2 wrong call, 3 gate failed, 130 stopped.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

import sparsec
from sparsec.compiler.commands.bench import bench_command
from sparsec.compiler.commands.compile import compile_command
from sparsec.compiler.commands.diff import diff_command
from sparsec.compiler.commands.doctor import doctor
from sparsec.compiler.commands.eval import eval_command
from sparsec.compiler.commands.export import export_command
from sparsec.compiler.commands.generate import generate
from sparsec.compiler.commands.inspect import inspect
from sparsec.compiler.commands.passes import passes
from sparsec.compiler.commands.push import push_command
from sparsec.compiler.commands.report import report_command
from sparsec.compiler.commands.verify import verify_command
from sparsec.errors import SparsecError

STOPPED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(sparsec.__version__, prog_name="sparsec")
def cli() -> None:
    """Compile a dense Hugging Face decoder checkpoint into a sparse, deployable one."""


for command in (
    compile_command,
    inspect,
    verify_command,
    diff_command,
    eval_command,
    bench_command,
    report_command,
    generate,
    export_command,
    doctor,
    push_command,
    passes,
):
    cli.add_command(command)


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
    line = " ".join(message.splitlines()).encode("utf-8", "backslashreplace").decode()
    click.echo(f"sparsec: {line}", err=True)
    sys.exit(status)
