"""The model card: README.md of an artifact, with the front matter that the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sparsec.export.words import (
    change,
    commands,
    count,
    elsewhere,
    gate_words,
    kept_heads,
    model_name,
    percent,
    plural,
    runs,
    runs_on,
    size,
    verdict_words,
)
from sparsec.plan import Plan

LOAD = """\
import sparsec

model, tokenizer = sparsec.load("path/to/this/folder")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""
AUTO = """\
import sparsec  # from here on AutoModelForCausalLM runs plans
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")  # or its id on the Hub
"""


def model_card(plan: Plan, measurements: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """README.md as text. The arguments are those of :func:`sparsec.export.report.render_report`."""
    source, passes = manifest["source"], [each["name"] for each in measurements["passes"]]
    name = f"{model_name(manifest).rpartition('/')[2]}-sparse"
    data = ModelCardData(
        base_model=source["base_model"],
        license=source["license"],
        language=list(source.get("language") or ()) or None,
        library_name="sparsec",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["sparse-attention", "long-context", *passes])),
        model_name=name,
        eval_results=_results(measurements),
    )
    gate, text = measurements["gate"], measurements["calibration"]
    other = elsewhere(plan, trained=manifest["weights"] == "trained")
    parts = [
        f"# {_plain(model_name(manifest))}, sparse attention",
        _what(plan, passes, manifest),
        "" if gate["passed"] else f"**This artifact failed its gate; do not deploy it.** {_plain(verdict_words(gate))}",
        "## What runs",
        "\n".join(f"- {part}: {words}" for part, words in runs(plan)),
        "## How to load it",
        _fenced(LOAD, "python"),
        "Or through Transformers:",
        _fenced(AUTO, "python"),
        f"**Without `import sparsec`, stock Transformers opens this folder as {other}**"
        + (": nothing is sparse and no memory is saved." if plan.dsa is None else ""),
        "## What was measured",
        f"The gate read {gate_words(gate)}.",
        _measured(gate),
        "Tokens kept include those that are always kept. `report.html` and `measurements.json` hold the rest.",
        "## What it was calibrated on",
        f"{_code(text['spec'])} ({_plain(text['made_of'])}), seed {measurements['seed']}: "
        f"{count(text['tokens']['train'])} tokens to train on, {count(text['tokens']['search'])} to search on, "
        f"{count(text['tokens']['heldout'])} held out; no document is in two of them.",
        "## Limits",
        _limits(plan, gate, source),
        "## How to make it again",
        "Inside this folder; paths are as they were given then:",
        _fenced(commands(manifest), "sh"),
        f"Made by {_plain(manifest['producer'])}; plan `{plan.digest[:16]}`.",
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml().strip()}\n---\n\n{body}\n"))


def _results(measurements: Mapping[str, Any]) -> list[EvalResult]:
    """The gate's figures, for the card's model-index."""
    gate, text = measurements["gate"], measurements["calibration"]
    about: dict[str, Any] = {"task_type": "text-generation", "dataset_name": f"held-out part of {text['spec']}"}
    about |= {"dataset_type": "held-out", "dataset_split": "heldout", "dataset_revision": text["digest"]}
    found = {"bits per byte": gate["artifact"]["bits_per_byte"], "bits per byte, dense": gate["dense"]["bits_per_byte"]}
    if gate["selector"]:
        found["attention mass found"] = gate["selector"]["recall_mean"]
    return [
        EvalResult(**about, metric_type=label.replace(" ", "_").replace(",", ""), metric_name=label, metric_value=value)
        for label, value in found.items()
    ]


def _what(plan: Plan, passes: Sequence[str], manifest: Mapping[str, Any]) -> str:
    kept, heads = kept_heads(plan)
    weights = "weights trained for it" if manifest["weights"] == "trained" else "the same weights"
    first = (
        f"{_code(model_name(manifest))} with {weights} and a plan that says for every layer and query head what "
        f"it attends to, made by sparsec ({', '.join(passes)})."
    )
    if plan.dsa is not None:
        own = f"{plan.pattern.count('F')} of {plural(plan.model.layers, 'layer')}"
        return f"{first} {own} choose tokens with indexers of their own, the others read what those chose."
    if plan.window is None:
        return f"{first} {count(kept)} of {count(heads)} query heads read the whole context."
    return (
        f"{first} {count(kept)} of {count(heads)} query heads can reach the whole context, all others see a window of "
        f"{count(plan.window.size)} tokens and the first {plan.window.sinks}."
    )


def _measured(gate: Mapping[str, Any]) -> str:
    dense, found, selector = gate["dense"], gate["artifact"], gate["selector"]
    saved = found["kv_bytes"] / dense["kv_bytes"] - 1
    rows = [
        ["bits per byte", f"{dense['bits_per_byte']:.4f}", f"{found['bits_per_byte']:.4f}", change(gate["loss"])],
        ["KV cache resident", size(dense["kv_bytes"]), size(found["kv_bytes"]), change(saved, 1)],
    ]
    if selector:
        mean, whole = selector["kept_mean"], selector["context_mean"]
        rows += [
            ["attention mass found (recall), mean", "100%", percent(selector["recall_mean"]), ""],
            ["tokens kept by a retrieval head, mean", count(whole), count(mean), change(mean / whole - 1, 1)],
            ["tokens kept, 95% of rows at most", count(whole), count(selector["kept_p95"]), ""],
        ]
    lines = [["", "dense", "artifact", "against dense"], ["---", "---:", "---:", "---:"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _limits(plan: Plan, gate: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    limits = [
        "Quality was measured on the held-out part of the calibration text only, not on tasks or other domains.",
        f"Contexts longer than {count(gate['context'])} tokens were not judged by the gate.",
        runs_on(plan),
    ]
    if source["license"] is None:
        limits.append("The source states no license: look up the base model's before you pass this on.")
    return "\n".join(f"- {limit}" for limit in limits)


def _plain(text: str) -> str:
    """Words in Markdown: one line, nothing that Markdown or HTML would read as markup."""
    line = " ".join(str(text).split())
    for sign in "\\`*_[]<>|#":
        line = line.replace(sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return line


def _code(text: str) -> str:
    """Inline code, whatever is in it."""
    line = " ".join(str(text).split())
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (_longest_run(line) + 1)
    return f"{fence} {line} {fence}"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    """Of backticks."""
    longest = run = 0
    for sign in text:
        run = run + 1 if sign == "`" else 0
        longest = max(longest, run)
    return longest
