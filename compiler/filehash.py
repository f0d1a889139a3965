"""sha256 of files, remembered between runs, because hashing a large checkpoint takes minutes.

A hash is remembered in ``<cache_dir>/hashes.json`` under the file's absolute path and is valid while its
size, modification time and inode stay the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# A file system's clock ticks in milliseconds: a file written twice within a tick keeps its modification time.
# A hash is therefore remembered only once the file has been left alone for longer than any such tick.
SETTLED_NS = 2_000_000_000
LARGE_BYTES = 1 << 30


def hash_files(
    files: Iterable[Path], cache_dir: Path, progress: Callable[[str], None] = lambda _: None
) -> dict[Path, str]:
    """sha256 in hex of every file's content.

    ``progress`` gets a line for each file above 1 GiB that has to be read.

    Raises:
        OSError: a file cannot be read.
    """
    store = cache_dir / "hashes.json"
    known = _read(store)
    hashes: dict[Path, str] = {}
    fresh: dict[str, list[Any]] = {}
    for file in files:
        real = file.resolve()
        stat = real.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = known.get(str(real))
        if isinstance(entry, list) and len(entry) == 4 and entry[:3] == state:
            hashes[file] = str(entry[3])
            continue
        if stat.st_size > LARGE_BYTES:
            progress(f"hashing {file.name} ({stat.st_size / 1e9:.1f} GB)")
        with real.open("rb") as stream:
            hashes[file] = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time_ns() - stat.st_mtime_ns > SETTLED_NS:
            fresh[str(real)] = [*state, hashes[file]]
    if fresh:
        # A cache that cannot be written costs time at the next run and nothing else.
        with contextlib.suppress(OSError):
            _write(store, {**_read(store), **fresh})
    return hashes


def combined_digest(hashes: dict[str, str]) -> str:
    """sha256 in hex over (name, sha256 of the content) of several files, whatever order they come in."""
    lines = "".join(f"{name} {sha}\n" for name, sha in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _read(store: Path) -> dict[str, Any]:
    try:
        data = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write(store: Path, data: dict[str, Any]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    aside = store.with_name(f".{store.name}.{secrets.token_hex(8)}")
    try:
        aside.write_text(json.dumps(data, indent=0, sort_keys=True), encoding="utf-8")
        os.replace(aside, store)
    finally:
        aside.unlink(missing_ok=True)
