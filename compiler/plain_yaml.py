"""YAML from anywhere: safe-loaded, not too deep, and without aliases, by which little text becomes much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 20  # characters
DEEPEST = 32


class NotPlain(Exception):
    """The text is no YAML that is read here; the message is one line."""


class _Loader(yaml.SafeLoader):
    """Safe, and every node is there once."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read(path: Path) -> Any:
    """A file's data.

    Raises:
        NotPlain: it is no UTF-8, no YAML, or larger or deeper than anything of ours.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    try:
        return parse(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NotPlain(str(error)) from None


def parse(text: str) -> Any:
    """The data of a text; see :func:`read`."""
    if len(text) > LARGEST:
        raise NotPlain(f"it has more than {LARGEST} characters")
    try:
        data = yaml.load(text, _Loader)
        str(data).encode("utf-8")  # lone surrogates, and integers too long to be written
    except (yaml.YAMLError, RecursionError) as error:
        raise NotPlain(" ".join(str(error).split())[:200]) from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, IndexError) as error:  # of constructors
        raise NotPlain(f"it holds a value that is none: {' '.join(str(error).split())[:160]}") from None
    return data
