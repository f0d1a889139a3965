"""Byte-level BPE tokenizers, read from their ``tokenizer.json``: the bytes of a token, and what merges may not cross.

A *piece* is a run of text that merges stay in. The narrowest are the tokenizer's own pretokens. Wider ones hold several
pretokens, in a way that the tokenizer still gives the same tokens inside them: words, and between words single
spaces, hyphens, a comma. A vocabulary that was trained on pretokens has no token that spans two of them, so nothing but
new merges joins what the wide piece holds; :meth:`ByteLevel.agrees` tries it on text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from sparsec.errors import SourceError, UsageError

Boundary = Literal["pretoken", "word", "phrase"]
FITS = "fast byte-level BPE tokenizers without normalizer fit (GPT-2's kind: Llama 3, Qwen 2, SmolLM)"
# What ByteLevel(use_regex=True) splits by.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LETTERS = r"\p{L}[\p{L}\p{M}]*"
# Wide pieces start and end where pretokens do, and hold no digits and no line breaks. Sixteen words bound the work.
WIDE: dict[Boundary, str] = {
    "word": rf" ?{LETTERS}(?:-{LETTERS})*(?:[,.;:](?= ))?",
    "phrase": rf" ?{LETTERS}(?:(?:,? |-){LETTERS}){{0,15}}(?:[,.;:](?= ))?",
}
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves as characters
_OTHERS = sorted(set(range(256)) - set(_PRINTED))
ALPHABET = {chr(b): b for b in _PRINTED} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}
_AS_CHARACTER = {byte: character for character, byte in ALPHABET.items()}
UNKNOWN = "\ufffd"


def spelled(data: bytes) -> str:
    """Bytes as a byte-level vocabulary spells them, a character each."""
    return "".join(map(_AS_CHARACTER.__getitem__, data))


class ByteLevel:
    """A tokenizer's description (the content of ``tokenizer.json``) and what merges need to know of it.

    Raises:
        SourceError: it is no byte-level BPE, or its normalizer changes text.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description
        _check(description)
        self.vocabulary: dict[str, int] = description["model"]["vocab"]
        self.added = {int(each["id"]) for each in description.get("added_tokens", ())}

    @classmethod
    def of(cls, tokenizer: Any) -> ByteLevel:
        """That of a Transformers tokenizer.

        Raises:
            SourceError: see the class; also for a tokenizer without a fast backend.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise SourceError(f"{type(tokenizer).__name__} has no fast backend: {FITS}")
        return cls(json.loads(backend.to_str()))

    def tokenizer(self) -> Tokenizer:
        """One that runs the description."""
        return Tokenizer.from_str(json.dumps(self.description))

    @cached_property
    def size(self) -> int:
        """One more than the highest id."""
        return max([*self.vocabulary.values(), *self.added]) + 1

    @cached_property
    def bytes_of(self) -> list[bytes | None]:
        """By id: the bytes of a token; None for added tokens (special ones, a chat's marks) and ids without a token."""
        found: list[bytes | None] = [None] * self.size
        for word, number in self.vocabulary.items():
            if number not in self.added and all(character in ALPHABET for character in word):
                found[number] = bytes(ALPHABET[character] for character in word)
        return found

    @cached_property
    def parts(self) -> dict[int, tuple[int, int]]:
        """The two tokens that a token of the vocabulary is merged from, by id, in the order of the merges."""
        found: dict[int, tuple[int, int]] = {}
        for merge in self.description["model"]["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            found.setdefault(self.vocabulary[left + right], (self.vocabulary[left], self.vocabulary[right]))
        return found

    def splitting(self, boundary: Boundary) -> dict[str, Any]:
        """The pretokenizer, as in ``tokenizer.json``, whose pieces are as wide as ``boundary`` says.

        Raises:
            UsageError: this tokenizer's pieces cannot be widened.
        """
        own: dict[str, Any] = self.description["pre_tokenizer"]
        if boundary == "pretoken":
            return copy.deepcopy(own)
        way_out = "take boundary=pretoken"
        if self.description["model"].get("ignore_merges"):
            raise UsageError(f"this tokenizer takes whole pretokens past its merges (ignore_merges): {way_out}")
        steps = copy.deepcopy(own["pretokenizers"] if own["type"] == "Sequence" else [own])
        wide = WIDE[boundary]
        for at, step in enumerate(steps):
            if step["type"] == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated":
                step["pattern"] = {"Regex": f"{wide}|{step['pattern']['Regex']}"}
                return {"type": "Sequence", "pretokenizers": steps}
            # One that does not split at all takes the same pattern: agrees() tells whether its tokens stay in it.
            if step["type"] == "ByteLevel" and (step.get("use_regex", True) or at == 0):
                pattern = {"Regex": f"{wide}|{GPT2}"}
                split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
                steps[at : at + 1] = [split, {**step, "use_regex": False}]
                return {"type": "Sequence", "pretokenizers": steps}
        raise UsageError(f"this tokenizer splits text in a way whose pieces cannot be widened: {way_out}")

    def agrees(self, boundary: Boundary, texts: Sequence[str]) -> bool:
        """Does the tokenizer give the same tokens where its pieces are that wide?"""
        own, wide = (
            Tokenizer.from_str(json.dumps({**self.description, "pre_tokenizer": splitting, "post_processor": None}))
            for splitting in (self.description["pre_tokenizer"], self.splitting(boundary))
        )
        return all(own.encode(text).ids == wide.encode(text).ids for text in texts)


class Pieces:
    """Finds the pieces that tokens lie in, from the tokens alone."""

    def __init__(self, tokenizer: ByteLevel, boundary: Boundary) -> None:
        self._bytes = tokenizer.bytes_of
        # The model is of no matter for splitting; an empty one is made fast.
        empty = {"type": "BPE", "vocab": {}, "merges": []}
        splitting = {"version": "1.0", "model": empty, "pre_tokenizer": tokenizer.splitting(boundary)}
        self._split = Tokenizer.from_str(json.dumps(splitting)).pre_tokenizer

    def __call__(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64 [len(ids)]: the number of the piece that each token lies in, ascending; -1 where none may merge.

        Tokens that lie in two pieces, and added ones, may not.
        """
        pieces = np.full(len(ids), -1, dtype=np.int64)
        start, number = 0, 0
        while start < len(ids):
            run: list[bytes] = []
            while start + len(run) < len(ids) and (data := self._of(ids[start + len(run)])) is not None:
                run.append(data)
            if run:
                found = _piece_numbers(self._split, run)
                pieces[start : start + len(run)] = np.where(found >= 0, found + number, -1)
                number = max(number, int(pieces.max()) + 1)
            start += len(run) + 1
        return pieces

    def _of(self, token: int) -> bytes | None:
        return self._bytes[token] if 0 <= token < len(self._bytes) else None


def _piece_numbers(split: Any, run: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The piece of every token of a run without added tokens; -1 for one that lies in several."""
    # A byte that belongs to no character, at the ends of a window, counts as a character of its own.
    text = b"".join(run).decode("utf-8", "surrogateescape")
    points = np.array([ord(character) for character in text], dtype=np.int64)
    odd = (points >= 0xDC80) & (points <= 0xDCFF)
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    sizes[odd] = 1
    ends = np.cumsum(sizes)
    clean = (
        "".join(UNKNOWN if bad else character for character, bad in zip(text, odd, strict=True)) if odd.any() else text
    )
    last = [end for _, (_, end) in split.pre_tokenize_str(clean)]
    edges = ends[np.array(last, dtype=np.int64) - 1]  # bytes behind each piece
    behind = np.cumsum([len(data) for data in run])
    first = np.searchsorted(edges, behind - np.array([len(data) for data in run]), side="right")
    final = np.searchsorted(edges, behind - 1, side="right")
    return np.where(first == final, first, -1)


def _check(description: dict[str, Any]) -> None:
    model, normalizer = description["model"], description.get("normalizer")
    steps = description.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if model["type"] != "BPE" or model.get("byte_fallback") or not any(s.get("type") == "ByteLevel" for s in steps):
        raise SourceError(f"the tokenizer ({model['type']}) is not byte-level, merges of bytes have no place: {FITS}")
    if normalizer is not None and not _keeps_text(normalizer):
        raise SourceError(f"the tokenizer's normalizer ({normalizer['type']}) changes text for good: {FITS}")
    if any(step.get("add_prefix_space") for step in steps):
        raise SourceError(f"the tokenizer puts a space before texts, which is lost in the round trip: {FITS}")


def _keeps_text(normalizer: dict[str, Any]) -> bool:
    """NFC alone is let through: Qwen has it, and it changes the form of text, not what is read."""
    return normalizer["type"] == "NFC" or (normalizer["type"] == "Sequence" and not normalizer["normalizers"])
