"""What ``sparsec verify`` found, as a table, JUnit XML or Markdown; JSON is the data itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from xml.etree import ElementTree

PASS, FAIL, NOT_RUN = "pass", "FAIL", "not run here"
MARKS = {PASS: "✅", FAIL: "❌", NOT_RUN: "➖"}


@dataclass(frozen=True)
class Check:
    """One verdict."""

    group: str  # integrity, golden, quality, speed, engines
    name: str
    status: str
    said: str
    engine: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def timed(self, seconds: float) -> Check:
        """With the time that it took."""
        return replace(self, seconds=round(seconds, 3))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def headline(result: Mapping[str, Any]) -> str:
    """How many checks passed, failed, and did not run."""
    by = {status: sum(check["status"] == status for check in result["checks"]) for status in MARKS}
    word = "passed" if result["passed"] else "FAILED"
    said = f"{result['artifact']}: {word}; {by[PASS]} checks passed, {by[FAIL]} failed, {by[NOT_RUN]} not run here"
    return said + (" (--quick)" if result["quick"] else "")


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A row a check: status, what, engine, words."""
    return [
        [check["status"], f"{check['group']}: {check['name']}", check["engine"], _line(check["said"])]
        for check in result["checks"]
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """For a pull request: failures first and open, the rest folded."""
    failed = [check for check in result["checks"] if check["status"] == FAIL]
    parts = [f"### sparsec verify: {'passed' if result['passed'] else 'failed'}", _escaped(headline(result))]
    if failed:
        parts.append(_table(failed))
    others = [check for check in result["checks"] if check["status"] != FAIL]
    if others:
        parts.append(f"<details><summary>{len(others)} other checks</summary>\n\n{_table(others)}\n\n</details>")
    made = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts.append(f"{made}; device {result['device']}, dtype {result['dtype']}")
    return "\n\n".join(parts) + "\n"


def junit(result: Mapping[str, Any]) -> str:
    """JUnit XML: a test suite a group, a test case a check; what did not run is skipped with its reason."""
    suites = ElementTree.Element("testsuites", _counts("sparsec verify", result["checks"]))
    groups = list(dict.fromkeys(check["group"] for check in result["checks"]))
    for group in groups:
        mine = [check for check in result["checks"] if check["group"] == group]
        suite = ElementTree.SubElement(suites, "testsuite", _counts(group, mine))
        for check in mine:
            name = check["name"] + (f" [{check['engine']}]" if check["engine"] else "")
            named = {"classname": f"sparsec.verify.{group}", "name": _xml(name), "time": f"{check['seconds']:.3f}"}
            case = ElementTree.SubElement(suite, "testcase", named)
            if check["status"] == FAIL:
                ElementTree.SubElement(case, "failure", {"message": _xml(_line(check["said"]))})
            elif check["status"] == NOT_RUN:
                ElementTree.SubElement(case, "skipped", {"message": _xml(_line(check["said"]))})
            else:
                ElementTree.SubElement(case, "system-out").text = _xml(check["said"])
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _counts(name: str, checks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {
        "name": name,
        "tests": str(len(checks)),
        "failures": str(sum(check["status"] == FAIL for check in checks)),
        "skipped": str(sum(check["status"] == NOT_RUN for check in checks)),
        "time": f"{sum(check['seconds'] for check in checks):.3f}",
    }


def _table(checks: Sequence[Mapping[str, Any]]) -> str:
    lines = [["", "check", "engine", ""], ["---"] * 4]
    lines += [
        [MARKS[c["status"]], f"{c['group']}: {c['name']}", c["engine"], _escaped(_line(c["said"]))] for c in checks
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """Nothing in it is markup."""
    for sign in "\\`*_[]|#":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _xml(text: str) -> str:
    """Without signs that XML cannot hold."""
    kept = (sign if sign in "\t\n" or " " <= sign < "\ud800" or sign > "\udfff" else "?" for sign in text)
    return "".join(kept)
