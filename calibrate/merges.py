"""Merges mined from calibration text, and what they save on text that they were not mined from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.calibrate.splits import Calibration
from sparsec.errors import CalibrationError, UsageError
from sparsec.events import Event, Listener, silent
from sparsec.plugins.byte_level import Boundary, ByteLevel, Pieces
from sparsec.plugins.merging import Merger, Rules, constituents, mine, spelling

CHUNK = 100_000  # characters tokenized at once
TRIED = 1_000_000  # characters on which wider pieces have to give the same tokens


@dataclass(frozen=True)
class Mined:
    """Merges on top of a tokenizer, in the order they apply."""

    base: ByteLevel
    boundary: Boundary
    first: int  # id of the first merged token
    merges: tuple[tuple[int, int, int], ...]  # left, right, merged token
    saved: tuple[int, ...]  # tokens that each saved on the train text
    tokens: int  # of the train text, in base tokens

    @property
    def constituents(self) -> list[tuple[int, ...]]:
        """The base tokens of each merged token."""
        return constituents(self.merges, self.first)

    @property
    def spelling(self) -> list[bytes]:
        """The bytes of each merged token."""
        known = {token: data for token, data in enumerate(self.base.bytes_of) if data is not None}
        return spelling(self.merges, known)

    def merger(self) -> tuple[Merger, Pieces]:
        """What applies the merges, and what finds the pieces for it."""
        return Merger(self.merges), Pieces(self.base, self.boundary)


def mine_text(
    calibration: Calibration,
    count: int,
    *,
    first: int,
    boundary: Boundary = "phrase",
    least: int = 4,
    listen: Listener = silent,
) -> Mined:
    """The ``count`` merges that save most tokens of the train text.

    Args:
        first: id of the first merged token; the model's embedding has that many rows.
        least: a pair that is there less often is left alone.

    Raises:
        SourceError: the tokenizer is none that merges can be put on.
        UsageError: its pieces cannot be as wide as ``boundary`` says.
        CalibrationError: no pair is frequent enough.
    """
    base = ByteLevel.of(calibration.tokenizer)
    texts = _chunks([document.text for document in calibration.texts("train")])
    if boundary != "pretoken" and not base.agrees(boundary, _first(texts, TRIED)):
        raise UsageError(f"inside a {boundary} this tokenizer gives other tokens than before: take boundary=pretoken")
    pieces = Pieces(base, boundary)
    sequences, tokens = [], 0
    for text in texts:
        ids = _ids(calibration.tokenizer, text)
        tokens += len(ids)
        sequences.append((ids, pieces(ids)))
    stage = "mine merges"
    listen(Event(stage, 0, count))
    found = mine(
        sequences,
        count,
        first,
        Rules(base, across=boundary == "phrase"),
        least=least,
        progress=lambda done: listen(Event(stage, done, count)),
    )
    listen(Event(stage, count, count))
    if not found:
        raise CalibrationError(
            f"no two neighbouring tokens of the train text are there {least} times: name more text with --calibration"
        )
    merges = tuple((merge.left, merge.right, merge.token) for merge in found)
    return Mined(base, boundary, first, merges, tuple(merge.saved for merge in found), tokens)


def saved_share(mined: Mined, tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Tokens of texts before and after, and the share that the merges save; JSON data.

    Args:
        tokenizer: the base model's.
    """
    merger, pieces = mined.merger()
    before = after = size = 0
    for text in _chunks(texts):
        ids = _ids(tokenizer, text)
        before += len(ids)
        after += len(merger(ids, pieces(ids))[0])
        size += len(text.encode())
    return {"base_tokens": before, "merged_tokens": after, "bytes": size, "saved": 1 - after / max(1, before)}


def batch_share(
    calibration: Calibration, *, boundary: Boundary, merges: int, least: int, seed: int, prompts: int = 8
) -> dict[str, Any]:
    """Tokens of a batch of held-out prompts (1024 tokens at most) before and after it is merged by itself; JSON data.

    Args:
        merges: merged tokens, at most.
        least: a pair that the batch has less often is left alone.
    """
    length = calibration.longest("heldout", 1024)
    rows = calibration.windows("heldout", length, min(prompts, calibration.available("heldout", length)), seed=seed)
    base = ByteLevel.of(calibration.tokenizer)
    pieces = Pieces(base, boundary)
    sequences = [(row, pieces(row)) for row in rows.tolist()]
    first = base.size
    found = mine(sequences, merges, first, Rules(base, across=boundary == "phrase"), least=least)
    before = rows.numel()
    after = before - sum(merge.saved for merge in found)
    sizes = {"prompts": len(rows), "base_tokens": before, "merged_tokens": after, "merges": len(found)}
    return {**sizes, "saved": 1 - after / before}


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _chunks(texts: Sequence[str]) -> list[str]:
    return [text[at : at + CHUNK] for text in texts for at in range(0, len(text), CHUNK)]


def _first(texts: Sequence[str], characters: int) -> list[str]:
    """As many of the texts as ``characters`` allow, one at least."""
    kept, total = [], 0
    for text in texts:
        kept.append(text)
        total += len(text)
        if total >= characters:
            break
    return kept
