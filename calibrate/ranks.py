"""Several processes at one compile, started by ``accelerate launch`` or ``torchrun``: who does what.

Every process runs the same compile with the same seeds. What is data-parallel is divided by item (a window, a training
sample), each process takes every n-th, and results are put back in the order of the items before anything is added
up: so a search finds the same pattern, bit by bit, with any number of processes. All other stages run in the first
process, and the others read what it stored; they need the same cache folder.

With one process, nothing here does anything, and accelerate is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsec.errors import UsageError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # processes wait for the first one's stages, and those may take long


def join(device: str) -> str:
    """Join the other processes, where there are any; the device of this one.

    Args:
        device: as the user named it; ``cuda`` becomes this process's own GPU.

    Raises:
        UsageError: a single GPU, or a model spread over all, is named for several processes.
    """
    if not _launched():
        return device
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device} is for one process: with accelerate launch or torchrun use cuda (or cpu)")
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return device if device == "cpu" else f"cuda:{state.local_process_index}"


def leave() -> bool:
    """The end of what :func:`join` began; whether this was the first process, which goes on alone."""
    first = is_first()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return first


def count() -> int:
    """Processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def wait() -> None:
    """For all others."""
    if count() > 1:
        torch.distributed.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the block, then the others do."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def own(items: Sequence[T]) -> Sequence[T]:
    """This process's share: every n-th item."""
    return items[torch.distributed.get_rank() :: count()] if count() > 1 else items


def in_order(results: Sequence[T]) -> list[T]:
    """Results of all items in the items' order, in every process; ``results`` are those of :func:`own` items."""
    if count() == 1:
        return list(results)
    from accelerate.utils import gather_object

    shares = gather_object([list(results)])
    missing = object()
    return [result for result in chain.from_iterable(zip_longest(*shares, fillvalue=missing)) if result is not missing]


def same(value: T) -> T:
    """The first process's value, in every process."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    held: list[Any] = [value]
    broadcast_object_list(held)
    return held[0]  # type: ignore[no-any-return]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all processes, in place."""
    if count() > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ
