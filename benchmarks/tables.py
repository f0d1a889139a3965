"""Fills the ``<!-- table: NAME -->`` blocks of README.md and docs/ from benchmarks/results/*.json.

python benchmarks/tables.py            write them anew
python benchmarks/tables.py --check    exit with 1 if one is stale

eval      eval-demo.json, what ``sparsec eval -o`` wrote: systems side by side, tasks, positions, long decode
passes    distill-demo.json, the same of several artifacts: make table
multi     multi-demo.json, several values and several questions at once, of the trained artifact: make table
heads     the same beside distill-needles-demo.json, whose heads needles chose: the two choices
indexers  indexers-demo.json, what benchmarks/indexers.py wrote: before and after RoPE
indexers-yarn  indexers-yarn-demo.json, the same at twice the trained length, with YaRN
indexers-needles, indexers-yarn-needles    what it wrote with --needles: the tasks, by kind
recent    recent-tokens-demo.json, what benchmarks/recent_tokens.py wrote: what selectors cost, by what they always keep
recipes   recipes-demo.json, what benchmarks/recipes.py wrote: plans and options of distill on development text
patterns  sharing-demo.json, what benchmarks/sharing.py wrote: patterns of the demo model's indexers
sharing   dsa-tiny.json, what benchmarks/dsa.py wrote: patterns of a small DSA model
cheaper   the same: HISA and MISA
cheaper-text  dsa-text.json, what benchmarks/text_dsa.py wrote: both on natural text
kernels   kernels.json, what benchmarks/kernels.py wrote: one layer beside the fastest dense kernel
whole     bench-llama-8b.json, what sparsec bench --shape printed: a whole model beside the dense one
small     bench-demo.json, what sparsec bench printed: the demo artifact beside the dense model
rope      rope-scaling-demo.json, what benchmarks/rope_scaling.py wrote: can the dense model read beyond its length
gate      gate-demo.json, what benchmarks/release_gate.py wrote: what verify takes, and what it catches
engines   engines-demo.json, what benchmarks/engines.py wrote: TensorRT-RTX, built with no GPU
onnx      onnx-demo.json, what benchmarks/onnx_speed.py wrote: ONNX Runtime, the artifact beside the dense model
merged    merged-demo.json, what benchmarks/merged_tokens.py wrote: quality by how embeddings are predicted;
          merged-minutes.json the same with little training
long-decode  long-decode-demo.json, what ``sparsec eval`` wrote: greedy text beside the dense model's
lengths   merged-text.json, what benchmarks/merged_text.py wrote: tokens saved, speed, round trips
index     output-index.json, what benchmarks/output_index.py wrote: decode over a million merged tokens
vllm      vllm-merged.json, what benchmarks/vllm_merged.py wrote: an artifact in vLLM beside stock Transformers
routing   routing-demo.json, what benchmarks/routing.py wrote: forecasting, skipping, dropping, chance
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsec.export.evaluation import made_of, tables

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]

from blocks import documents, main  # noqa: E402  a script's folder, not a package
from merged_tables import large, lengths, markdown, merged, vllm  # noqa: E402
from rtpurbo_tables import heads, indexers, needles, recent, recipes, rope  # noqa: E402
from sharing_tables import patterns  # noqa: E402
from speed_tables import coarse, index_keys, kernels, whole  # noqa: E402

SHOWN = ("PLUGIN_V3", "KV_CACHE_UPDATE", "TOPK")  # kinds of layers that a table names
RESULTS = ROOT / "benchmarks" / "results"


def render(name: str) -> str:
    """One table.

    Raises:
        ValueError: no such table.
    """
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}: see benchmarks/tables.py")
    stem, command, write = TABLES[name]
    file = RESULTS / f"{stem}.json"
    if not file.is_file():
        return f"Not measured yet: `{command}` measures it and fills this in."
    result = json.loads(file.read_text(encoding="utf-8"))
    return write(result) + (f"\n\n{result['note']}" if "note" in result else "")


def evaluation(result: Mapping[str, Any]) -> str:
    """The result of ``sparsec eval`` as Markdown."""
    parts = []
    for table in tables(result):
        parts += [f"**{table.title}**", ""] if table.title else []
        parts += [*markdown(table.head, table.rows, table.left), "", table.note, ""]
    return "\n".join([*parts, "; ".join(made_of(result, Path(result["text"]["spec"]).name)) + "."])


def sharing(result: Mapping[str, Any]) -> str:
    """Patterns side by side, and both searches, of what benchmarks/dsa.py found."""
    rows = [
        [name, f"`{row['pattern']}`" if "pattern" in row else "", *_answers(row)]
        for name, row in result["systems"].items()
        if name == "own indexers" or ("pattern" in row)
    ]
    searches = []
    for order, one in result["searches"].items():
        done, plain = one["layer_evaluations"], one["layer_evaluations_plain"]
        work = f"{one['candidates']} candidates, {done:,} of {plain:,} layer evaluations ({done / plain:.0%})"
        searches.append(f"{order}: `{one['pattern']}`, {work}, {one['seconds']:.0f} s")
    head = ["", "pattern", "asked values named", "nats"]
    return "\n".join([*markdown(head, rows, 2), "", f"Searches: {'; '.join(searches)}. {_made(result)}"])


def cheaper(result: Mapping[str, Any]) -> str:
    """HISA and MISA alone and on shared indexers, of what benchmarks/dsa.py found."""
    rows = []
    for name, row in result["systems"].items():
        choice = result["choices"].get(name)
        if name == "own indexers" or choice or name.startswith("searched, trained"):
            shares = [f"{choice[figure]:.1%}" for figure in ("iou", "recovered")] if choice else ["", ""]
            rows.append([name, *shares, *_answers(row)])
    head = ["", "IoU", "recovered", "asked values named", "nats"]
    return "\n".join([*markdown(head, rows, 1), "", _made(result)])


def cheaper_text(result: Mapping[str, Any]) -> str:
    """HISA and MISA on natural text, of what benchmarks/text_dsa.py found."""
    rows = []
    for name, row in result["systems"].items():
        shares = [f"{row[figure]:.1%}" if figure in row else "" for figure in ("iou", "recovered", "mass", "mass_flat")]
        rows.append([name, *shares, f"{row['bits_per_byte']:.4f}"])
    head = ["", "IoU", "recovered", "attention mass", "of the flat choice", "bits per byte"]
    note = (
        f"{result['family']}, {result['layers']} layers, {result['top_k']} of {result['length']:,} bytes chosen, "
        f"trained for {result['steps']} steps; {result['windows']} held-out windows. {result['device']}, torch "
        f"{result['versions']['torch']}: `{result['command']}`."
    )
    return "\n".join([*markdown(head, rows, 1), "", note])


def routing(result: Mapping[str, Any]) -> str:
    """Systems at equal removed shares, means over seeds, and wall-clock, of what benchmarks/routing.py found."""
    cells: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for row in result["runs"]:
        if row["system"] != "dense":
            cells.setdefault((row["target"], row["system"]), []).append(row)
    rows = []
    for (target, system), found in sorted(cells.items(), key=lambda item: item[0][0]):
        losses = [row["against_dense"] for row in found]
        shares = [sum(row["removed_by_unit"][unit] for row in found) / len(found) for unit in ("attention", "mlp")]
        rows.append(
            [
                f"{target:.0%}",
                system,
                f"{sum(row['removed'] for row in found) / len(found):.1%}",
                *(f"{share:.1%}" for share in shares),
                f"{sum(losses) / len(losses):+.1%}",
                f"{min(losses):+.1%} to {max(losses):+.1%}",
                str(len({row["seed"] for row in found})),
            ]
        )
    head = ["asked", "system", "removed", "by attention", "by MLPs", "bits per byte", "over seeds", "seeds"]
    last = result["runs"][-1]
    on = f"{last['device']}, torch {last['versions']['torch']}"
    commands = " and ".join(f"`{each}`" for each in dict.fromkeys(row["command"] for row in result["runs"]))
    lines = [*markdown(head, rows, 2), "", f"{on}, windows of {last['context']:,} tokens: {commands}."]
    timed = [
        [
            row["what"],
            f"{row['shape']}, {row['dtype']}, {row['device']}",
            f"{row['batch']} x {row['length']:,}",
            row.get("routed", "plain indexing"),
            f"{row['removed']:.1%}" if row.get("removed") else "",
            f"{row['speedup']:.2f}x",
        ]
        for row in result["speed"]
    ]
    commands = ", ".join(f"`{each}`" for each in dict.fromkeys(row["command"] for row in result["speed"]))
    lines += ["", *markdown(["", "model", "tokens", "routed by", "removed", "of dense's speed"], timed, 4)]
    lines += ["", f"Beside {result['speed'][-1]['dense']}, in one run each: {commands}."]
    for row in result.get("stages", ()):
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in row["seconds_by_stage"].items())
        whole = f"{row['lff_seconds']:.0f} s for the forecasters of {row['seconds']:.0f} s for the pass"
        lines += ["", f"On {row['device']}, tier minutes: {whole} ({parts}): `{row['command']}`."]
    return "\n".join(lines)


def gate(result: Mapping[str, Any]) -> str:
    """What `sparsec verify` takes and catches."""
    runs = [("`verify --quick`", result["quick"]), ("`verify`", result["whole"])]
    rows = [
        [name, *(f"{each[key]:,.0f} s" for key in ("seconds", "cpu")), f"{each['load']:.1f}", _counted(each["checks"])]
        for name, each in runs
    ]
    caught = [
        [
            name,
            each["what"],
            "yes" if each["hashes hold"] else "no",
            "yes" if each["status"] == 3 else "no",
            each["said"],
        ]
        for name, each in result["changed"].items()
    ]
    flipped = result["corruptions"]
    machine = f"{result['cores']} cores, torch {result['versions']['torch']}"
    note = (
        f"Of {flipped['flipped']} single bytes that were changed, one at a time, {flipped['caught']} were caught. CPU "
        f"seconds are those of all threads; load is what else wanted the cores when the run began. {machine}: "
        f"`{result['command']}`."
    )
    return "\n".join(
        [
            *markdown(["", "wall-clock", "CPU", "load", "checks"], rows, 1),
            "",
            *markdown(["changed and hashed again", "where", "hashes hold", "caught", "by"], caught, 5),
            "",
            note,
        ]
    )


def _counted(checks: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in checks.items())


def onnx(result: Mapping[str, Any]) -> str:
    """The result of benchmarks/onnx_speed.py as Markdown: the artifact and the dense model, exported the same way."""
    rows = [
        [
            name,
            f"{row['step_s'] * 1e3:.0f} ms",
            f"{row['quartiles_s'][0] * 1e3:.0f} to {row['quartiles_s'][1] * 1e3:.0f} ms",
            f"{row['kv_bytes'] / 2**20:.1f} MiB",
            f"{row['export']['seconds']:.0f} s",
            f"{row['export']['peak_bytes'] / 2**30:.2f} GiB",
        ]
        for name, row in result["rows"].items()
    ]
    head = ["", "a token", "quartiles", "stores", "export", "its peak memory"]
    same = result["parity"]
    parity = (
        f"Against PyTorch behind {same['prompt']:,} tokens, {same['steps']} steps: {same['same']:.1%} of greedy tokens "
        f"equal, largest error relative to a row's largest logit {max(same['prefill'], same['decode']):.1e}."
    )
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "onnxruntime"))
    made = f"{result['context']:,} tokens, {result['dtype']}, CPU, {result['threads']} threads"
    if "load" in result:
        made += f", where {result['load']:.0f} processes wanted a core"
    note = f"Decode {result['ratio']:.2f} times as fast. {parity} {made}; {versions}: `{result['command']}`."
    return "\n".join([*markdown(head, rows, 1), "", note])


def engines(result: Mapping[str, Any]) -> str:
    """The result of benchmarks/engines.py as Markdown: each engine beside the weights, its layers and plugins."""
    weights = result["weights_bytes"]
    rows = []
    for name, row in result["rows"].items():
        layers = ", ".join(f"{count} {kind}" for kind, count in row["layers"].items() if kind in SHOWN)
        size = f"{row['bytes'] / 2**20:.0f} MiB ({row['bytes'] / weights - 1:+.1%})"
        rows.append([name, size, f"{row['seconds']:.0f} s", f"{sum(row['layers'].values()):,}", layers or "none"])
    kinds = sorted({each["name"] for each in result["plugins"]})
    known = ", ".join(str(each) for each in result["compute_capabilities"])
    made = (
        f"Weights {weights / 2**20:.0f} MiB, {result['dtype']}, {result['slots']:,} slots, compute capabilities "
        f"{known}; plugins: {', '.join(kinds)}. TensorRT-RTX {result['versions']['tensorrt_rtx']}, no GPU: "
        f"`{result['command']}`."
    )
    return "\n".join([*markdown(["engine", "size", "built in", "layers", "of them"], rows, 1), "", made])


def _answers(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['accuracy']:.1%}", f"{row['nats']:.4f} ± {row['error']:.4f}"]


def _made(result: Mapping[str, Any]) -> str:
    model, training, torch = result["model"], result["training"], result["versions"]["torch"]
    shape = f"{model['family']}, {model['layers']} layers, {model['top_k']} of {result['context']:,} tokens chosen"
    untrained = f"{training['indexers untrained']:.1%}"
    bounds = f"in its training it named {training['dense']:.1%} dense, {untrained} with indexers untrained"
    judged = f"{result['segments']} documents, standard errors over them; kept indexers trained at {result['lr']:g}"
    return f"{shape}; {bounds}. {judged}; {result['device']}, torch {torch}: `{result['command']}`."


TABLES: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], str]]] = {
    "eval": ("eval-demo", "make bench", evaluation),
    "passes": ("distill-demo", "make table", evaluation),
    "multi": ("multi-demo", "make table", evaluation),
    "heads": ("distill-needles-demo", "make table, of artifacts compiled with rtpurbo.choose=needles,", heads),
    "rope": ("rope-scaling-demo", "python benchmarks/rope_scaling.py demo --text texts/eval", rope),
    "patterns": ("sharing-demo", "python benchmarks/sharing.py out/every out/split && make docs", patterns),
    "sharing": ("dsa-tiny", "python benchmarks/dsa.py OUT && make docs", sharing),
    "cheaper": ("dsa-tiny", "python benchmarks/dsa.py OUT && make docs", cheaper),
    "cheaper-text": ("dsa-text", "python benchmarks/text_dsa.py && make docs", cheaper_text),
    "kernels": (
        "kernels",
        "python benchmarks/kernels.py --rates 0.04,0.1,0.15 -o benchmarks/results/kernels.json && make docs",
        kernels,
    ),
    "whole": ("bench-llama-8b", "sparsec bench --shape benchmarks/shapes/llama-3.1-8b.json", whole),
    "small": ("bench-demo", "make table", whole),
    "index-keys": ("index-keys-demo", "python benchmarks/index_keys.py out/blocks && make docs", index_keys),
    "coarse": ("coarse-demo", "python benchmarks/coarse.py out/blocks && make docs", coarse),
    "gate": ("gate-demo", "python benchmarks/release_gate.py out/demo && make docs", gate),
    "long-decode": ("long-decode-demo", "make table", evaluation),
    "merged": ("merged-demo", "python benchmarks/merged_tokens.py", merged),
    "merged-minutes": ("merged-minutes", "python benchmarks/merged_tokens.py", merged),
    "lengths": (
        "merged-text",
        "python benchmarks/merged_text.py -o benchmarks/results/merged-text.json && make docs",
        lengths,
    ),
    "index": (
        "output-index",
        "python benchmarks/output_index.py -o benchmarks/results/output-index.json && make docs",
        large,
    ),
    "vllm": ("vllm-merged", "python benchmarks/vllm_merged.py ARTIFACT", vllm),
    "routing": ("routing-demo", "python benchmarks/routing.py quality && make docs", routing),
    "onnx": ("onnx-demo", "python benchmarks/onnx_speed.py out/demo -o benchmarks/results/onnx-demo.json", onnx),
    "engines": (
        "engines-demo",
        "python benchmarks/engines.py out/demo -o benchmarks/results/engines-demo.json",
        engines,
    ),
    "indexers": ("indexers-demo", "python benchmarks/indexers.py && make docs", indexers),
    "indexers-needles": (
        "indexers-needles-demo",
        "python benchmarks/indexers.py demo --needles texts/eval --out benchmarks/results/indexers-needles-demo.json",
        needles,
    ),
    "indexers-yarn-needles": (
        "indexers-yarn-needles-demo",
        "python benchmarks/indexers.py demo --scaling yarn --needles texts/eval --lengths 16000 "
        "--out benchmarks/results/indexers-yarn-needles-demo.json",
        needles,
    ),
    "recent": (
        "recent-tokens-demo",
        "python benchmarks/recent_tokens.py out/split && make docs",
        recent,
    ),
    "recipes": (
        "recipes-demo",
        "python benchmarks/recipes.py out/rtpurbo --train texts/train --dev texts/dev --bounds --recipe lr=5e-5",
        recipes,
    ),
    "indexers-yarn": (
        "indexers-yarn-demo",
        "python benchmarks/indexers.py demo --scaling yarn --out benchmarks/results/indexers-yarn-demo.json",
        indexers,
    ),
}


if __name__ == "__main__":
    sys.exit(main("Fill the tables of the documents from the results.", "table", render, documents()))
