"""The tables of benchmarks/tables.py that are about heads, indexers and their training: docs of rtpurbo and distill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merged_tables import markdown

from sparsec.calibrate.comparisons import BITS, TOGETHER
from sparsec.export.evaluation import against, points, shares, tasks

RESULTS = Path(__file__).resolve().parent / "results"
INDEXERS = {
    "pre": "before RoPE",
    "pre-stretched": "before RoPE, stretched",
    "post": "after RoPE",
    "post-stretched": "after RoPE, stretched",
}


def heads(needles: Mapping[str, Any]) -> str:
    """Heads by needles and by gates: what the split alone costs, and what is left after training."""
    gates = json.loads((RESULTS / "distill-demo.json").read_text(encoding="utf-8"))
    rows = []
    for length in dict.fromkeys(cell["length"] for cell in needles["cells"]):
        for name, result in (("needles", needles), ("gates", gates)):
            row = [f"{length:,}", name]
            for system in ("split", "distilled"):
                cell = next(each for each in result["cells"] if (each["length"], each["system"]) == (length, system))
                for measure, written in ((BITS, shares), (TOGETHER, points)):
                    row.append(written(against(result, cell, measure, "dense") or {}))
            rows.append(row)
    for name, result in (("needles", needles), ("gates", gates)):
        all_of = {row["system"]: points(row) for row in result["over_lengths"] if row["against"] == "dense"}
        rows.append(["all", name, "", all_of["split"], "", all_of["distilled"]])
    head = [
        "tokens",
        "heads by",
        "split: bits per byte",
        "split: needles",
        "trained: bits per byte",
        "trained: needles",
    ]
    command = "sparsec compile demo --calibration texts/train --device cuda --tier hours --passes rtpurbo,distill"
    made = (
        "Against dense, needles in points, 95 % intervals paired over windows and prompts; the README has all systems. "
        f"{gates['device']}, {gates['dtype']}: `{command}`, by needles with `--set rtpurbo.choose=needles --set "
        "rtpurbo.forced_recent=64 --set distill.weights=lora`, and `make table`'s evaluation."
    )
    return "\n".join([*markdown(head, rows, 2), "", made])


def rope(result: Mapping[str, Any]) -> str:
    """Needles that the dense model finds beyond its trained length, by kind of scaling."""
    rows = []
    for row in result["rows"]:
        rows.append([f"{row['length']:,}", row["rope"], *(f"{task['share']:.2f}" for task in row["tasks"].values())])
    tasks = list(result["rows"][0]["tasks"])
    made = f"{result['prompts']} prompts a task, factor {result['factor']:g}; {result['device']}, {result['dtype']}"
    return "\n".join([*markdown(["tokens", "rope", *tasks], rows, 2), "", f"{made}: `{result['command']}`."])


def indexers(result: Mapping[str, Any]) -> str:
    """The result of benchmarks/indexers.py as Markdown."""
    head = ["RoPE", "stretched"]
    contexts = [one["context"] for one in result["fits"][0]["contexts"]]
    head += [part for context in contexts for part in (f"mass found in {context:,}", "tokens kept")]
    rows = [
        [
            {"pre": "before", "post": "after"}[fit["rope"]],
            "yes" if fit["stretch"] else "no",
            *(part for one in fit["contexts"] for part in (f"{one['recall_mean']:.1%}", f"{one['kept_mean']:,.0f}")),
        ]
        for fit in result["fits"]
    ]
    perfect = ", ".join(
        f"{one['oracle_recall_mean']:.1%} in {one['oracle_kept_mean']:,.0f} of {one['context']:,}"
        for one in result["fits"][0]["contexts"]
    )
    made = f"{result['device']}, torch {result['versions']['torch']}; {result['text']}: `{result['command']}`."
    note = f"By the true attention instead of an indexer, the same rule keeps: {perfect}. {made}"
    return "\n".join([*markdown(head, rows, 2), "", note])


def needles(result: Mapping[str, Any]) -> str:
    """Needles that each kind of indexer finds, of what benchmarks/indexers.py --needles wrote."""
    found = tasks(result)
    head = [INDEXERS.get(name, name) for name in found.head]
    made = (
        f"{result['device']}, {result['dtype']}, torch {result['versions']['torch']}, {result['prompts_each']} prompts"
    )
    note = f"{found.note} Each kind has the same heads, by needles. {made}: `{result['command']}`."
    return "\n".join([*markdown(head, found.rows, found.left), "", note])


def recent(result: Mapping[str, Any]) -> str:
    """What selectors cost, of what benchmarks/recent_tokens.py found: KL and tokens kept, by setting and context."""
    contexts = sorted({row["context"] for row in result["rows"]})
    settings = list(dict.fromkeys((row["recent"], row["top_p"]) for row in result["rows"]))
    found = {(row["recent"], row["top_p"], row["context"]): row for row in result["rows"]}
    rows = []
    for number, top_p in settings:
        cells = [found[number, top_p, context] for context in contexts]
        name = [f"{number:,}", f"{top_p:g}"] if number is not None else ["all", "none"]
        kept = ["all" if number is None else f"{cell['kept_mean']:,.0f}" for cell in cells]
        rows.append([*name, *(f"{cell['kl']:.4f}" for cell in cells), *kept])
    head = ["recent tokens kept", "top-p", *(f"KL at {n:,}" for n in contexts), *(f"kept of {n:,}" for n in contexts)]
    where = f"{result['text']}; {result['device']}, torch {result['versions']['torch']}"
    passes = result["recipe"]["passes"]
    chosen = f"heads by {passes['rtpurbo']['choose']}, {'' if 'distill' in passes else 'no '}weights trained"
    note = f"KL of next tokens against dense in decode rows, nats a token; {chosen}; {where}"
    return "\n".join([*markdown(head, rows, 1), "", f"{note}: `{result['command']}`."])


def recipes(result: Mapping[str, Any]) -> str:
    """The result of benchmarks/recipes.py as Markdown: how near to dense, the mean over lengths, by kind of text."""
    rows = []
    for row in result["rows"]:
        kinds: dict[str, list[Mapping[str, float]]] = {}
        for name, found in row["exams"].items():
            kind = name.split()[0]
            kinds.setdefault(kind if kind in ("text", "greedy") else "answers", []).append(found)
        parts = [
            part
            for found in (kinds[kind] for kind in ("text", "answers", "greedy"))
            for part in (
                f"{sum(one['kl'] for one in found) / len(found):.4f}",
                f"{sum(one['other'] for one in found) / len(found):.2%}",
            )
        ]
        recipe = f"`{row['recipe']}`" if "=" in row["recipe"] else row["recipe"]
        plan = row.get("label") or row.get("artifact", "")  # dense in float32 has none
        rows.append([plan, recipe, str(row.get("steps", "")), f"{row['score']:.4f}", *parts])
    head = [
        "plan",
        "recipe",
        "steps",
        "score",
        *(f"{kind}: {part}" for kind in ("text", "answers", "greedy") for part in ("KL", "top-1 differs")),
    ]
    last = result["rows"][-1]
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in result["rows"]))
    made = f"{last['device']}, {last['dtype']}, torch {last['versions']['torch']}: {commands}"
    note = (
        "Teacher-forced on text, on dense's answers to needles and on its greedy continuations: KL against dense, nats "
        f"a token, and tokens that dense would choose and the model not. Score: geometric mean of the KLs. {made}."
    )
    return "\n".join([*markdown(head, rows, 2), "", note])
