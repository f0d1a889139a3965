"""report.html as a browser shows it: it renders, complains of nothing, asks for nothing, and fits on a phone."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser as chromium
import pytest

from sparsec.export.report import render_report
from sparsec.layout import MANIFEST, MEASUREMENTS, REPORT, read_json, read_plan

pytestmark = pytest.mark.slow
PHONE, DESK = {"width": 375, "height": 812, "phone": True}, {"width": 1280, "height": 900}

FIGURES = """[...document.querySelectorAll('figure > svg')].map(e => {
  const r = e.getBoundingClientRect(); return [r.width, r.height, e.childElementCount]})"""
TOO_WIDE = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg') &&
  e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + ' ' + e.className)"""
CONTRAST = """(() => {
  const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const lum = c => { const [r, g, b] = rgb(c).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b };
  const paper = lum(getComputedStyle(document.body).backgroundColor);
  return ['h1', 'h2', '.quiet', 'td', 'th', 'summary'].map(s => document.querySelector(s)).filter(Boolean).map(e => {
    const ink = lum(getComputedStyle(e).color);
    return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05)})})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    program = chromium.find()
    if program is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with chromium.Browser(program, tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a compile, and one with everything that can be measured behind it."""
    from test_report_beside import EVALUATED, MERGED, TIMED

    plan, made = read_plan(tiny_artifact), read_json(tiny_artifact / MANIFEST)
    measurements = copy.deepcopy(read_json(tiny_artifact / MEASUREMENTS))
    measurements["passes"].append(MERGED | {"after": measurements["passes"][0]["after"]})
    evaluated = copy.deepcopy(EVALUATED)
    evaluated["artifacts"] = {"artifact": {"plan": plan.digest}}
    whole = tmp_path_factory.mktemp("page") / REPORT
    whole.write_text(
        render_report(plan, measurements, made, evaluated=evaluated, timed=TIMED), encoding="utf-8"
    )  # fmt: skip
    return {"as compiled": tiny_artifact / REPORT, "with everything": whole}


@pytest.mark.parametrize("page", ["as compiled", "with everything"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_report_renders(
    browser: chromium.Browser, pages: dict[str, Path], page: str, dark: bool, size: dict[str, Any], tmp_path: Path
) -> None:
    browser.problems.clear()
    browser.requested.clear()
    browser.open(pages[page], dark=dark, **size)
    assert browser.problems == []
    assert browser.requested == [pages[page].absolute().as_uri()]
    assert browser.ask("document.compatMode") == "CSS1Compat"
    assert browser.ask("innerWidth") == size["width"]
    assert browser.ask("document.documentElement.scrollWidth") <= size["width"]
    assert browser.ask(TOO_WIDE) == []
    figures = browser.ask(FIGURES)
    assert len(figures) >= 5
    assert all(width > 200 and height > 20 and parts > 2 for width, height, parts in figures)
    assert min(browser.ask(CONTRAST)) >= 4.5
    assert browser.ask("getComputedStyle(document.body).fontSize") == "16px"
    data = browser.picture()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000
    kept = os.environ.get("SPARSEC_PICTURES")  # a folder, for a look with one's own eyes
    if kept:
        name = f"{page}-{'dark' if dark else 'light'}-{size['width']}.png".replace(" ", "-")
        (Path(kept) / name).write_bytes(data)


def test_tables_say_what_the_pictures_show(browser: chromium.Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["with everything"], **PHONE)  # type: ignore[arg-type]
    browser.ask("document.querySelectorAll('figure').forEach(e => e.remove())")
    browser.ask("document.querySelectorAll('details').forEach(e => e.open = true)")
    words = browser.ask("document.body.innerText")
    for said in ("Needles found", "Token lengths before and after", "Speed by context", "Warnings"):
        assert said in words
    missing: Callable[[str], Any] = lambda name: browser.ask(  # noqa: E731
        f"document.querySelectorAll('#{name} table tbody tr').length"
    )
    for name in ("heads", "selectors", "sharing", "speed", "needles", "tokens"):
        assert missing(name) > 0, name
    assert browser.ask("document.documentElement.scrollWidth") <= PHONE["width"]
