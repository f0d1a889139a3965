"""Tables of kernels, caches and whole models, for tables.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merged_tables import markdown


def kernels(result: Mapping[str, Any]) -> str:
    """The result of benchmarks/kernels.py as Markdown: prompts and decode of one layer."""
    rows = []
    for name, one in result["prefill"].items():
        way, length = name.rsplit(" ", 1)
        if "failed" not in one:
            dense, best = min((value, kind) for kind, value in one["dense_ms"].items())
            times = [f"{one['ours_ms']:.1f} ms", f"{dense:.1f} ms ({best})", f"{one['speedup']:.1f}x"]
            rows.append([f"{int(length):,}", f"prompt, {way}", *times, f"{one['local_over_floor']:.2f}"])
    for name, one in result["decode"].items():
        granularity, length, rate, *more = name.split(" ", 3)
        if "failed" not in one:
            dense, best = min((value, kind) for kind, value in one["dense_us"].items())
            times = [f"{one['ours_us']:.0f} us", f"{dense:.0f} us ({best})", f"{one['speedup']:.1f}x"]
            what = ", ".join([f"decode, {float(rate):.0%} kept by {granularity}s", *more])
            rows.append([f"{int(length):,}", what, *times, f"{one['ours_us'] / one['floor_us']:.2f}"])
    rows.sort(key=lambda row: int(row[0].replace(",", "")))
    head = ["tokens", "", "the plan", "dense", "faster", "times its floor"]
    top = result["ceilings"]
    floor = (
        "Floor: of prompts that of the local heads' operations at 600 TFLOP/s, by which their kernel's time is "
        "divided; of decode that of all bytes read at 2.8 TB/s. This device copied at "
        f"{top['bandwidth'] / 1e12:.1f} TB/s and multiplied at {top['matrix'] / 1e12:.0f} TFLOP/s."
    )
    made = f"{result['device']}, torch {result['versions']['torch']}: `{result['command']}`."
    return "\n".join([*markdown(head, rows, 2), "", f"{floor} {made}"])


def index_keys(result: Mapping[str, Any]) -> str:
    """Index keys in fewer bits, of what benchmarks/index_keys.py found."""
    rows = [
        [
            f"{row['context']:,}",
            row["way"],
            f"{row['bytes']:g}",
            *(f"{row[name]:.1%}" for name in ("recall_mean", "recall_p5")),
            f"{row['kept_mean']:.0f}",
        ]
        for row in result["rows"]
        if row["context"] == max(each["context"] for each in result["rows"])
    ]
    head = ["context", "index keys", "bytes a token and head", "mass found", "5 % of rows below", "tokens kept"]
    return "\n".join([*markdown(head, rows, 2), "", _on_rows(result)])


def coarse(result: Mapping[str, Any]) -> str:
    """A coarse level, of what benchmarks/coarse.py found."""
    rows = [
        [
            f"{row['context']:,}",
            f"one in {row['one_in']}, by {row['ranked_by']}" if row["ranked_by"] else "all",
            *(f"{row[name]:.1%}" for name in ("recall_mean", "recall_p5")),
            f"{row['kept_mean']:.0f}",
        ]
        for row in result["rows"]
    ]
    head = ["context", "blocks scored", "mass found", "5 % of rows below", "tokens kept"]
    return "\n".join([*markdown(head, rows, 2), "", _on_rows(result)])


def _on_rows(result: Mapping[str, Any]) -> str:
    rows, torch = result["rows"][0]["rows"], result["versions"]["torch"]
    where = f"{result['text']}; {result['device']}, torch {torch}"
    return f"The last {rows} rows as decode rows, {where}: `{result['command']}`."


def whole(result: Mapping[str, Any]) -> str:
    """Whole models, one run of ``sparsec bench`` or several."""
    rows, runs = [], result.get("runs", [result])
    for run in runs:
        steps = {row["system"]: row["step_s"] for row in run["rows"] if "step_s" in row}
        for row in run["rows"]:
            ratio = f"{steps['dense'] / row['step_s']:.2f}x" if row["system"] != "dense" and "dense" in steps else ""
            timed = [f"{row['prefill_s']:.3g} s", f"{row['step_s'] * 1e3:.2f} ms"] if "step_s" in row else ["", ""]
            cache = _gibibytes(row["kv_bytes"]) if "kv_bytes" in row else ""
            rows.append([f"{row['context']:,}", str(row["batch"]), row["system"], *timed, ratio, cache, row["runs"]])
    head = ["tokens", "batch", "system", "first token", "a token", "faster", "KV cache", "runs"]
    first = runs[0]
    made = f"{first['device']}, {first['dtype']}, torch {first['versions']['torch']}"
    commands = ", ".join(f"`{run['command']}`" for run in runs)
    return "\n".join([*markdown(head, rows, 3), "", f"{made}: {commands}."])


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
