"""A clock that goes back: nothing goes by the time of day but what is remembered of files, and that is careful."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

import sparsec.compiler
from sparsec.compiler import filehash
from sparsec.compiler.filehash import hash_files

DAY = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.now|\bdate\.today|\butcnow")


def test_a_file_of_the_future_is_read_every_time(tmp_path: Path) -> None:
    file, later = tmp_path / "weights", time.time() + 3600  # written, then the clock went back by an hour
    for content in (b"one", b"two"):
        file.write_bytes(content)
        os.utime(file, (later, later))
        first = hash_files([file], tmp_path / "cache")[file]
        assert first == hash_files([file], tmp_path / "other cache")[file]
    assert not (tmp_path / "cache" / "hashes.json").exists()


def test_what_is_remembered_holds_when_the_clock_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"one")
    os.utime(file, (time.time() - 60,) * 2)
    found = hash_files([file], cache)
    now = time.time_ns()
    monkeypatch.setattr(filehash.time, "time_ns", lambda: now - 10**15)
    assert hash_files([file], cache) == found
    file.write_bytes(b"two")
    os.utime(file, ns=(now - 10**15, now - 10**15))  # by the clock as it is now
    assert hash_files([file], cache) != found


def test_nothing_else_asks_for_the_time_of_day() -> None:
    house = Path(sparsec.compiler.__file__).parent.parent
    asked = {file.name for file in house.rglob("*.py") if DAY.search(file.read_text(encoding="utf-8"))}
    assert asked == {"filehash.py"}
