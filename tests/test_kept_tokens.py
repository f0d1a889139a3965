"""Tokens of long texts are kept: read once, told apart by tokenizer and text, made again where they are damaged."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from folders import write_texts

from sparsec.calibrate.corpus import Corpus, Document
from sparsec.calibrate.splits import Calibration
from sparsec.compiler import kept_tokens as module
from sparsec.compiler.kept_tokens import kept_tokens


def corpus(more: str = "") -> Corpus:
    rng = random.Random(7)
    lines = [" ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(10)) for _ in range(120)]
    return Corpus("c", tuple(Document(f"{n}", "\n\n".join(lines[n::6]) + more) for n in range(6)))


class Counting:
    """A tokenizer that counts its calls on more than one text."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, 0

    def __call__(self, texts: Any, **more: Any) -> Any:
        self.calls += isinstance(texts, list)
        return self.inner(texts, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture(autouse=True)
def _of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 1)


def test_the_second_reading_tokenises_nothing_and_finds_the_same(tmp_path: Path) -> None:
    tokenizer = Counting(byte_tokenizer())
    plain = Calibration(corpus(), tokenizer)
    calls = tokenizer.calls
    first, second = (Calibration(corpus(), tokenizer, keep=kept_tokens(tmp_path)) for _ in range(2))
    assert tokenizer.calls == 2 * calls
    assert plain.digest == first.digest == second.digest
    assert torch.equal(plain.windows("train", 100, 3), second.windows("train", 100, 3))


def test_other_text_and_another_tokenizer_are_read_anew(tmp_path: Path) -> None:
    tokenizer = Counting(byte_tokenizer())
    Calibration(corpus(), tokenizer, keep=kept_tokens(tmp_path))
    calls = tokenizer.calls
    assert Calibration(corpus("!"), tokenizer, keep=kept_tokens(tmp_path)).digest
    assert tokenizer.calls > calls
    other = Counting(copy.deepcopy(tokenizer.inner))
    other.inner.add_tokens(["abc"])
    found = Calibration(corpus(), other, keep=kept_tokens(tmp_path))
    assert other.calls
    assert found.digest == Calibration(corpus(), other).digest


def test_what_is_damaged_or_short_is_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Counting(byte_tokenizer())
    whole = Calibration(corpus(), tokenizer, keep=kept_tokens(tmp_path))
    for file in (tmp_path / "tokens").glob("*/tensors.safetensors"):
        file.write_bytes(file.read_bytes()[:-5])
    calls = tokenizer.calls
    assert Calibration(corpus(), tokenizer, keep=kept_tokens(tmp_path)).digest == whole.digest
    assert tokenizer.calls > calls
    monkeypatch.setattr(module, "LEAST", 1 << 30)
    Calibration(corpus(), tokenizer, keep=kept_tokens(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_commands_read_a_long_text_once(cli: Any, compile_line: Callable[..., list[str]], tmp_path: Path) -> None:
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(2000)]
    long = ("\n\n".join(" ".join(rng.choices(words, k=1000)) for _ in range(80)) for _ in range(4))
    texts, cache = write_texts(tmp_path / "texts", *long), tmp_path / "cache"
    common = ("--calibration", str(texts), "--set", "gate.max_loss=5")
    assert not cli(*compile_line(tmp_path / "out", *common), cache=cache).status
    (kept,) = (cache / "tokens").iterdir()
    written = (kept / "tensors.safetensors").stat()
    evaluated = ("--lengths", "256", "--windows", "1", "--prompts", "0", "-o", str(tmp_path / "eval.json"))
    assert not cli("eval", str(tmp_path / "out"), "--text", str(texts), *evaluated, cache=cache).status
    assert list((cache / "tokens").iterdir()) == [kept]
    assert (kept / "tensors.safetensors").stat().st_mtime_ns == written.st_mtime_ns
