"""What passes and measurements report while they run. They never draw: the command line does, or nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Event:
    """``done`` of ``total`` units of ``stage`` are finished; ``note`` is a line for the reader."""

    stage: str
    done: int = 0
    total: int = 0
    note: str = ""


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener of those who do not listen."""


def tracked(items: Sequence[Item] | Iterable[Item], stage: str, listen: Listener, total: int) -> Iterator[Item]:
    """Yield the items and report after each."""
    listen(Event(stage, 0, total))
    for done, item in enumerate(items, 1):
        yield item
        listen(Event(stage, done, total))
