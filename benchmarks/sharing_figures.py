"""What benchmarks/sharing.py makes of finished jobs: each pattern against no sharing, and against the searched one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from sharing_jobs import RECALL, WORK, Job, Judge, Search

from sparsec.calibrate.pattern_search import paired

Found = Mapping[str, Any]
Done = Mapping[Job, Found]


def searches_of(done: Done) -> list[dict[str, Any]]:
    """A row a search: what it cost, and of the lazy one how much of the exact pattern it found."""
    rows = []
    for job, found in _searches(done):
        row = {"artifact": job.artifact, "windows": job.windows, "seed": job.seed, "order": job.order}
        row |= {name: found[name] for name in ("layers", "patterns", "seconds", *WORK)}
        row["rise"] = found["flips"][-1]["loss"] / found["loss_before"] - 1 if found["flips"] else 0.0
        exact = done.get(replace(job, order="exact"))
        if job.order == "lazy" and exact is not None:
            pairs = {
                keep: (ways["searched"], exact["patterns"][keep]["searched"])
                for keep, ways in found["patterns"].items()
            }
            row["agreement"] = {keep: kept_alike(*pair) for keep, pair in pairs.items()}
        rows.append(row)
    return rows


def _searches(done: Done) -> list[tuple[Search, Found]]:
    """Those of most text first, exact before lazy; jobs end in any order."""
    found = [(job, each) for job, each in done.items() if isinstance(job, Search)]
    return sorted(found, key=lambda one: (one[0].artifact, -one[0].windows, one[0].seed, one[0].order))


def kept_alike(one: str, other: str) -> float:
    """Indexers that both patterns keep, of those that either keeps; the first one, which all keep, left out."""
    sets = [{i for i, letter in enumerate(pattern) if letter == "F" and i} for pattern in (one, other)]
    return len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))


def rows_of(done: Done) -> list[dict[str, Any]]:
    """A row a pattern and way, with what no sharing gives first."""
    rows = []
    for artifact in sorted({job.artifact for job in done}):
        every = [job.pattern for job in done if isinstance(job, Judge) and job.artifact == artifact]
        whole = next((pattern for pattern in every if pattern and "S" not in pattern), None)
        base = done.get(Judge(artifact, whole, False, True)) if whole else None
        if base is None:
            continue
        rows.append({"artifact": artifact, "way": "no sharing", "pattern": whole, **figures(base, base)})
        heads = done.get(Judge(artifact, None, False, True))
        if heads is not None:
            rows.append({"artifact": artifact, "way": "a set a head", **figures(heads, base)})
        rows += _patterns(done, artifact, base)
    return rows


def _patterns(done: Done, artifact: str, base: Found) -> Iterator[dict[str, Any]]:
    """Each search's patterns; of a lazy one the searched alone, beside the exact one's."""
    for job, found in _searches(done):
        if job.artifact != artifact:
            continue
        exact = done.get(replace(job, order="exact"), found)
        for keep, ways in found["patterns"].items():
            named = ways if job.order == "exact" else {job.order: ways["searched"]}
            for trained in (False, True):
                searched = _judged(done, artifact, exact["patterns"][keep]["searched"], trained)
                for way, pattern in named.items():
                    each = _judged(done, artifact, pattern, trained)
                    if each is None:
                        continue
                    row = {"artifact": artifact, "way": way, "keep": float(keep), "trained": trained}
                    row |= {"windows": job.windows, "seed": job.seed, "pattern": pattern, **figures(each, base)}
                    if searched is not None and way != "searched":
                        row |= {f"{name}_above_searched": value for name, value in compared(each, searched, base)}
                    yield row


def _judged(done: Done, artifact: str, pattern: str, trained: bool) -> Found | None:
    """With the tasks, if they were asked."""
    return done.get(Judge(artifact, pattern, trained, True)) or done.get(Judge(artifact, pattern, trained, False))


def figures(found: Found, base: Found) -> dict[str, Any]:
    """Of one system, and its differences from ``base``: [mean, standard error] over windows, or over prompts."""
    bits = sum(found["windows"]) / len(found["windows"])
    row: dict[str, Any] = {"bits_per_byte": bits, **{name: found[name] for name in RECALL}}
    row |= {name: found[name] for name in ("kl_before", "kl_trained") if name in found}
    if "tasks" in found:
        row["tasks"] = {task: sum(answers) / len(answers) for task, answers in found["tasks"].items()}
        row["needles"] = sum(row["tasks"].values()) / len(row["tasks"])
    return row | dict(compared(found, base, base))


def compared(found: Found, other: Found, base: Found) -> Iterator[tuple[str, list[float]]]:
    """Paired differences from ``other``: bits per byte as a share of ``base``'s, needles as a share of the prompts."""
    mine, theirs, whole = (torch.tensor(each["windows"], dtype=torch.float64) for each in (found, other, base))
    yield "bits", list(paired(mine / whole, theirs / whole))
    if "tasks" in found and "tasks" in other:
        answers = [torch.tensor([*each["tasks"].values()], dtype=torch.float64) for each in (found, other)]
        yield "points", list(paired(*(each.flatten() for each in answers)))


def line_of(row: Mapping[str, Any]) -> str:
    """A row as a line of text."""
    mean, error = row["bits"]
    points = "{:+.1%} ± {:.1%}".format(*row["points"]) if "points" in row else ""
    kind = f"{row['keep']:.0%} {'trained' if row['trained'] else 'as is'} {row['windows']}w" if "keep" in row else ""
    return (
        f"{row['artifact']:8} {row['way']:12} {kind:22} {mean:+.2%} ± {error:.2%}  needles {points:16}"
        f"  mass {row['recall_mean']:.1%}, far {row['far_mean']:.1%} in {row['kept_mean']:.0f}"
        f"  {row.get('pattern', '')}"
    )
