"""Real text for the benchmarks, out of Debian packages: for training, for development, for evaluation, apart.

python benchmarks/texts.py DIR      needs apt-get and dpkg-deb, no rights; writes DIR/{train,dev,eval}/*.txt

Nothing that a figure is reported on is in ``train`` or ``dev``; choices are made on ``dev`` alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

# role -> package -> what of it is text, and how much of it at most, in characters.
PACKAGES: dict[str, dict[str, tuple[str, int]]] = {
    "train": {
        "dict-foldoc": ("usr/share/dictd/*.dict.dz", 2_000_000),
        "dict-gcide": ("usr/share/dictd/*.dict.dz", 2_000_000),
        "dict-jargon": ("usr/share/dictd/*.dict.dz", 1_500_000),
        "debian-policy": ("usr/share/doc/debian-policy/policy.html/*.html", 2_000_000),
        "git-doc": ("usr/share/doc/git/html/*.html", 1_000_000),
        "installation-guide-amd64": ("usr/share/doc/installation-guide-amd64/en/*.html", 1_000_000),
        "postgresql-doc-15": ("usr/share/doc/postgresql-doc-15/html/*.html", 2_000_000),
        "python3.11-doc": ("usr/share/doc/python3.11/html/*/*.html", 2_000_000),
        "rust-doc": ("usr/share/doc/rust-doc/html/book/*.html", 2_000_000),
        "sqlite3-doc": ("usr/share/doc/sqlite3/*.html", 1_000_000),
        "bash-doc": ("usr/share/doc/bash/*.html", 1_000_000),
        "apache2-doc": ("usr/share/doc/apache2-doc/manual/en/*/*.html", 2_000_000),
        "developers-reference": ("usr/share/developers-reference/*.html", 1_000_000),
        "exim4-doc-html": ("usr/share/doc/exim4-doc-html/spec_html/*.html", 1_000_000),
        "gimp-help-en": ("usr/share/gimp/2.0/help/en/*.html", 4_000_000),
        "lilypond-doc-html": ("usr/share/doc/lilypond/html/Documentation/notation/*.html", 1_000_000),
        "linux-doc-6.1": ("usr/share/doc/linux-doc-6.1/html/[ad]*-*/*.html", 2_000_000),
        "nodejs-doc": ("usr/share/doc/nodejs/api/*.html", 1_000_000),
        "perl-doc": ("usr/share/perl/*/pod/*.pod", 2_000_000),
        "postfix-doc": ("usr/share/doc/postfix/html/*.html", 1_000_000),
        "python-django-doc": ("usr/share/doc/python-django-doc/html/[rt]*/*.html", 2_000_000),
        "r-doc-html": ("usr/share/R/doc/manual/*.html", 1_000_000),
        # Prose, a fifth of the whole: the rest is manuals and dictionaries.
        "r-cran-janeaustenr": ("usr/lib/R/site-library/janeaustenr/data/*.rdb", 5_000_000),
        "fortunes": ("usr/share/games/fortunes/*.u8", 3_000_000),
        "fortunes-min": ("usr/share/games/fortunes/*.u8", 1_000_000),
        "dict-devil": ("usr/share/dictd/*.dict.dz", 1_000_000),
        "debian-faq": ("usr/share/doc/debian/FAQ/*.en.html", 1_000_000),
        "harden-doc": ("usr/share/doc/harden-doc/html/en-US/*.html", 1_000_000),
    },
    "dev": {"debian-reference-en": ("usr/share/debian-reference/*.en.txt.gz", 4_000_000)},
    "eval": {
        "debian-handbook": ("usr/share/doc/debian-handbook/html/en-US/*.html", 4_000_000),
        "anarchism": ("usr/share/doc/anarchism/html/*.html", 12_000_000),
    },
}
BLOCKS = (
    "p",
    "div",
    "li",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "dt",
    "dd",
    "tr",
    "br",
    "ul",
    "ol",
    "dl",
    "table",
    "pre",
)
HIDDEN = ("script", "style", "nav")


class _Text(HTMLParser):
    """The text of a page's body, a line a block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = self.preformatted = 0
        self.body = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.body |= tag == "body"
        self.hidden += tag in HIDDEN
        self.preformatted += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN
        self.preformatted -= tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.body and not self.hidden:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """The text of an HTML page."""
    parser = _Text()
    parser.feed(page)
    return "".join(parser.parts)


def read(file: Path) -> str:
    """A file's text: HTML, plain, or either compressed."""
    raw = file.read_bytes()
    if file.suffix == ".rdb":
        return r_strings(raw)
    if file.suffix in (".gz", ".dz"):
        import gzip

        raw = gzip.decompress(raw)
    text = raw.decode("utf-8", errors="replace")
    return html_text(text) if file.suffix == ".html" else text


def r_strings(raw: bytes) -> str:
    """The strings of an R package's data, a line each: objects serialised, deflated, a length before each."""
    texts = []
    while raw:
        inflate = zlib.decompressobj()
        data, raw = inflate.decompress(raw[4:]), inflate.unused_data
        # A string is four bytes of flags that end in its type, 9, and four of length, 255 here at most.
        strings = re.split(rb"\x00[\x00-\xff]{2}\x09\x00\x00\x00.", data, flags=re.DOTALL)[1:]
        texts.append("\n".join(line.decode("utf-8", errors="replace") for line in strings if b"\x00" not in line))
    return "\n\n".join(texts)


def tidy(pages: Iterable[str]) -> str:
    """One text: no runs of blank lines, no lines of navigation."""
    lines = []
    for page in pages:
        lines += [line.rstrip() for line in page.replace("\xa0", " ").splitlines()]
        lines.append("")
    kept = [line for line in lines if line.strip() not in ("Prev", "Next", "Up", "Home")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"


def natural(path: Path) -> list[tuple[int, str]]:
    """Order of pages: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.as_posix())]


def fetch(package: str, pattern: str, most: int) -> str:
    """The text of a package's files."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        deb = next(Path(folder).glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", deb.name, "files"], cwd=folder, check=True)
        files = [file for file in (Path(folder) / "files").glob(pattern) if file.is_file()]
        return tidy(read(file) for file in sorted(files, key=natural))[:most]


def main() -> None:
    """Write all texts."""
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/texts.py DIR")
    for role, packages in PACKAGES.items():
        folder = Path(sys.argv[1]) / role
        folder.mkdir(parents=True, exist_ok=True)
        for package, (pattern, most) in packages.items():
            text = fetch(package, pattern, most)
            (folder / f"{package}.txt").write_text(text, encoding="utf-8")
            print(f"{role}/{package}: {len(text):,} characters")


if __name__ == "__main__":
    main()
