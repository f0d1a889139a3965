"""One corpus, split once into train, search and held-out documents, and token windows out of them.

No document is in two splits, and no near-duplicate either: documents that repeat each other's text form a
group, and a group goes to one split as a whole. Windows never cross documents.

**Near-duplicates** are found in duplicates.py.

**Assignment.** Large groups first, in an order drawn from the seed, each to the split that is furthest
below its share: of windows of 2048 tokens (of 512 where long documents are rare), then of tokens. So the
three largest groups go to three splits.

**Cut.** Where fewer than three groups have a document of 2048 tokens (else of 512), one that is long enough
is cut at paragraph breaks into three contiguous parts, one a split; some text between them is dropped. So
one book is enough, and every split gets windows where the text allows it at all.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError

from sparsec.calibrate.corpus import Corpus, Document
from sparsec.calibrate.duplicates import near_duplicates
from sparsec.errors import CalibrationError, UsageError

SPLITS = ("train", "search", "heldout")
# Tokens of the windows that every split should get: the longer ones if the text allows, else the shorter.
LENGTHS = (2048, 512)
SHORTEST_PART = 64  # tokens; less than this is not worth being a split
BATCH = 1 << 24  # characters that are tokenised at once, and what the last text has beyond them

Texts = Sequence[str]
KeepTokens = Callable[[Any, Texts, Callable[[], list[torch.Tensor]]], list[torch.Tensor]]


class Calibration:
    """A corpus under a tokenizer, split once; the same arguments always give the same windows.

    Args:
        corpus: the documents.
        tokenizer: a Transformers tokenizer. Where it puts a BOS token before a text, so does every window.
        seed: decides which groups go where, and which windows are drawn.
        shares: of train, search and held-out; positive, sum 1.
        keep: has the tokens of texts that this tokenizer read before, or makes them; None makes them every time.

    Raises:
        CalibrationError: the text is too little, or too much alike, for three splits.
        UsageError: the shares are no shares.
    """

    digest: str
    """sha256 over corpus, tokens, splits, shares and seed: exactly what :meth:`windows` can give."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any,
        *,
        seed: int = 0,
        shares: tuple[float, float, float] = (0.6, 0.25, 0.15),
        keep: KeepTokens | None = None,
    ) -> None:
        if len(shares) != 3 or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise UsageError(f"the shares of {', '.join(SPLITS)} are {shares}: give three positive ones of sum 1")
        self.corpus = corpus
        self.seed = seed
        self.shares = shares
        self.tokenizer = tokenizer
        self._keep = keep
        bos = getattr(tokenizer, "bos_token_id", None)
        self._bos: int | None = bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None
        self._cut: str | None = None
        self._dropped = 0
        self._chats = 0  # documents written by the chat template
        self._groups: list[list[str]] = []
        self._texts: dict[str, list[Document]] = {split: [] for split in SPLITS}
        self._tokens: dict[str, list[torch.Tensor]] = {split: [] for split in SPLITS}
        self._split()
        self.digest = self._digest()

    def texts(self, split: str) -> tuple[Document, ...]:
        """The documents of a split, in the corpus's order."""
        return tuple(self._texts[_known(split)])

    def tokens(self, split: str) -> int:
        """Tokens of a split's documents, BOS not counted."""
        return sum(len(ids) for ids in self._tokens[_known(split)])

    def available(self, split: str, length: int) -> int:
        """How many windows of ``length`` tokens :meth:`windows` can give."""
        body = self._body(length)
        return sum(len(ids) // body for ids in self._tokens[_known(split)])

    def longest(self, split: str, most: int, count: int = 1) -> int:
        """Tokens of the longest windows, ``most`` at most, of which the split has ``count``; 0 if there are none."""
        lengths = range(2, most + 1)  # one token beside BOS, and more
        fitting = bisect.bisect_left(lengths, True, key=lambda length: self.available(split, length) < count)
        return lengths[fitting - 1] if fitting else 0

    def windows(self, split: str, length: int, count: int, *, seed: int = 0) -> torch.Tensor:
        """Token windows, none across documents, no two overlapping, drawn at random.

        A document of n tokens has floor(n / length) of them, from an offset that the seed draws. A larger
        ``count`` only adds windows: the first ones stay the same.

        Returns:
            int64 ``[count, length]``; ``length`` includes the BOS token where the model has one.

        Raises:
            CalibrationError: the split has fewer windows of that length.
            UsageError: an unknown split, or no positive number of windows.
        """
        if count < 1:
            raise UsageError(f"{count} windows are asked for: ask for one or more")
        body = self._body(length)
        documents = self._tokens[_known(split)]
        most = self.available(split, length)
        if most < count:
            longest = max((len(ids) for ids in documents), default=0)
            raise CalibrationError(
                f"the {split} text has {most} of the {count} windows of {length} tokens that are needed: "
                f"the longest of its {len(documents)} documents has {longest} tokens, all together "
                f"{self.tokens(split)}; name more or longer text with --calibration, or set a shorter context"
            )
        rng = random.Random(f"{self.seed}/{split}/{length}/{seed}")
        starts: list[tuple[torch.Tensor, int]] = []
        for ids in documents:
            fitting = len(ids) // body
            offset = rng.randint(0, len(ids) - fitting * body)
            starts += [(ids, offset + number * body) for number in range(fitting)]
        rng.shuffle(starts)
        out = torch.stack([ids[start : start + body] for ids, start in starts[:count]]).long()
        if self._bos is None:
            return out
        return torch.cat([torch.full((count, 1), self._bos), out], dim=1)

    def describe(self) -> dict[str, Any]:
        """What was used and how it was split, as JSON data."""
        return {
            "spec": self.corpus.spec,
            "made_of": self.corpus.made_of,
            "corpus_digest": self.corpus.digest,
            "digest": self.digest,
            "seed": self.seed,
            "shares": dict(zip(SPLITS, self.shares, strict=True)),
            "bos": self._bos is not None,
            "chats": self._chats,
            "documents": {split: len(self._texts[split]) for split in SPLITS},
            "tokens": {split: self.tokens(split) for split in SPLITS},
            "longest_document": {split: max(map(len, self._tokens[split])) for split in SPLITS},
            "near_duplicates": {
                "groups": len(self._groups),
                "documents": sum(map(len, self._groups)),
                "largest": sorted(self._groups, key=len, reverse=True)[0][:20] if self._groups else [],
            },
            "cut": self._cut is not None,
            "cut_document": self._cut,
            "dropped_near_duplicates": self._dropped,
        }

    def _body(self, length: int) -> int:
        """Tokens of a window that come out of a document."""
        body = length - (self._bos is not None)
        if body < 1:
            raise UsageError(f"windows of {length} tokens hold no text: ask for longer ones")
        return body

    def _encode(self, documents: Iterable[Document]) -> list[torch.Tensor]:
        """Tokens of each, int32; windows bring their own BOS token."""
        texts = [self._written(document) for document in documents]
        make = partial(_tokenised, self.tokenizer, texts)
        found = make() if self._keep is None else self._keep(self.tokenizer, texts, make)
        # The template may have put one there.
        return [ids[int(self._bos is not None and ids[:1].tolist() == [self._bos]) :] for ids in found]

    def _written(self, document: Document) -> str:
        """A chat as the tokenizer's template writes it; its contents where there is none, or it refuses the roles."""
        if not document.messages or not getattr(self.tokenizer, "chat_template", None):
            return document.text
        messages = [{"role": role, "content": content} for role, content in document.messages]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, KeyError):
            return document.text
        self._chats += 1
        return text

    def _split(self) -> None:
        documents = list(self.corpus.documents)
        tokens = self._encode(documents)
        groups = [group for group in near_duplicates(documents) if any(len(tokens[i]) for i in group)]
        self._groups = [[documents[i].name for i in group] for group in groups if len(group) > 1]
        parts: list[int] = []
        whole = _to_cut(groups, [len(ids) for ids in tokens], self.shares)
        if whole is not None:
            parts = list(range(len(documents), len(documents) + len(SPLITS)))
            documents += cut(documents[whole], self.shares)
            tokens += self._encode(documents[i] for i in parts)
            if min(len(tokens[i]) for i in parts) < SHORTEST_PART:
                raise _too_little(groups, [len(ids) for ids in tokens[: parts[0]]])
            group = next(group for group in groups if whole in group)
            groups.remove(group)
            self._cut, self._dropped = documents[whole].name, len(group) - 1
        lengths = [len(ids) for ids in tokens]
        for split, members in assign(groups, parts, lengths, self.shares, self.seed).items():
            self._texts[split] = [documents[i] for i in members]
            self._tokens[split] = [tokens[i] for i in members]

    def _digest(self) -> str:
        digest = hashlib.sha256()
        digest.update(json.dumps([self.corpus.digest, self.seed, self.shares, self._bos]).encode())
        for split in SPLITS:
            for document, ids in zip(self._texts[split], self._tokens[split], strict=True):
                digest.update(json.dumps([split, document.name, len(ids)]).encode())
                digest.update(ids.numpy().astype("<i4").tobytes())
        return digest.hexdigest()


def _tokenised(tokenizer: Any, texts: Texts) -> list[torch.Tensor]:
    """Several at once, since a tokenizer has a thread a text."""
    found: list[torch.Tensor] = []
    batch: list[str] = []
    characters = 0
    for number, text in enumerate(texts, start=1):
        batch.append(text)
        characters += len(text)
        if number == len(texts) or characters >= BATCH:
            # verbose=False: documents longer than the model's context are meant to be, and windows never are.
            ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            found += [torch.tensor(each, dtype=torch.int32) for each in ids]
            batch, characters = [], 0
    return found


def cut(document: Document, shares: Sequence[float]) -> list[Document]:
    """Three contiguous parts of a document in the given shares; 1 to 5 % is dropped between two of them.

    The parts end at paragraph breaks where there are any nearby, else at line breaks, else between words.
    """
    text = document.text
    gap = max(len(text) // 100, min(len(text) // 40, 500))
    points = [int(len(text) * sum(shares[:number])) for number in range(1, len(shares))]
    starts = [0, *(_break_in(text, point + gap // 2, point + gap) for point in points)]
    ends = [*(_break_in(text, point - gap, point - gap // 2) for point in points), len(text)]
    return [
        Document(f"{document.name}, part {number} of {len(shares)}", text[start:end].strip())
        for number, (start, end) in enumerate(zip(starts, ends, strict=True), start=1)
    ]


def assign(
    groups: Sequence[list[int]],
    parts: Sequence[int],
    lengths: Sequence[int],
    shares: Sequence[float],
    seed: int,
) -> dict[str, list[int]]:
    """Which documents go to which split: each group to one, the parts of a cut document to one split each.

    Args:
        groups: indices of documents that must stay together.
        parts: indices of the three parts of a cut document; else empty.
        lengths: tokens of each document.
        shares: of the splits.
        seed: for the order of groups of like size.
    """
    share = dict(zip(SPLITS, shares, strict=True))
    members: dict[str, list[int]] = {split: [] for split in SPLITS}
    windows, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    third = _third_longest([*groups, *([i] for i in parts)], lengths)
    reference = next((length for length in LENGTHS if length <= third), 1)

    def count(group: Sequence[int]) -> int:
        return sum(lengths[i] // reference for i in group)

    def add(split: str, group: Sequence[int]) -> None:
        members[split] += group
        windows[split] += count(group)
        tokens[split] += sum(lengths[i] for i in group)

    def fill(split: str, counted: int) -> tuple[float, float, float]:
        by_windows = windows[split] / share[split] if counted else 0.0
        return by_windows, tokens[split] / share[split], -share[split]

    for split, part in zip(SPLITS, parts, strict=False):
        add(split, [part])
    order = list(groups)
    random.Random(f"{seed}/assign").shuffle(order)
    # Sorted by powers of two: among groups of about one size the seed's order stays.
    for group in sorted(order, key=lambda group: -count(group).bit_length()):
        counted = count(group)
        add(min(SPLITS, key=lambda split: fill(split, counted)), group)
    return {split: sorted(indices) for split, indices in members.items()}


def _to_cut(groups: Sequence[list[int]], lengths: Sequence[int], shares: Sequence[float]) -> int | None:
    """The document that has to be cut for every split to get text, and can be; else None."""
    if not groups:
        raise _too_little(groups, lengths)
    whole = max((i for group in groups for i in group), key=lambda i: lengths[i])
    group = next(group for group in groups if whole in group)
    # Its near-duplicates would be dropped, and must not be most of the text.
    alone = sum(lengths[i] for i in group) <= 2 * lengths[whole]
    for length in LENGTHS:
        if _third_longest(groups, lengths) >= length:
            return None
        if alone and lengths[whole] * min(shares) >= 1.2 * length:  # the gaps take up to a sixth of the smallest
            return whole
    if len(groups) >= len(SPLITS):
        return None
    if alone:
        return whole
    raise CalibrationError(
        f"the {len(lengths)} documents repeat each other's text, only {len(groups)} differ, and three splits "
        "need three: name other text with --calibration, or one of the copies alone"
    )


def _third_longest(groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Tokens up to which three groups have a document, one for each split; 0 where there are no three."""
    longest = sorted((max(lengths[i] for i in group) for group in groups), reverse=True)
    return longest[2] if len(longest) >= len(SPLITS) else 0


def _too_little(groups: Sequence[list[int]], lengths: Sequence[int]) -> CalibrationError:
    return CalibrationError(
        f"{sum(lengths)} tokens in {len(groups)} different documents are too little text for three splits: "
        "name more with --calibration"
    )


def _known(split: str) -> str:
    if split not in SPLITS:
        raise UsageError(f"no split is named {split!r}: use {', '.join(SPLITS)}")
    return split


def _break_in(text: str, low: int, high: int) -> int:
    """Just behind the first paragraph break in ``low .. high``, else line break, else space; else ``low``."""
    for pattern in (r"\n[^\S\n]*\n\s*", r"\n", r"\s+"):
        found = re.compile(pattern).search(text, low, high)
        if found:
            return found.end()
    return low
