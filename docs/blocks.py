"""Keeps the blocks of a Markdown file that programs write: everything between a line ``<!-- KIND: NAME -->`` and the
next line ``<!-- end -->``. The rest of the file is written by people and left alone."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def documents() -> list[Path]:
    """All Markdown files of the repository that readers are led to."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def filled(text: str, kind: str, render: Callable[[str], str]) -> str:
    """``text`` with every block of a kind written anew; ``render`` gets the block's name.

    Raises:
        ValueError: a block is opened and not closed.
    """
    pattern = re.compile(rf"^(<!-- {kind}: ([^\n]+?) -->\n).*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)
    new, count = pattern.subn(lambda m: f"{m[1]}{render(m[2]).rstrip()}\n{m[3]}", text)
    if count != len(re.findall(rf"^<!-- {kind}: ", text, re.MULTILINE)):
        raise ValueError(f"a block <!-- {kind}: ... --> has no <!-- end -->: close it")
    return new


def main(description: str, kind: str, render: Callable[[str], str], files: Iterable[Path]) -> int:
    """The command line of a writer: 0 done or all fresh, 1 with ``--check`` where something is stale."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a block is stale")
    check = parser.parse_args().check
    stale = []
    for file in files:
        old = file.read_text(encoding="utf-8")
        new = filled(old, kind, render)
        if new != old:
            stale.append(str(file.relative_to(ROOT)))
            if not check:
                file.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(stale)}" + ("; run make docs" if check else ""))
    return int(check and bool(stale))
