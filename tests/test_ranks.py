"""Several processes at one compile find what one process finds."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsec.calibrate import ranks
from sparsec.errors import UsageError
from sparsec.layout import TENSORS, read_json, read_plan

DISTILL = [
    f"distill.{setting}"
    for setting in ("context=512", "rows=64", "windows=4", "steps=3", "batch=3", "held_windows=1", "checks=3")
]


def launched(rank: int, port: int) -> dict[str, str]:
    """What accelerate launch and torchrun set for each of two processes."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return place | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def test_two_processes_find_the_same_pattern_and_train_the_same_step(
    cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    more = ["--passes", "rtpurbo,indexcache,distill", *(part for each in DISTILL for part in ("--set", each))]
    alone = cli(*compile_line(tmp_path / "one", *more), cache=tmp_path / "cache1")
    assert alone.status == 0, alone.err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line, cache = compile_line(tmp_path / "two", *more), tmp_path / "cache2"
    running = [cli.start(*line, cache=cache, env=launched(rank, port)) for rank in range(2)]
    first, second = (each.wait() for each in running)
    assert (first.status, second.status) == (0, 0), (first.err, second.err)
    assert "gate" in first.out
    assert second.out == second.err == ""
    assert read_plan(tmp_path / "one") == read_plan(tmp_path / "two")
    measured = [
        {each["name"]: each["measured"] for each in read_json(tmp_path / name / "measurements.json")["passes"]}
        for name in ("one", "two")
    ]
    assert measured[0]["rtpurbo"] == measured[1]["rtpurbo"]
    assert measured[0]["indexcache"] == measured[1]["indexcache"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-4, rtol=1e-3)
    assert (tmp_path / "one" / TENSORS).read_bytes() == (tmp_path / "two" / TENSORS).read_bytes()


def test_one_process_needs_no_group() -> None:
    assert ranks.join("cpu") == "cpu"
    assert (ranks.count(), ranks.is_first(), ranks.same(3), ranks.leave()) == (1, True, 3, True)
    assert ranks.in_order(ranks.own([1, 2, 3])) == [1, 2, 3]


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launched(0, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="device cuda:0 is for one process"):
        ranks.join("cuda:0")
