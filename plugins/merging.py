"""Byte-pair merges over token ids: mined from sequences by frequency, and applied to sequences.

Dynamic tokenization (Feher, Vulić, Minixhofer, arXiv 2411.18553) merges the most frequent neighbouring pair of a batch,
again and again. The authors' code counts all pairs anew for every merge. Here the pairs' places are kept in lists
and their counts in a queue, as in the usual BPE training, so that mining is linear in the text and its merges.

Ties go to the pair with the smaller ids, so the same text always gives the same merges.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsec.plugins.byte_level import ByteLevel, spelled

EDGE = -1  # stands between pieces: no pair has it
DEAD = -2  # a place whose token went into the one before it
SPACES = b" \t\n\r\v\f"
LONGEST = 64  # bytes of a merged token

Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Merge:
    """Tokens ``left`` and ``right`` become ``token``; it saved ``saved`` tokens where it was mined."""

    left: int
    right: int
    token: int
    saved: int


class Rules:
    """Which pairs may merge, and the bytes of merged tokens.

    Never added tokens. No white space inside a token unless it is all white space, or a wide piece lets single spaces
    stand between words; two line breaks never merge (the authors' ``is_valid_pair``). No token that is there already.
    Bytes that are no whole characters may merge: that is where a badly served script gains.

    Args:
        across: spaces between words may lie inside a token.
    """

    def __init__(self, tokenizer: ByteLevel, *, across: bool) -> None:
        self.bytes_of: dict[int, bytes] = {n: data for n, data in enumerate(tokenizer.bytes_of) if data is not None}
        self._taken = {*tokenizer.vocabulary}
        self._across = across

    def allow(self, left: int, right: int) -> bool:
        """May the two become one token?"""
        first, second = self.bytes_of.get(left), self.bytes_of.get(right)
        if first is None or second is None:
            return False
        data = first + second
        if len(data) > LONGEST or spelled(data) in self._taken:
            return False
        blank = [byte in SPACES for byte in data]
        if all(blank):
            return b"\n\n" not in data
        if b"\n" in data or b"\r" in data:
            return False
        inside = any(blank[1:]) if self._across is False else blank[-1] or b"  " in data
        return not inside

    def add(self, left: int, right: int, token: int) -> None:
        """They have become ``token``."""
        self.bytes_of[token] = data = self.bytes_of[left] + self.bytes_of[right]
        self._taken.add(spelled(data))


def mine(
    sequences: Iterable[tuple[Sequence[int] | Array, Array]],
    count: int,
    first: int,
    rules: Rules,
    *,
    least: int = 2,
    progress: Callable[[int], None] | None = None,
) -> list[Merge]:
    """The ``count`` merges that save most, in the order they apply; fewer where no pair is left.

    Args:
        sequences: token ids, and the piece of each (:class:`~sparsec.plugins.byte_level.Pieces`).
        first: id of the first merged token.
        least: a pair that is there less often is not merged.
        progress: is told how many merges there are, now and then.
    """
    chain = _Chain(sequences, least)
    found: list[Merge] = []
    while len(found) < count:
        best = chain.best(least)
        if best is None:
            break
        pair, places = best
        if not rules.allow(*pair):
            chain.forget(pair)
            continue
        token = first + len(found)
        found.append(Merge(*pair, token, chain.join(pair, places, token)))
        rules.add(*pair, token)
        if progress is not None and len(found) % 256 == 0:
            progress(len(found))
    return found


class _Chain:
    """All sequences as one doubly linked list, with the count and the places of every pair."""

    def __init__(self, sequences: Iterable[tuple[Sequence[int] | Array, Array]], least: int) -> None:
        flat = _flatten(sequences)
        self.tokens: list[int] = flat.tolist()
        self.after = list(range(1, len(flat) + 1))
        self.before = list(range(-1, len(flat) - 1))
        self.count: dict[tuple[int, int], int] = {}
        self.places: dict[tuple[int, int], list[int]] = {}
        self.queue: list[tuple[int, int, int]] = []
        left, right = flat[:-1], flat[1:]
        real = np.flatnonzero((left >= 0) & (right >= 0))
        codes = (left[real] << 32) | right[real]
        order = np.argsort(codes, kind="stable")
        sorted_codes, sorted_places = codes[order], real[order]
        starts = np.flatnonzero(np.diff(sorted_codes, prepend=-1))
        sizes = np.diff(np.append(starts, len(sorted_codes)))
        for at in np.flatnonzero(sizes >= least):
            start, size = int(starts[at]), int(sizes[at])
            code = int(sorted_codes[start])
            pair = (code >> 32, code & 0xFFFFFFFF)
            self.count[pair] = size
            self.places[pair] = sorted_places[start : start + size].tolist()
            self.queue.append((-size, *pair))
        heapq.heapify(self.queue)

    def best(self, least: int) -> tuple[tuple[int, int], list[int]] | None:
        """The most frequent pair and its places, which do not overlap; None where no pair is frequent enough."""
        while self.queue:
            negative, left, right = heapq.heappop(self.queue)
            pair = (left, right)
            counted = self.count.get(pair, 0)
            if counted < least:
                continue
            if left == right:  # of three in a row only two merge: their number is not that of the pairs
                places = self._live(pair)
                if len(places) == -negative:
                    return pair, places
                if len(places) >= least:
                    heapq.heappush(self.queue, (-len(places), left, right))
                continue
            if counted != -negative:
                if counted < -negative:
                    heapq.heappush(self.queue, (-counted, left, right))
                continue
            return pair, self._live(pair)
        return None

    def forget(self, pair: tuple[int, int]) -> None:
        """Never offer the pair again."""
        self.count.pop(pair, None)
        self.places.pop(pair, None)

    def join(self, pair: tuple[int, int], places: Sequence[int], token: int) -> int:
        """Make one token of the pair at its places; how often."""
        tokens, after, before, count = self.tokens, self.after, self.before, self.count
        left, right = pair
        made: dict[tuple[int, int], list[int]] = {}
        end = len(tokens)
        for place in places:
            second = after[place]
            ahead, behind = before[place], after[second]
            if ahead >= 0 and (near := tokens[ahead]) >= 0:
                old = (near, left)
                if old in count:
                    count[old] -= 1
                made.setdefault((near, token), []).append(ahead)
            if behind < end and (near := tokens[behind]) >= 0:
                old = (right, near)
                if old in count:
                    count[old] -= 1
                made.setdefault((token, near), []).append(place)
            tokens[place], tokens[second] = token, DEAD
            after[place] = behind
            if behind < end:
                before[behind] = place
        self.forget(pair)
        for new, where in made.items():
            # Two merged tokens side by side: what was noted before the second of them became one is stale.
            live = [place for place in where if self._is(new, place)]
            if live:
                live = sorted(set(live))
                count[new] = len(live)
                self.places[new] = live
                heapq.heappush(self.queue, (-len(live), *new))
        return len(places)

    def _is(self, pair: tuple[int, int], place: int) -> bool:
        behind = self.after[place]
        return self.tokens[place] == pair[0] and behind < len(self.tokens) and self.tokens[behind] == pair[1]

    def _live(self, pair: tuple[int, int]) -> list[int]:
        """Places of the pair, from left to right, none of which shares a token with another."""
        live = [place for place in self.places[pair] if self._is(pair, place)]
        if pair[0] != pair[1]:
            return live
        apart: list[int] = []
        for place in live:
            if not apart or self.after[apart[-1]] != place:
                apart.append(place)
        return apart


def _flatten(sequences: Iterable[tuple[Sequence[int] | Array, Array]]) -> Array:
    """All token ids one after the other, :data:`EDGE` between pieces and around what may not merge."""
    parts: list[Array] = [np.array([EDGE], dtype=np.int64)]
    for ids, pieces in sequences:
        tokens = np.where(pieces >= 0, np.asarray(ids, dtype=np.int64), EDGE)
        changes = np.flatnonzero(np.diff(pieces)) + 1
        parts += [np.insert(tokens, changes, EDGE), np.array([EDGE], dtype=np.int64)]
    return np.concatenate(parts)


class Merger:
    """Applies merges to token sequences as a tokenizer does: by rank, then from left to right, inside pieces."""

    def __init__(self, merges: Sequence[tuple[int, int, int]]) -> None:
        self._ranks = {(left, right): (rank, token) for rank, (left, right, token) in enumerate(merges)}

    def __call__(self, ids: Sequence[int], pieces: Array) -> tuple[list[int], list[int]]:
        """The merged ids, and of each how many of the given tokens it stands for."""
        tokens, spans = list(map(int, ids)), [1] * len(ids)
        after = list(range(1, len(tokens) + 1))
        before = list(range(-1, len(tokens) - 1))
        home = pieces.tolist()
        ranks = self._ranks
        queue = [
            (*found, place)
            for place in range(len(tokens) - 1)
            if home[place] == home[place + 1] >= 0 and (found := ranks.get((tokens[place], tokens[place + 1])))
        ]
        heapq.heapify(queue)

        def offer(place: int) -> None:
            behind = after[place]
            if place >= 0 and behind < len(tokens) and home[place] == home[behind] >= 0:
                found = ranks.get((tokens[place], tokens[behind]))
                if found is not None:
                    heapq.heappush(queue, (*found, place))

        while queue:
            rank, token, place = heapq.heappop(queue)
            behind = after[place]
            if tokens[place] == DEAD or behind >= len(tokens):
                continue
            if ranks.get((tokens[place], tokens[behind])) != (rank, token):
                continue
            tokens[place], tokens[behind] = token, DEAD
            spans[place] += spans[behind]
            after[place] = after[behind]
            if after[behind] < len(tokens):
                before[after[behind]] = place
            if before[place] >= 0:
                offer(before[place])
            offer(place)
        kept = [place for place, token in enumerate(tokens) if token != DEAD]
        return [tokens[place] for place in kept], [spans[place] for place in kept]


def constituents(merges: Sequence[tuple[int, int, int]], first: int) -> list[tuple[int, ...]]:
    """Of each merged token the base tokens that it stands for, in order; ids below ``first`` are base tokens."""
    found: dict[int, tuple[int, ...]] = {}

    def of(token: int) -> tuple[int, ...]:
        return found[token] if token >= first else (token,)

    for left, right, token in merges:
        found[token] = of(left) + of(right)
    return list(found.values())


def spelling(merges: Sequence[tuple[int, int, int]], bytes_of: Mapping[int, bytes]) -> list[bytes]:
    """The bytes of each merged token."""
    own = dict(bytes_of)
    for left, right, token in merges:
        own[token] = own[left] + own[right]
    return [own[token] for _, _, token in merges]
