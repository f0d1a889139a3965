"""Where calibration text comes from: files, folders, a Hub data set, or text that comes with Python.

A corpus is an ordered list of documents and keeps them apart. What the formats mean:

    .txt .md .rst   one document a file, however long
    .jsonl          one JSON object a line: its field ``text``, or its chat ``messages``
    .parquet        one document a row: column ``text``, or chat ``messages``
    a folder        all files of these formats below it, sorted by path; hidden ones are skipped
    org/name        the split ``train`` of a Hub data set, where no such path exists
    builtin         ``pydoc_data.topics``: Python's language reference, part of every Python

Text is UTF-8. Documents without text are skipped; a file without any is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsec.errors import CalibrationError, UsageError

BUILTIN = "builtin"
TEXT_FORMATS = (".txt", ".md", ".rst")
FORMATS = (*TEXT_FORMATS, ".jsonl", ".parquet")
ACCEPTED = f"--calibration takes {', '.join(FORMATS)} files, folders of them, a Hub data set id or '{BUILTIN}'"
# Calibration uses a few million tokens; beyond these limits reading and tokenizing only cost time and memory.
MAX_CHARACTERS = 32_000_000
MAX_DOCUMENTS = 100_000
MAX_TEXT_BYTES = 128 * 2**20
BOM = b"\xef\xbb\xbf"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Document:
    """A text that stands for itself; ``name`` says where it is from, without the folder the user named.

    Of a chat, ``text`` is the contents alone and ``messages`` holds its role and content pairs: how those are written
    is the tokenizer's chat template's business.
    """

    name: str
    text: str
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Corpus:
    """The documents that ``spec`` named (``builtin`` for the default); ``made_of`` tells it in words."""

    spec: str
    documents: tuple[Document, ...]
    made_of: str = ""

    @cached_property
    def digest(self) -> str:
        """sha256 over the ordered names and texts, as hexadecimal digits."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.name, document.text):
                data = part.encode()
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def read_corpus(spec: str | None = None, *, revision: str | None = None) -> Corpus:
    """Read the documents that ``spec`` names; None is the built-in text.

    Reading stops after 100,000 documents or 32 million characters; ``made_of`` tells when it did.

    Args:
        spec: a file, a folder, a Hub data set id, or ``builtin``.
        revision: branch, tag or commit of a Hub data set.

    Raises:
        CalibrationError: nothing is there, or it is not readable, not UTF-8, of another format, or empty.
        UsageError: a revision of something that is not on the Hub.
    """
    spec = BUILTIN if spec is None else spec
    # os.path and not Path: it answers "no" to what no file system takes, such as a text given by mistake.
    path = Path(os.path.expanduser(spec))
    if spec != BUILTIN and _is_hub_id(spec):
        return _corpus(spec, *_read_hub(spec, revision))
    if revision is not None:
        raise UsageError(f"a revision needs a Hub data set, and {spec!r} is none: leave the revision out")
    if spec == BUILTIN:
        return _corpus(spec, _read_builtin(), f"pydoc_data.topics of Python {platform.python_version()}")
    if spec and os.path.isdir(path):
        files = _files_below(path)
        documents = (document for file, name in files for document in _read_file(file, name))
        return _corpus(spec, documents, f"{len(files)} files of a folder")
    if not os.path.isfile(path):
        raise CalibrationError(f"no file or folder {_short(spec)!r}: {ACCEPTED}")
    if path.suffix.lower() not in FORMATS:
        raise CalibrationError(f"{spec} is of no known format: {ACCEPTED}")
    return _corpus(spec, _read_file(path, _printable(path.name)), "one file")


def _corpus(spec: str, documents: Iterable[Document], made_of: str) -> Corpus:
    kept: list[Document] = []
    characters = 0
    for document in documents:
        if characters >= MAX_CHARACTERS or len(kept) == MAX_DOCUMENTS:
            made_of += f"; only the first {len(kept):,} documents ({characters:,} characters) were read"
            break
        kept.append(document)
        characters += len(document.text)
    if not kept:
        raise CalibrationError(f"{spec} has no text in it: {ACCEPTED}")
    return Corpus(spec, tuple(kept), made_of)


def _is_hub_id(spec: str) -> bool:
    """A mistyped file name is no Hub id: those end in no format of ours."""
    return bool(HUB_ID.fullmatch(spec)) and Path(spec).suffix.lower() not in FORMATS and not os.path.exists(spec)


def _read_builtin() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CalibrationError(
            "this Python comes without pydoc_data, the built-in text: name other text with --calibration"
        ) from None
    for name in sorted(topics):
        yield Document(name, topics[name])


def _files_below(folder: Path) -> list[tuple[Path, str]]:
    """Files of the known formats and their names relative to the folder, sorted."""

    def stop(error: OSError) -> None:
        raise CalibrationError(f"cannot read {error.filename}: {error.strerror}; make it readable") from None

    found: list[tuple[str, ...]] = []
    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(parent).relative_to(folder).parts
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in FORMATS:
                found.append((*here, name))
    files = [(folder.joinpath(*parts), _printable("/".join(parts))) for parts in sorted(found)]
    files = [(file, name) for file, name in files if file.is_file()]
    if not files:
        raise CalibrationError(f"the folder {folder} has no {', '.join(FORMATS)} file: put text there or name another")
    return files


def _read_file(path: Path, name: str) -> Iterator[Document]:
    """The documents of one file; a file without text is an error."""
    suffix = path.suffix.lower()
    read = _read_parquet if suffix == ".parquet" else _read_jsonl if suffix == ".jsonl" else _read_text
    empty = True
    try:
        for document in read(path, name):
            if document.text.strip():
                empty = False
                yield document
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror or _line(error)}; make it readable") from None
    if empty:
        raise CalibrationError(f"{path} has no text in it: put text there or leave the file out")


def _read_text(path: Path, name: str) -> Iterator[Document]:
    if path.stat().st_size > MAX_TEXT_BYTES:
        limit = MAX_TEXT_BYTES // 2**20
        raise CalibrationError(f"{path} is one document of more than {limit} MiB: cut it into several files")
    text = _decode(path.read_bytes(), path)
    yield Document(name, text.replace("\r\n", "\n").replace("\r", "\n"))


def _read_jsonl(path: Path, name: str) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            line = _decode(data, path, offset)
            offset += len(data)
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"{where} is no JSON: {_line(error)}; a .jsonl file holds one JSON object a line"
                ) from None
            yield _document(f"{name}:{number}", row, where)


def _read_parquet(path: Path, name: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise CalibrationError("Parquet files need pyarrow: pip install 'sparsec[data]'") from None
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            column = next((field for field in ("text", "messages") if field in fields), None)
            if column is None:
                raise CalibrationError(
                    f"{path} has no column 'text', only {_names(fields)}: rename the one with the text"
                )
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _document(f"{name}:{number}", {column: value}, f"{path}, row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as Parquet: {_line(error)}; write the file again") from None


def _read_hub(spec: str, revision: str | None) -> tuple[Iterator[Document], str]:
    """The documents of a Hub data set, streamed, and what they are; the commit is part of it."""
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError:
        raise CalibrationError(
            f"no file or folder {spec!r}, and Hub data sets need datasets: pip install 'sparsec[data]'"
        ) from None

    def failed(error: Exception) -> CalibrationError:
        return CalibrationError(
            f"{spec!r} is no file or folder, and no readable Hub data set "
            f"({type(error).__name__}: {_line(error)}): "
            "check the name and the network, or download its files and name their folder"
        )

    # The Hub, the HTTP client and every file format raise errors of their own: here they all mean one thing.
    try:
        commit = HfApi().dataset_info(spec, revision=revision).sha
        rows: Iterable[Any] = datasets.load_dataset(spec, split="train", streaming=True, revision=commit)
    except Exception as error:
        raise failed(error) from None

    def documents() -> Iterator[Document]:
        try:
            for number, row in enumerate(rows, start=1):
                document = _document(f"{spec}:{number}", row, f"{spec}, row {number}")
                if document.text.strip():
                    yield document
        except CalibrationError:
            raise
        except Exception as error:
            raise failed(error) from None

    return documents(), f"split train of the Hub data set {spec} at {commit}"


def _document(name: str, row: object, where: str) -> Document:
    """What a JSON object or table row holds: its ``text``, or a chat's ``messages``; null is no text."""
    if not isinstance(row, dict):
        raise CalibrationError(f'{where} is no object: write {{"text": ...}} there')
    chat: tuple[tuple[str, str], ...] = ()
    if "text" in row:
        text = "" if row["text"] is None else row["text"]
    elif "messages" in row:
        messages = row["messages"] or []
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise CalibrationError(f'{where}: \'messages\' is no list of {{"role", "content"}} objects: make it one')
        contents = [message.get("content") for message in messages]  # a message that only calls a tool has none
        if not all(isinstance(content, str | None) for content in contents):
            raise CalibrationError(f"{where}: a message's 'content' is no string: write its text there")
        chat = tuple((str(m.get("role", "user")), m["content"]) for m in messages if m.get("content"))
        text = "\n\n".join(content for _, content in chat)
    else:
        raise CalibrationError(
            f"{where} has neither 'text' nor 'messages', only {_names(row)}: rename the text's field"
        )
    if not isinstance(text, str):
        raise CalibrationError(f"{where}: 'text' is {type(text).__name__}, not a string: write its text there")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: character {error.start} of the text is half a surrogate pair: remove or replace it"
        ) from None
    return Document(name, text, chat)


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    """UTF-8 text of bytes that stand at ``offset`` in the file; a byte order mark at its start is dropped."""
    skip = len(BOM) if offset == 0 and data.startswith(BOM) else 0
    zero = data.find(b"\0")
    try:
        text = data[skip:].decode("utf-8")
        if zero < 0:
            return text
        wrong = zero
    except UnicodeDecodeError as error:
        wrong = error.start + skip
    guess = "UTF-16" if zero >= 0 or data[:2] in (b"\xff\xfe", b"\xfe\xff") else "ISO-8859-1"
    raise CalibrationError(
        f"{path} is not UTF-8 text at byte {offset + wrong}: convert it, if it is {guess}: "
        f"iconv -f {guess} -t UTF-8 {shlex.quote(str(path))} > converted{path.suffix}"
    )


def _printable(name: str) -> str:
    """The name of a file; its bytes that are no UTF-8 become replacement characters."""
    return os.fsencode(name).decode("utf-8", "replace")


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def _names(fields: Iterable[object]) -> str:
    """The first few names, quoted."""
    names = [repr(field) for field in fields]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def _line(error: BaseException) -> str:
    """The first line of another library's message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:;") if lines else type(error).__name__
