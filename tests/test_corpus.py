"""Calibration text: reading it, splitting it once, and cutting windows out of it."""

from __future__ import annotations

import copy
import json
import logging
import logging.handlers
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparsec.calibrate import corpus as corpus_module
from sparsec.calibrate.corpus import Corpus, Document, read_corpus
from sparsec.calibrate.duplicates import near_duplicates
from sparsec.calibrate.splits import SPLITS, Calibration
from sparsec.errors import CalibrationError, UsageError


def failure(call: Callable[[], object], kind: type[Exception] = CalibrationError) -> str:
    """The message of the error that the call raises: one line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def texts(spec: str) -> list[str]:
    return [document.text for document in read_corpus(spec).documents]


# Reading


def test_the_builtin_text_is_pythons_language_reference() -> None:
    builtin = read_corpus()
    assert builtin == read_corpus("builtin")
    assert builtin.spec == "builtin"
    assert "pydoc_data.topics of Python 3." in builtin.made_of
    assert len(builtin.documents) > 60
    assert sum(len(document.text) for document in builtin.documents) > 400_000
    names = [document.name for document in builtin.documents]
    assert names == sorted(names)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".TXT"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    spec = write(tmp_path / f"book{suffix}", "One.\n\nTwo.\n" * 1000)
    assert read_corpus(spec).documents == (Document(f"book{suffix}", "One.\n\nTwo.\n" * 1000),)


def test_byte_order_mark_and_windows_line_ends_are_dropped(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfOne.\r\n\r\nTwo.\rThree.")) == ["One.\n\nTwo.\nThree."]
    assert texts(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "One."}\r\n')) == ["One."]


def test_jsonl_has_a_document_a_line_and_skips_those_without_text(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": None}, {"content": "So."}]
    rows = [{"text": "One.", "id": 1}, {"text": ""}, {"text": None}, {"text": "  "}, {"messages": chat}]
    spec = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert read_corpus(spec).documents == (
        Document("a.jsonl:1", "One."),
        Document("a.jsonl:9", "Why?\n\nSo.", (("user", "Why?"), ("user", "So."))),
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut off', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("1" * 5000, "no JSON"),
        ('"only a string"', "no object"),
        ('{"content": "x", "title": "y"}', "'content', 'title'"),
        ('{"text": 7}', "int, not a string"),
        ('{"text": "half \\ud83d"}', "surrogate"),
        ('{"messages": "hello"}', "no list"),
        ('{"messages": ["hello"]}', "no list"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "no string"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    spec = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    message = failure(lambda: read_corpus(spec))
    assert f"{spec}:2" in message
    assert reason in message


def test_a_chat_is_written_by_the_tokenizers_template() -> None:
    chats = [(("user", words(60, f"q{n}")), ("assistant", words(60, f"a{n}"))) for n in range(9)]
    documents = tuple(Document(f"{n}", "\n\n".join(text for _, text in chat), chat) for n, chat in enumerate(chats))
    tokenizer = copy.copy(byte_tokenizer(bos=True))
    plain = Calibration(Corpus("c", documents), tokenizer)
    assert plain.describe()["chats"] == 0
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    calibration = Calibration(Corpus("c", documents), tokenizer)
    assert calibration.describe()["chats"] == 9
    (window,) = calibration.windows("train", 40, 1)
    longest = max(calibration._encode(calibration.texts("train")), key=len)
    assert tokenizer.decode(longest).replace(" ", "")[1:].startswith("user>")
    assert tokenizer.bos_token_id not in longest.tolist()
    assert int(window[0]) == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert Calibration(Corpus("c", documents), tokenizer).describe()["chats"] == 0


def test_parquet_has_a_document_a_row(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3, 4], "text": ["One.", None, "", "Two."]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    documents = read_corpus(str(tmp_path / "a.parquet")).documents
    assert documents == (Document("a.parquet:1", "One."), Document("a.parquet:4", "Two."))
    chat = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]]
    pq.write_table(pa.table({"messages": chat}), tmp_path / "b.parquet")
    assert texts(str(tmp_path / "b.parquet")) == ["Why?\n\nSo."]


def test_parquet_without_text_or_damaged_or_without_pyarrow_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["One."]}), good)
    assert "no column 'text', only 'body'" in failure(lambda: read_corpus(str(good)))
    cut_off = write(tmp_path / "b.parquet", good.read_bytes()[:-20])
    assert "cannot be read as Parquet" in failure(lambda: read_corpus(cut_off))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'sparsec[data]'" in failure(lambda: read_corpus(str(good)))


def test_a_folder_is_read_recursively_in_order_without_hidden_and_other_files(tmp_path: Path) -> None:
    write(tmp_path / "b" / "two.md", "Two.")
    write(tmp_path / "a.txt", "One.")
    write(tmp_path / "c.jsonl", '{"text": "Three."}\n{"text": "Four."}\n')
    for other in (".hidden.txt", ".git/x.txt", "page.html", "data.json"):
        write(tmp_path / other, "not this")
    found = read_corpus(str(tmp_path))
    assert [document.name for document in found.documents] == ["a.txt", "b/two.md", "c.jsonl:1", "c.jsonl:2"]
    assert found.made_of == "3 files of a folder"


def test_the_digest_is_of_names_and_texts_in_order_wherever_they_are(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write(tmp_path / place / "a.txt", "One.")
        write(tmp_path / place / "b.txt", "Two.")
    here, there = (read_corpus(str(tmp_path / place)) for place in ("here", "there"))
    assert here.digest == there.digest
    variants = [
        here.documents,
        here.documents[::-1],
        here.documents[:1],
        (Document("a.txt", "One."), Document("b.txt", "Two!")),
        (Document("a.txtO", "ne."), Document("b.txt", "Two.")),
    ]
    assert len({Corpus("x", documents).digest for documents in variants}) == len(variants)


@pytest.mark.parametrize(
    ("data", "offset", "encoding"),
    [
        ("Plain, then caf\u00e9".encode("latin-1"), 15, "ISO-8859-1"),
        ("Caf\u00e9".encode("utf-16"), 0, "UTF-16"),
        (b"\xef\xbb\xbfabc\xff", 6, "ISO-8859-1"),
        (b"abc\0def", 3, "UTF-16"),
    ],
)
def test_text_that_is_not_utf8_is_refused_with_the_byte(
    tmp_path: Path, data: bytes, offset: int, encoding: str
) -> None:
    spec = write(tmp_path / "a.txt", data)
    message = failure(lambda: read_corpus(spec))
    assert f"{spec} is not UTF-8 text at byte {offset}:" in message
    assert f"iconv -f {encoding} -t UTF-8" in message


def test_the_byte_in_a_jsonl_file_counts_from_its_start(tmp_path: Path) -> None:
    good = b'{"text": "One."}\n'
    spec = write(tmp_path / "a.jsonl", good * 2 + b'{"text": "\xe9"}\n')
    assert f"at byte {2 * len(good) + 10}:" in failure(lambda: read_corpus(spec))


@pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")
def test_the_command_that_the_message_gives_repairs_the_file(tmp_path: Path) -> None:
    spec = write(tmp_path / "it's a file.txt", "Caf\u00e9".encode("latin-1"))
    command = failure(lambda: read_corpus(spec)).partition("iconv")[2]
    subprocess.run("iconv" + command, shell=True, check=True, cwd=tmp_path)
    assert texts(str(tmp_path / "converted.txt")) == ["Caf\u00e9"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", ""), ("a.md", " \n\n"), ("a.jsonl", ""), ("b.jsonl", '{"text": ""}')]
)
def test_a_file_without_text_is_an_error_also_in_a_folder(tmp_path: Path, name: str, content: str) -> None:
    spec = write(tmp_path / name, content)
    assert f"{spec} has no text in it" in failure(lambda: read_corpus(spec))
    write(tmp_path / "z.txt", "Text.")
    assert f"{spec} has no text in it" in failure(lambda: read_corpus(str(tmp_path)))


def test_what_is_missing_or_of_another_format_is_answered_with_what_is_accepted(tmp_path: Path) -> None:
    page = write(tmp_path / "page.html", "<p>")
    for spec in (str(tmp_path / "missing"), "missing.txt", "org/missing.jsonl", page, "", "A text. " * 1000):
        message = failure(partial(read_corpus, spec))
        assert ".txt, .md, .rst, .jsonl, .parquet files, folders of them, a Hub data set id" in message
    assert "no .txt, .md, .rst, .jsonl, .parquet file" in failure(lambda: read_corpus(str(tmp_path)))


def test_reading_stops_at_the_limit_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write(tmp_path / "a.jsonl", '{"text": "0123456789"}\n' * 5 + "{never read")
    monkeypatch.setattr(corpus_module, "MAX_CHARACTERS", 25)
    found = read_corpus(spec)
    assert len(found.documents) == 3
    assert "only the first 3 documents (30 characters)" in found.made_of
    monkeypatch.setattr(corpus_module, "MAX_TEXT_BYTES", 25)
    long = write(tmp_path / "long.txt", "x" * 26)
    assert "cut it into several files" in failure(lambda: read_corpus(long))


def test_a_revision_needs_the_hub(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.txt", "One.")
    for where in (spec, None):
        assert "revision" in failure(partial(read_corpus, where, revision="main"), UsageError)


HUB_ROWS = b"".join(json.dumps({"text": f"Document {i}."}).encode() + b"\n" for i in range(4)) + b'{"text": ""}\n'
HUB_COMMIT = "a" * 40


class HubOfOne(BaseHTTPRequestHandler):
    """As much of the Hub's interface as it takes to stream the data set ``org/name``, a single file."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        file = {"type": "file", "oid": "0" * 40, "size": len(HUB_ROWS), "path": "train.jsonl"}
        if path.startswith("/api/datasets/org/name/tree/"):
            body, status = json.dumps([file]).encode(), 200
        elif path in ("/api/datasets/org/name", f"/api/datasets/org/name/revision/{HUB_COMMIT}"):
            info = {
                "_id": "1",
                "id": "org/name",
                "sha": HUB_COMMIT,
                "siblings": [{"rfilename": "train.jsonl"}],
            }
            body, status = json.dumps(info | {"tags": [], "private": False}).encode(), 200
        elif path.endswith(f"/resolve/{HUB_COMMIT}/train.jsonl"):
            body, status = HUB_ROWS, 200
        else:
            body, status = b"{}", 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", HUB_COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "org/name" in path else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), HubOfOne) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_hub_data_set_is_streamed_from_a_recorded_commit(hub: str, tmp_path: Path) -> None:
    # A process of its own: the Hub's address is read when its library is imported.
    code = """if True:
        from sparsec.calibrate.corpus import read_corpus
        from sparsec.errors import CalibrationError
        found = read_corpus("org/name")
        print([document.text for document in found.documents])
        print(found.documents[3].name, found.made_of, sep="\\n")
        try:
            read_corpus("org/missing")
        except CalibrationError as error:
            print(error)
    """
    env = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    rows, name, made_of, missing = run.stdout.splitlines()
    assert rows == str([f"Document {i}." for i in range(4)])
    assert name == "org/name:4"
    assert made_of == f"split train of the Hub data set org/name at {HUB_COMMIT}"
    assert "'org/missing' is no file or folder, and no readable Hub data set" in missing


def test_a_hub_data_set_without_a_network_or_library_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        assert "pip install 'sparsec[data]'" in failure(lambda: read_corpus("org/name"))
    code = "from sparsec.calibrate.corpus import read_corpus; read_corpus('org/name')"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=False)
    last = run.stderr.splitlines()[-1]
    assert "CalibrationError: 'org/name' is no file or folder, and no readable Hub data set" in last
    assert "check the name and the network" in last


# Splitting


@cache
def byte_tokenizer(*, bos: bool = False, context: int = 1 << 30) -> Any:
    """One token a byte, so that token positions are text positions."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=context)


def words(count: int, seed: object) -> str:
    """Random words in lines and paragraphs; no two texts share any stretch to speak of."""
    rng = random.Random(str(seed))
    out = []
    for number in range(1, count + 1):
        out.append("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))))
        out.append("\n\n" if number % 60 == 0 else "\n" if number % 12 == 0 else " ")
    return "".join(out)


def corpus_of(*documents: str) -> Corpus:
    return Corpus("test", tuple(Document(f"d{i}", text) for i, text in enumerate(documents)))


def calibration(*documents: str, **options: Any) -> Calibration:
    return Calibration(corpus_of(*documents), options.pop("tokenizer", byte_tokenizer()), **options)


def names(made: Calibration, split: str) -> set[str]:
    return {document.name for document in made.texts(split)}


def grouped(*documents: str) -> list[list[int]]:
    return near_duplicates(corpus_of(*documents).documents)


@pytest.mark.parametrize("seed", range(30))
def test_splits_are_disjoint_and_windows_lie_inside_documents(seed: int) -> None:
    rng = random.Random(seed)
    documents = [words(rng.choice([1, 20, 200, 900]), f"{seed}/{i}") for i in range(rng.randint(5, 20))]
    for _ in range(rng.randint(0, 6)):  # some repeat others in part, as a whole, or wrapped anew
        other = rng.choice(documents)
        half = other[: len(other) // 2]
        documents.append(rng.choice([other, " ".join(other.split()), half + words(20, rng.random())]))
    rng.shuffle(documents)
    bos = rng.random() < 0.5
    tokenizer = byte_tokenizer(bos=bos)
    made = calibration(*documents, seed=seed, tokenizer=tokenizer)
    cut_document = made.describe()["cut_document"]

    seen = [document for split in SPLITS for document in made.texts(split)]
    assert len({document.name for document in seen}) == len(seen)
    if cut_document is None:
        assert sorted(document.text for document in seen) == sorted(documents)
    for split in SPLITS:
        assert made.texts(split)
        assert made.tokens(split) == sum(len(document.text) for document in made.texts(split))
        others = " ".join(d.text for other in SPLITS if other != split for d in made.texts(other))
        for length in (16, 100, 700):
            body = length - bos
            count = made.available(split, length)
            assert count == sum(len(document.text) // body for document in made.texts(split))
            if not count:
                continue
            for row in made.windows(split, length, count, seed=seed):
                assert not bos or row[0] == tokenizer.bos_token_id
                text = tokenizer.decode(row[int(bos) :])
                assert len(text) == body
                assert any(text in document.text for document in made.texts(split))
                assert length < 700 or text not in others


def test_windows_do_not_overlap_and_are_the_same_every_time() -> None:
    documents = [words(2000, i) for i in range(6)]
    made, again = calibration(*documents), calibration(*documents)
    most = made.available("train", 128)
    windows = made.windows("train", 128, most)
    assert windows.dtype == torch.int64
    assert windows.shape == (most, 128)
    assert torch.equal(windows, again.windows("train", 128, most))
    assert torch.equal(windows[:5], made.windows("train", 128, 5))
    assert not torch.equal(windows, made.windows("train", 128, most, seed=1))
    places = []
    for row in windows:
        text = byte_tokenizer().decode(row)
        places += [(d.name, d.text.index(text)) for d in made.texts("train") if text in d.text]
    places.sort()
    assert len(places) == most
    for (name, start), (next_name, next_start) in pairwise(places):
        assert name != next_name or next_start - start >= 128


@pytest.mark.parametrize("length", [30, 150, 800])
def test_shares_are_met_within_the_size_of_a_document(length: int) -> None:
    documents = [words(length, i) for i in range(80)]
    for shares in ((0.6, 0.25, 0.15), (0.2, 0.4, 0.4)):
        made = calibration(*documents, shares=shares)
        total = sum(made.tokens(split) for split in SPLITS)
        for split, share in zip(SPLITS, shares, strict=True):
            assert made.tokens(split) / total == pytest.approx(share, abs=0.03)


def test_long_windows_are_shared_out_rather_than_tokens() -> None:
    documents = [words(count, f"{count}/{i}") for i in range(20) for count in (400, 600)]
    assert all(2048 <= len(text) < 4096 for text in documents)
    for seed in range(4):
        made = calibration(*documents, seed=seed)
        assert [made.available(split, 2048) for split in SPLITS] == [24, 10, 6]


def test_every_split_gets_a_long_document_where_three_are_long() -> None:
    documents = [words(600, i) for i in range(3)] + [words(30, f"short {i}") for i in range(40)]
    for seed in range(10):
        made = calibration(*documents, seed=seed)
        assert all(made.available(split, 2048) == 1 for split in SPLITS)
        assert not made.describe()["cut"]


def test_the_seed_decides_who_goes_where() -> None:
    documents = [words(200, i) for i in range(30)]
    assert len({frozenset(names(calibration(*documents, seed=s), "heldout")) for s in range(5)}) == 5


def test_documents_that_share_text_are_one_group() -> None:
    chapters = [words(300, i) for i in range(4)]
    book = "\n\n".join(chapters[:3])
    assert grouped(*chapters) == [[0], [1], [2], [3]]
    assert grouped(book, *chapters) == [[0, 1, 2, 3], [4]]
    assert grouped(chapters[0], " ".join(chapters[0].upper().split()), chapters[1]) == [[0, 1], [2]]
    assert grouped("Yes.", "No.", "yes") == [[0, 2], [1]]
    assert grouped("...", "!!!", "...", "") == [[0, 2], [1], [3]]
    assert grouped() == []


def test_a_tenth_in_common_makes_no_group_and_a_third_does() -> None:
    shared = words(200, "shared")
    assert grouped(shared + words(1800, 1), shared + words(3000, 2)) == [[0], [1]]
    assert grouped(shared + words(400, 1), words(3000, 2) + shared) == [[0, 1]]


def test_a_licence_in_every_file_makes_no_group_but_many_revisions_of_a_text_do() -> None:
    licence = words(200, "licence")
    assert len(grouped(*(licence + words(400, i) for i in range(20)))) == 20
    text = words(600, "text")
    assert len(grouped(*(words(100, i) + text for i in range(20)))) == 1


def test_one_book_is_cut_once_between_paragraphs_with_a_gap() -> None:
    book = words(30_000, "book")
    made = calibration(book)
    described = made.describe()
    assert described["cut"] is True
    assert described["cut_document"] == "d0"
    end = 0
    for split, share in zip(SPLITS, (0.6, 0.25, 0.15), strict=True):
        (part,) = made.texts(split)
        start = book.index(part.text)
        if split != "train":
            assert 0.01 * len(book) <= start - end <= 0.05 * len(book)
            assert book[:start].endswith("\n\n")
        end = start + len(part.text)
        assert split == "heldout" or book[end:].startswith("\n\n")
        assert made.tokens(split) / len(book) == pytest.approx(share, abs=0.04)


def test_text_without_spaces_can_be_cut_too() -> None:
    made = calibration("".join(words(5000, "x").split()))
    assert made.describe()["cut"]
    assert all(made.available(split, 512) for split in SPLITS)


def test_a_book_among_notes_is_cut_and_notes_stay_whole() -> None:
    notes = [words(20, i) for i in range(5)]
    made = calibration(words(30_000, "book"), *notes)
    assert made.describe()["cut"]
    assert all(made.available(split, 2048) >= 8 for split in SPLITS)
    kept = {document.text for split in SPLITS for document in made.texts(split)}
    assert kept.issuperset(notes)


def test_a_second_copy_of_a_cut_book_is_dropped_and_many_copies_are_refused() -> None:
    book = words(5000, "book")
    made = calibration(book, book)
    assert made.describe()["dropped_near_duplicates"] == 1
    assert sum(len(made.texts(split)) for split in SPLITS) == 3
    assert "repeat each other's text" in failure(lambda: calibration(book, book, book, words(9, 1)))


@pytest.mark.parametrize("documents", [[""], ["Too short."], ["One.", "Two."], [words(50, 1)] * 2])
def test_too_little_text_is_an_error(documents: list[str]) -> None:
    assert "--calibration" in failure(lambda: calibration(*documents))


def test_more_windows_than_there_are_is_an_error_that_counts_them() -> None:
    made = calibration(*(words(600, i) for i in range(6)))
    assert made.available("heldout", 2048) == 1
    message = failure(lambda: made.windows("heldout", 2048, 2))
    assert "has 1 of the 2 windows of 2048 tokens" in message
    assert "shorter context" in message
    assert made.available("heldout", 100_000) == 0
    assert "has 0 of the 1 windows" in failure(lambda: made.windows("heldout", 100_000, 1))


def test_calls_that_mean_nothing_are_usage_errors() -> None:
    documents = [words(100, i) for i in range(3)]
    made = calibration(*documents, tokenizer=byte_tokenizer(bos=True))
    assert "train, search, heldout" in failure(lambda: made.texts("test"), UsageError)
    failure(lambda: made.windows("train", 16, 0), UsageError)
    failure(lambda: made.available("train", 1), UsageError)
    for shares in ((0.6, 0.25, 0.25), (1.0, 0.0, 0.0), (0.5, 0.5), (float("nan"), 0.5, 0.5)):
        failure(partial(calibration, *documents, shares=shares), UsageError)


def test_the_digest_tells_apart_whatever_changes_the_windows() -> None:
    documents = [words(100, i) for i in range(6)]
    made = [
        calibration(*documents),
        calibration(*documents, seed=1),
        calibration(*documents, shares=(0.5, 0.3, 0.2)),
        calibration(*documents, tokenizer=byte_tokenizer(bos=True)),
        calibration(*documents[1:]),
        calibration(*documents, tokenizer=learned_tokenizer()),
    ]
    assert len({each.digest for each in made}) == len(made)
    assert calibration(*documents).digest == made[0].digest


def test_the_description_is_json_and_adds_up() -> None:
    chapter = words(300, "chapter")
    described = calibration(chapter, chapter + words(300, "rest"), *(words(300, i) for i in range(4))).describe()
    assert json.loads(json.dumps(described)) == described
    assert sum(described["documents"].values()) == 6
    assert described["near_duplicates"] == {"groups": 1, "documents": 2, "largest": ["d0", "d1"]}
    assert re.fullmatch("[0-9a-f]{64}", described["digest"])
    assert described["cut"] is False


def test_documents_longer_than_the_models_context_cause_no_warning() -> None:
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(records)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        calibration(*(words(300, i) for i in range(3)), tokenizer=byte_tokenizer(context=16))
    finally:
        logger.removeHandler(handler)
    assert records.empty()


@cache
def learned_tokenizer() -> Any:
    """A small BPE learned from the built-in text: about as many characters a token as real ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in read_corpus().documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_builtin_text_gives_every_split_long_windows() -> None:
    for seed in range(5):
        made = Calibration(read_corpus(), learned_tokenizer(), seed=seed)
        assert made.available("train", 2048) >= 8
        assert made.available("search", 2048) >= 4
        assert made.available("heldout", 2048) >= 2
        assert not made.describe()["cut"]
        # These repeat each other word for word.
        holders = [split for split in SPLITS if {"specialnames", "customization"} & names(made, split)]
        assert len(holders) == 1
