"""Draws events: bars with the remaining time on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sparsec.events import Event, Listener

EVERY = 15.0  # seconds between two lines of one stage in a log


@contextmanager
def drawing(quiet: bool = False) -> Iterator[Listener]:
    """A listener that draws to standard error; standard output stays for results."""
    if quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _bars() as listen:
            yield listen
    else:
        yield _Log()


@contextmanager
def _bars() -> Iterator[Listener]:
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, int] = {}

        def listen(event: Event) -> None:
            if event.note:
                progress.console.print(f"{event.stage}: {event.note}", highlight=False, markup=False)
            if event.total:
                if event.stage not in tasks:
                    tasks[event.stage] = progress.add_task(event.stage, total=event.total)
                progress.update(tasks[event.stage], completed=event.done, total=event.total)  # type: ignore[arg-type]

        yield listen


class _Log:
    """One line when a stage starts, every so often, and when it ends."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.last = 0.0

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        began = self.began.setdefault(event.stage, now)
        if event.note:
            print(f"{event.stage}: {event.note}", file=sys.stderr, flush=True)
        if not event.total or event.note:
            return
        if event.done in (0, event.total) or now - self.last >= EVERY:
            self.last = now
            took = now - began
            left = (
                f", about {took / event.done * (event.total - event.done):.0f} s left"
                if 0 < event.done < event.total
                else ""
            )
            print(f"{event.stage}: {event.done}/{event.total}, {took:.0f} s{left}", file=sys.stderr, flush=True)
