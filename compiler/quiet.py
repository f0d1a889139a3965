"""Calls into transformers: kept quiet, and any failure becomes one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsec.errors import SourceError, SparsecError


def one_line(error: BaseException, limit: int = 240) -> str:
    """The error's message on one line, at most ``limit`` characters; its type's name if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def transformers_call(failure: str, way_out: str) -> Iterator[None]:
    """Silence transformers' log and progress bars inside the block, and restore both after it.

    Raises:
        SourceError: "<failure> (<transformers' message>): <way_out>" for any exception but sparsec's own.
    """
    from sparsec.plugins.quiet import silenced

    try:
        with silenced():
            yield
    except SparsecError:
        raise
    except Exception as error:  # transformers documents no set of exceptions
        raise SourceError(f"{failure} ({one_line(error)}): {way_out}") from error
