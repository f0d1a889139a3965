"""Full disks, killed writers, signals: nothing half-written stays under the output name, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents, names, write_texts

from sparsec.compiler.stages import Stages
from sparsec.errors import ArtifactError
from sparsec.export.artifact import check_free, check_room, put, recover, writing
from sparsec.layout import MANIFEST, is_artifact, read_plan

# Full disks


def test_too_little_room_is_said_before_the_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ArtifactError, match=r"the artifact needs \d+ MiB, the disk with .* make room, or choose"):
        check_room(tmp_path / "not" / "there" / "yet", free)


@pytest.mark.parametrize("limit", [100_000, 3000], ids=["weights", "stage"])
def test_a_file_that_cannot_grow_is_exit_1_and_leaves_nothing(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path, limit: int
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    result = cli(*compile_line(tmp_path / "out"), file_size=limit, cache=cache if limit == 3000 else None)
    assert "there is no room to write in " in result.line
    assert "make room and run again, finished stages stay" in result.line
    assert result.status == 1
    assert names(tmp_path) == ["cache"]
    assert [file for file in cache.rglob("*") if ".writing-" in file.name] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"only root can mount a small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    cli: Any, compile_line: Callable[..., list[str]], small_disk: Path
) -> None:
    with (
        pytest.raises(ArtifactError, match=r"there is no room to write in .*No space left on device.*make room"),
        writing(small_disk / "out", force=False) as aside,
    ):
        (aside / "weights").write_bytes(bytes(2 << 20))
    assert names(small_disk) == []
    with pytest.raises(ArtifactError, match="there is no room to write"):
        Stages(small_disk / "stages").store("f" * 64, {"much": "x" * (2 << 20)}, {})
    assert names(small_disk / "stages") == []
    result = cli(*compile_line(small_disk / "out"))
    assert "the artifact needs 64 MiB, the disk with " in result.line
    assert result.status == 1


def test_a_cache_that_cannot_be_made_is_exit_1(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = cli(*compile_line(tmp_path / "out"), cache=tmp_path / "file" / "cache")
    assert "the cache folder cannot be made" in result.line
    assert result.status == 1


@pytest.mark.parametrize("file", ["result.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", [b"", b"{", None])
def test_a_damaged_stage_is_computed_again(tmp_path: Path, file: str, damage: bytes | None) -> None:
    stages = Stages(tmp_path)
    key, data, tensors = "f" * 64, {"loss": 0.1}, {"weight": torch.arange(6.0).reshape(2, 3)}
    assert stages.load(key) is None
    for _ in range(2):
        stages.store(key, data, tensors)
        loaded = stages.load(key)
        assert loaded is not None
        assert loaded[0] == data
        assert torch.equal(loaded[1]["weight"], tensors["weight"])
        if damage is None:
            (tmp_path / key / file).unlink()
        else:
            (tmp_path / key / file).write_bytes(damage)
        assert stages.load(key) is None
    assert names(tmp_path) == []


# Writing aside


def fill(aside: Path, text: str) -> None:
    """Something that counts as an artifact, with the same text in all its files."""
    (aside / MANIFEST).write_text(json.dumps({"producer": "sparsec test", "text": text}))
    for number in range(5):
        (aside / f"{number}.txt").write_text(text)


def whole(out: Path) -> str:
    """The text of an artifact all of whose files agree."""
    (text,) = {(out / f"{number}.txt").read_text() for number in range(5)}
    assert json.loads((out / MANIFEST).read_text())["text"] == text
    return text


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    def fail(aside: Path) -> None:
        fill(aside, "new")
        raise RuntimeError("half way")

    with writing(tmp_path / "out", force=False) as aside:
        fill(aside, "old")
    with pytest.raises(RuntimeError, match="half way"), writing(tmp_path / "out", force=False) as aside:
        fail(aside)
    assert whole(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_errors_that_have_nothing_to_do_with_room_keep_their_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "out", force=False):
        (tmp_path / "nowhere").read_text()
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_an_error_of_ours(tmp_path: Path, number: int) -> None:
    with pytest.raises(ArtifactError, match=os.strerror(number)), writing(tmp_path / "out", force=False):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("name", ["out", "out[1]*?", ".out"])
def test_leftovers_of_killed_writers_are_cleared_and_those_of_living_ones_are_not(tmp_path: Path, name: str) -> None:
    dead, other = tmp_path / f".{name}.writing-dead", tmp_path / ".another.writing-dead"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "part").write_text("half")
    with writing(tmp_path / name, force=False) as first:
        assert not dead.exists()
        fill(first, "first")
        with writing(tmp_path / name, force=False) as second:
            fill(second, "second")
        assert whole(first) == "first"
        assert whole(tmp_path / name) == "second"
    assert whole(tmp_path / name) == "first"
    assert names(tmp_path) == sorted([other.name, name])


def test_an_artifact_that_a_killed_writer_moved_away_comes_back(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    out, away = tmp_path / "out", tmp_path / ".out.replaced"
    away.mkdir()
    fill(away, "old")
    line = compile_line(out)
    line[1] = "nowhere"
    assert cli(*line).status == 1
    assert whole(out) == "old"
    assert names(tmp_path) == ["out"]
    recover(out)  # nothing to do
    away.mkdir()
    fill(away, "older")  # a writer was killed between renaming and deleting
    with writing(out, force=False) as aside:
        fill(aside, "new")
    assert whole(out) == "new"
    assert names(tmp_path) == ["out"]


def test_being_stopped_between_the_two_renames_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with writing(out, force=False) as aside:
        fill(aside, "old")
    rename = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if ".writing-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt), writing(out, force=False) as aside:
        fill(aside, "new")
    assert whole(out) == "old"
    assert names(tmp_path) == ["out"]


def test_many_writers_of_one_name_leave_one_whole_artifact(tmp_path: Path) -> None:
    out, failures = tmp_path / "out", []

    def write(writer: int) -> None:
        try:
            for turn in range(8):
                with writing(out, force=False) as aside:
                    fill(aside, f"{writer}/{turn}")
        except BaseException as error:  # reported below, in the test's own thread
            failures.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    assert whole(out).endswith("/7")
    assert names(tmp_path) == ["out"]


def test_a_name_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    aside = write_texts(tmp_path / "aside", "new")
    write_texts(out, "somebody's")
    put(aside, out)
    assert (out / "0.txt").read_text() == "new"
    assert (tmp_path / "out.before-sparsec" / "0.txt").read_text() == "somebody's"
    with pytest.raises(ArtifactError, match="is no artifact of ours"):
        check_free(out, force=False)


# Signals


def wait_for(ready: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("moment", ["a pass", "the gate"])
def test_ctrl_c_is_exit_130_and_leaves_nothing(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path, moment: str
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    if moment == "a pass":
        running = cli.start(*compile_line(out, "--set", "rtpurbo.steps=100000"), cache=cache)
        wait_for(lambda: "closed form" in running.err.read_text())
    else:
        running = cli.start(*compile_line(out, "--set", "gate.windows=40"), cache=cache)
        wait_for(lambda: "gate: 0/40" in running.err.read_text())
        assert [name.partition("-")[0] for name in names(tmp_path)] == [".out.writing", "cache"]
    running.send(signal.SIGINT)
    result = running.wait()
    assert result.status == 130, result.err
    assert result.line == "sparsec: stopped; a compile continues where it was when it is called again"
    assert names(tmp_path) == ["cache"]
    assert [file for file in cache.rglob("*") if ".writing-" in file.name] == []
    assert cli(*compile_line(out), cache=cache).status == 0
    assert contents(out) == contents(tiny_artifact)


def kill_and_repeat(cli: Any, line: list[str], out: Path, cache: Path, delays: list[float]) -> None:
    """Start the command and kill it, again and again; at no moment is there half an artifact."""
    old = contents(out) if out.exists() else None
    new = None
    for delay in delays:
        running = cli.start(*line, cache=cache)
        time.sleep(delay)
        running.send(signal.SIGKILL)
        assert running.wait().status in (-signal.SIGKILL, 0)
        away = out.with_name(f".{out.name}.replaced")
        found = contents(out) if out.exists() else None
        if found is None:
            assert old is None or contents(away) == old
        elif found != old:
            files = {name: sha for name, sha in found.items() if name != MANIFEST}
            assert json.loads((out / MANIFEST).read_text())["files"] == files
            assert found == (new or found)
            new = found


def test_killed_at_any_moment_the_same_command_gives_the_same_artifact(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    rng = random.Random(0)
    kill_and_repeat(cli, compile_line(out), out, cache, [rng.uniform(0.2, 2.0) for _ in range(5)])
    assert cli(*compile_line(out), cache=cache).status == 0
    assert contents(out) == contents(tiny_artifact)
    assert names(tmp_path) == ["cache", "out"]
    assert [file for file in cache.rglob("*") if ".writing-" in file.name] == []


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True], ids=["nothing there", "an artifact there"])
def test_killed_twenty_times_the_same_command_gives_the_same_artifact(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path, before: bool
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    if before:
        assert cli(*compile_line(out, "--keep", "1")).status == 0
    rng = random.Random(1)
    kill_and_repeat(cli, compile_line(out), out, cache, [rng.uniform(0.05, 3.0) for _ in range(20)])
    assert cli(*compile_line(out), cache=cache).status == 0
    assert contents(out) == contents(tiny_artifact)
    assert names(tmp_path) == ["cache", "out"]
    assert [file for file in cache.rglob("*") if ".writing-" in file.name] == []


def test_two_compiles_at_once_under_one_name_both_succeed(
    cli: Any, compile_line: Callable[..., list[str]], tiny_artifact: Path, tmp_path: Path
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    running = [cli.start(*compile_line(out), cache=cache) for _ in range(2)]
    results = [each.wait() for each in running]
    assert [result.status for result in results] == [0, 0], [result.err for result in results]
    assert contents(out) == contents(tiny_artifact)
    assert names(tmp_path) == ["cache", "out"]
    assert is_artifact(out)
    assert read_plan(out) == read_plan(tiny_artifact)
