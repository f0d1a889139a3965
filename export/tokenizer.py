"""Writes merged tokens into ``tokenizer.json``: more vocabulary, more merges, wider pieces; all else stays.

Merges that cross words need no added tokens: those would match inside longer words (" of the" in " of them"), and break
what they match in. Instead the pattern that splits text lets pieces be wider, and the merges do the rest. So
the tokens of whatever is not merged stay those of the base tokenizer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from sparsec.errors import SourceError
from sparsec.plugins.byte_level import Boundary, ByteLevel

FILE = "tokenizer.json"
# Older spellings of the same vocabulary: without the merges they would contradict tokenizer.json.
OTHER_FILES = ("vocab.json", "merges.txt", "added_tokens.json")


def merged_tokenizer(base: ByteLevel, merges: Sequence[tuple[int, int, int]], boundary: Boundary) -> dict[str, Any]:
    """The content of ``tokenizer.json`` with the merges.

    Args:
        merges: left, right, merged token, in the order they apply.

    Raises:
        SourceError: a merge would swallow a special or added token, or make one that is there already.
    """
    made = copy.deepcopy(base.description)
    vocabulary: dict[str, int] = made["model"]["vocab"]
    names = {token: word for word, token in vocabulary.items() if token not in base.added}
    listed = made["model"]["merges"]
    for left, right, token in merges:
        if left not in names or right not in names:
            special = left if left not in names else right
            raise SourceError(f"a merge would swallow the special token {special}: leave it out of the merges")
        word = names[left] + names[right]
        if word in vocabulary:
            raise SourceError(f"the merge into {word!r} makes a token that is there already: leave it out")
        vocabulary[word] = token
        names[token] = word
        pair = [names[left], names[right]]
        listed.append(" ".join(pair) if listed and isinstance(listed[0], str) else pair)  # older files have strings
    made["pre_tokenizer"] = base.splitting(boundary)
    return made


def with_description(tokenizer: Any, description: dict[str, Any]) -> Any:
    """A copy of a Transformers tokenizer that runs another ``tokenizer.json``."""
    other = copy.deepcopy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(description))
    return other


def text_of(description: Mapping[str, Any]) -> str:
    """``tokenizer.json`` as text."""
    return json.dumps(description, ensure_ascii=False, indent=2) + "\n"


def broken(description: dict[str, Any], texts: Sequence[str]) -> str | None:
    """The first text that does not come back as it went in; None where all do."""
    tokenizer = Tokenizer.from_str(json.dumps(description))
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            return text
    return None
