"""Runs sparsec commands for the tests, each in a child of a process that has imported everything once.

Importing torch and transformers takes seconds; a forked child starts at once and is as fresh: it has its own standard
streams, environment, folder and signals, and whatever it breaks ends with it. Requests are JSON, one a line:

    {"argv": [...], "cwd": ..., "env": {...}, "stdin": ..., "stdout": ..., "stderr": ..., "file_size": n}  -> {"pid": n}
    {"wait": pid, "block": true}                                                                  -> {"status": n}

The three streams are file names; a status below zero is the signal that ended the child, and null says that it runs.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from typing import Any


def import_everything() -> None:
    """What any command imports on its way, without running any of it."""
    import pydoc_data.topics  # noqa: F401

    import transformers.models.llama.modeling_llama  # noqa: F401

    import sparsec.calibrate.evaluate
    import sparsec.compiler.answer
    import sparsec.compiler.dry_run
    import sparsec.compiler.explain
    import sparsec.compiler.pipeline  # noqa: F401


def run(request: dict[str, Any]) -> int:
    """The command in this process; its exit status."""
    from sparsec.compiler.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, key in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(request[key], flags), number)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if request["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], request["file_size"]))
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.argv = ["sparsec", *request["argv"]]
    try:
        main()
    except SystemExit as exit:
        return int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    """Answer requests until standard input ends."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_everything()
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], 0 if request["block"] else os.WNOHANG)
            answer = {"status": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if not pid:
                requests.close()
                answers.close()
                os._exit(run(request))
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
