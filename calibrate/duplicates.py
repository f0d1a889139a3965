"""Near-duplicates: documents that share text, so that no split sees what another was made from.

A text's fingerprints are hashes of its stretches of 64 letters and digits; one in 16
is kept, chosen by its hash, so that equal stretches are kept alike. Spaces, line breaks, punctuation and
case do not count: text that was only wrapped anew is the same text. Two documents belong together when they
share a fifth of the shorter one's fingerprints. (Python 3.11's built-in text repeats sections whole or not
at all: any limit from 0.05 to 1 gives 55 to 57 groups.) What more than 16 documents share is boilerplate,
such as a licence, and counts only where it is half of the shorter one. Copies belong together however
short.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from sparsec.calibrate.corpus import Document

SPAN = 64  # letters and digits a fingerprint stands for
SAMPLE = 16  # one fingerprint in so many is kept
SHARED = 0.2  # of the shorter document's fingerprints
BOILERPLATE = 16  # documents; what more of them share counts only from SHARED_BOILERPLATE on
SHARED_BOILERPLATE = 0.5
BASE = 0x9E3779B97F4A7C15


def near_duplicates(documents: Sequence[Document]) -> list[list[int]]:
    """Groups of documents that share text, as indices; most groups are of one document."""
    leader = list(range(len(documents)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first: dict[str, int] = {}  # of every text, the first document that has it
    for i, document in enumerate(documents):
        leader[i] = first.setdefault(_bare(document.text), i)
    distinct = sorted(first.values())
    prints = {i: _fingerprints(bare) for bare, i in first.items()}
    rare: Counter[tuple[int, int]] = Counter()
    common: Counter[tuple[int, int]] = Counter()
    for owners in _sharers([prints[i] for i in distinct]):
        if len(owners) <= BOILERPLATE:
            rare.update(combinations(owners, 2))
        common.update((owners[0], other) for other in owners[1:])
    for shared, limit in ((rare, SHARED), (common, SHARED_BOILERPLATE)):
        for (a, b), count in shared.items():
            i, j = distinct[a], distinct[b]
            if count >= limit * min(len(prints[i]), len(prints[j])):
                low, high = sorted((find(i), find(j)))
                leader[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(len(documents)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def _bare(text: str) -> str:
    """Letters and digits of a text in lower case; all of it where it has none."""
    return re.sub(r"[\W_]+", "", text.casefold()) or text


def _fingerprints(bare: str) -> npt.NDArray[np.uint64]:
    """Sampled hashes of all stretches of SPAN characters, each once."""
    hashes = np.frombuffer(bare.encode("utf-32-le"), "<u4").astype(np.uint64)
    if len(hashes) < SPAN:
        return hashes[:0]
    width = 1
    while width < SPAN:  # a stretch's polynomial hash out of those of its halves, modulo 2**64
        hashes = hashes[:-width] * np.uint64(pow(BASE, width, 2**64)) + hashes[width:]
        width *= 2
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(BASE)
    return np.unique(hashes[hashes >> np.uint64(32) & np.uint64(SAMPLE - 1) == 0])


def _sharers(prints: Sequence[npt.NDArray[np.uint64]]) -> Iterator[list[int]]:
    """For each fingerprint that several documents have: the documents, ascending."""
    if not prints:
        return
    hashes = np.concatenate(prints)
    owners = np.repeat(np.arange(len(prints)), [len(each) for each in prints])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    edges = np.flatnonzero(np.diff(hashes)) + 1
    for start, end in zip([0, *edges], [*edges, len(hashes)], strict=True):
        if end - start > 1:
            yield owners[start:end].tolist()
