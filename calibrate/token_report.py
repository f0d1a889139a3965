"""What a tokenizer does to text: how many tokens, how well its vocabulary is used, and what comes back.

Fertility is tokens a word, and characters a token its like for scripts without spaces. Rényi efficiency (Zouhar et al.,
arXiv 2306.16842, alpha 2.5) is the entropy of the tokens as a share of what the vocabulary could hold. A token is
unreachable when its own text is never read as it. All figures hold for one text: they cross tokenizers, perplexity
does not.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from sparsec.plugins.byte_level import ByteLevel

ALPHA = 2.5
LINES = 2000  # lines of each group that are tried for the round trip
LETTERS = 2000  # of a text, from which its script is told
# Han beside kana is Japanese; Unicode's names say CJK for Han.
NAMES = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese"}


def script(text: str) -> str:
    """The script that most letters of a text are in, by their Unicode names: ``Latin``, ``Cyrillic``, ``Han``.

    Text with kana in it, one letter in ten at least, is ``Japanese``; text without letters is ``none``.
    """
    letters = [character for character in text[: 20 * LETTERS] if character.isalpha()][:LETTERS]
    found: Counter[str] = Counter()
    for letter in letters:
        word = unicodedata.name(letter, "OTHER").split(" ")[0].split("-")[0]
        found[NAMES.get(word, word.capitalize())] += 1
    if not found:
        return "none"
    return "Japanese" if 10 * found["Japanese"] >= len(letters) else found.most_common(1)[0][0]


def by_script(texts: Sequence[str]) -> dict[str, list[str]]:
    """Texts by their script, the most text first."""
    found: dict[str, list[str]] = {}
    for text in texts:
        found.setdefault(script(text), []).append(text)
    return dict(sorted(found.items(), key=lambda item: -sum(map(len, item[1]))))


def on_text(tokenizer: Tokenizer, texts: Sequence[str], size: int) -> dict[str, Any]:
    """A tokenizer on texts: JSON data.

    Args:
        tokenizer: special tokens are not added.
        texts: read one by one.
        size: tokens of the vocabulary.

    Returns:
        counts (bytes, characters, words, tokens), ``fertility`` (null without words), ``characters_a_token``,
        ``renyi_efficiency`` and ``used`` (shares of 1), and of the first lines how many were tried and how many did
        not come back as they were.
    """
    counts: Counter[int] = Counter()
    for encoded in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoded.ids)
    tokens = sum(counts.values())
    characters, words = sum(map(len, texts)), sum(len(text.split()) for text in texts)
    power = sum((number / max(1, tokens)) ** ALPHA for number in counts.values())
    entropy = math.log(power) / (1 - ALPHA) if counts else 0.0
    lines = [line for text in texts for line in text.splitlines() if line.strip()][:LINES]
    return {
        "bytes": sum(len(text.encode()) for text in texts),
        "characters": characters,
        "words": words,
        "tokens": tokens,
        "fertility": tokens / words if words else None,
        "characters_a_token": characters / max(1, tokens),
        "renyi_efficiency": entropy / math.log(size),
        "used": len(counts) / size,
        "lines": len(lines),
        "lost_lines": lost(tokenizer, lines),
    }


def lost(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """How many texts do not come back as they went in."""
    ids = [encoded.ids for encoded in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    back = tokenizer.decode_batch(ids, skip_special_tokens=False)
    return sum(found != text for found, text in zip(back, texts, strict=True))


def on_vocabulary(own: ByteLevel, tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens of a vocabulary, those whose text is never read as them, and those that spell what another spells.

    Tokens that are no whole characters cannot be written as text: they are counted in ``parts`` and not tried.
    """
    texts: dict[int, str] = {}
    parts, spelling = 0, Counter(data for data in own.bytes_of if data is not None)
    for token, data in enumerate(own.bytes_of):
        if data is None:
            continue
        try:
            texts[token] = data.decode()
        except UnicodeDecodeError:
            parts += 1
    read = tokenizer.encode_batch(list(texts.values()), add_special_tokens=False)
    unreachable = sum(encoded.ids != [token] for token, encoded in zip(texts, read, strict=True))
    return {
        "tokens": sum(spelling.values()),
        "parts": parts,
        "unreachable": unreachable,
        "duplicated": sum(number - 1 for number in spelling.values()),
    }


def compare(before: ByteLevel, after: ByteLevel, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Two tokenizers side by side: their vocabularies, and each group of texts; JSON data."""
    found: dict[str, Any] = {"vocabulary": {}, "texts": {name: {} for name in groups}}
    for which, own in (("before", before), ("after", after)):
        tokenizer = own.tokenizer()
        found["vocabulary"][which] = on_vocabulary(own, tokenizer)
        for name, texts in groups.items():
            found["texts"][name][which] = on_text(tokenizer, texts, len(own.vocabulary))
    return found
