"""Folders that are filled aside and renamed into place: whole, or not there at all.

A folder that is being filled is locked, and the lock ends with its process, whatever ends that. So what a killed
writer left can be told from what another one is writing just now, and the next writer clears it away.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsec.errors import ArtifactError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def filling(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder ``.<name>.writing-…`` in ``parent``, deleted after the block unless it was renamed by then.

    Leftovers of killed writers of the same name are deleted first.

    Raises:
        ArtifactError: the disk is full.
        OSError: the folder cannot be written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with locked(parent):
        for stale in parent.glob(f".{glob.escape(name)}.writing-*"):
            _clear(stale)
        aside = parent / f".{name}.writing-{secrets.token_hex(4)}"
        aside.mkdir()
        handle = os.open(aside, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield aside
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ArtifactError(
            f"there is no room to write in {parent} ({error.strerror}): make room and run again, finished stages stay"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time is inside the block for this folder. Nothing is written for it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def shared_scratch(place: Path) -> Iterator[Path]:
    """A folder that outlives a stopped block and goes when the block has ended well; one process at a time is inside.

    The next process finds what the stopped one left, or an empty folder.
    """
    handle = _entered(place)
    try:
        yield place
        shutil.rmtree(place)
    except BaseException:
        with suppress(OSError):  # not empty: that is what the next process wants to find
            place.rmdir()
        raise
    finally:
        os.close(handle)


def _entered(place: Path) -> int:
    """Handle of the locked folder. While this process waited, the one before may have taken the folder away."""
    while True:
        place.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            handle = os.open(place, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if place.is_dir() and os.path.samestat(os.fstat(handle), place.stat()):
                return handle
            os.close(handle)


def sync(folder: Path) -> None:
    """Push a folder and all that is in it to the disk."""
    for path in folder.rglob("*"):
        sync_folder(path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Push a folder's list of names, or a file, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear(stale: Path) -> None:
    """Delete a folder unless its writer lives."""
    try:
        handle = os.open(stale, os.O_RDONLY)
    except FileNotFoundError:
        return  # its writer has just finished
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(stale)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)
