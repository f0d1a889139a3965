"""Words and tables for people: what an artifact is, what a compile did, what an evaluation found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import ArtifactError
from sparsec.layout import MANIFEST, MEASUREMENTS, REPORT, check_tensors, is_artifact, read_json, read_plan
from sparsec.plan import Plan

if TYPE_CHECKING:
    from sparsec.compiler.pipeline import Outcome
    from sparsec.passes.base import Pass


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; numbers to the right. No truncation: a pipe gets what a terminal gets."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [bool(rows) and all(row[i][:1] in "0123456789+-." for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def artifact_data(path: Path) -> dict[str, Any]:
    """Plan, measurements and manifest.

    Raises:
        ArtifactError: no artifact of ours, or a damaged one.
    """
    plan = read_plan(path)
    if not is_artifact(path):
        raise ArtifactError(f"{path} has a plan, but no {MANIFEST} of sparsec compile: copy the whole artifact")
    check_tensors(path)
    return {
        "plan": plan.to_json(),
        "digest": plan.digest,
        "pattern": plan.pattern,
        "measurements": read_json(path / MEASUREMENTS),
        "manifest": read_json(path / MANIFEST),
    }


def artifact_text(path: Path, data: Mapping[str, Any]) -> str:
    """``sparsec inspect``."""
    plan, made = Plan.parse(data["plan"]), data["manifest"]
    shape, source = plan.model, made["source"]
    lines = [
        f"artifact  {path}",
        f"source    {source['spec']}" + (f" at {source['revision']}" if source["revision"] else ""),
        f"model     {shape.model_type}, {shape.layers} layers, {shape.heads} query heads on {shape.kv_heads} KV heads "
        f"of dimension {shape.head_dim}",
        f"passes    {', '.join(p.name for p in plan.passes) or 'none'}",
        f"plan      {plan.digest[:16]}, written by {plan.producer}",
        "runs on   PyTorch reference (CPU, CUDA): sparse attention computed exactly, memory saved, no kernels yet",
        "          stock Transformers opens it as the plain dense model",
        "",
        *_plan_lines(plan),
        "",
        _head_map(plan),
        "",
        *_gate_lines(data["measurements"]["gate"]),
        "",
        f"report    {path / REPORT}",
    ]
    return "\n".join(lines)


def _plan_lines(plan: Plan) -> list[str]:
    heads = sum(len(layer.retrieval) for layer in plan.layers if layer.heads is not None)
    local = sum(len(layer.local) for layer in plan.layers)
    freed = sum(len(layer.local_kv_heads(plan.model.group)) for layer in plan.layers)
    lines = [f"heads     {heads} retrieval, {local} local"]
    if plan.window is not None:
        lines += [
            f"window    {plan.window.size} tokens and {plan.window.sinks} sinks; dense up to {plan.min_context} tokens",
            f"memory    {freed} of {plan.model.layers * plan.model.kv_heads} KV heads keep sinks and window only",
        ]
    if plan.selector is not None:
        s = plan.selector
        unit = "tokens" if s.granularity == "token" else f"blocks of {s.block}"
        lines += [
            f"selector  rank {s.rank}, {s.rope}-RoPE, top-p {s.top_p} of {unit}, {s.sinks} sinks and "
            f"the last {s.recent} forced, one set a {s.scope}",
            f"sharing   {plan.pattern} on layers {', '.join(map(str, plan.indexed()))}",
        ]
    return lines


def _head_map(plan: Plan) -> str:
    rows = []
    for i, layer in enumerate(plan.layers):
        marks = "as the model made it" if layer.heads is None else "".join("#" if h else "." for h in layer.heads)
        index = layer.index if layer.index != "shared" else f"shared with {plan.index_source(i)}"
        rows.append([str(i), marks, "" if index == "none" else index])
    return table(["layer", "heads (# retrieval)", "index"], rows)


def _gate_lines(gate: Mapping[str, Any]) -> list[str]:
    """The verdict in words."""
    dense, found, selector = gate["dense"], gate["artifact"], gate["selector"]
    lines = [
        f"gate      {'passed' if gate['passed'] else 'FAILED: ' + '; '.join(gate['failures'])}",
        f"          {found['bits_per_byte']:.4f} bits per byte, dense {dense['bits_per_byte']:.4f} "
        f"({gate['loss']:+.2%}, allowed {gate['allowed']['max_loss']:+.0%})",
        f"          {gate['decode_rows']} decode rows after {gate['context'] - gate['decode_rows']} tokens, "
        f"{gate['windows']} held-out window(s)",
    ]
    if selector:
        lines.append(
            f"          selectors find {selector['recall_mean']:.1%} of the attention mass in "
            f"{selector['kept_mean']:.0f} of {selector['context_mean']:.0f} tokens (p95 {selector['kept_p95']:.0f})"
        )
    return lines


def outcome_text(outcome: Outcome) -> str:
    """What ``sparsec compile`` prints at the end."""
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome.seconds.items())
    return "\n".join(
        [
            *_plan_lines(outcome.plan),
            *_gate_lines(outcome.measurements["gate"]),
            f"time      {times}",
            f"artifact  {outcome.out}",
            f"report    {outcome.out / REPORT}",
        ]
    )


def evaluation_text(result: Mapping[str, Any]) -> str:
    """``sparsec eval``: one row a length and system."""
    tasks = sorted({task for cell in result["cells"] for task in cell.get("tasks", {})})
    dense = {c["length"]: c.get("bits_per_byte") for c in result["cells"] if c["system"] == "dense"}
    full = {c["length"]: c.get("kv_bytes") for c in result["cells"] if c["system"] == "dense"}
    head = [
        "length",
        "system",
        "bits/byte",
        "vs dense",
        *tasks,
        "recall",
        "kept",
        "kept p95",
        "KV MiB",
        "of dense",
    ]
    rows = []
    for cell in result["cells"]:
        bits, base = cell.get("bits_per_byte"), dense.get(cell["length"])
        selector = cell.get("selector") or {}
        bytes_, whole = cell.get("kv_bytes"), full.get(cell["length"])
        rows.append(
            [
                str(cell["length"]),
                cell["system"],
                f"{bits:.4f}" if bits else "-",
                f"{bits / base - 1:+.2%}" if bits and base else "-",
                *(f"{cell['tasks'][task]['exact']:.2f}" if task in cell.get("tasks", {}) else "-" for task in tasks),
                f"{selector['recall_mean']:.3f}" if selector else "-",
                f"{selector['kept_mean']:.0f}" if selector else "-",
                f"{selector['kept_p95']:.0f}" if selector else "-",
                f"{bytes_ / 2**20:.1f}" if bytes_ else "-",
                f"{bytes_ / whole:.0%}" if bytes_ and whole else "-",
            ]
        )
    windows = {len(cell["windows"]) for cell in result["cells"] if "windows" in cell}
    tail = [
        f"{result['prompts_each']} prompts a task and length, {'/'.join(map(str, sorted(windows)))} text windows, "
        f"the last {result['rows']} tokens of each scored as decode rows",
        f"seed {result['seed']}, {result['device']}, {result['dtype']}",
        f"text: {result['text']['spec']} (held-out part, digest {result['text']['digest'][:16]})",
        *result["notes"],
    ]
    return "\n".join([table(head, rows), "", *tail])


def pass_data(kind: type[Pass]) -> dict[str, Any]:
    """A pass as JSON data."""
    options = {
        name: {"default": field.get_default(call_default_factory=True), "help": field.description}
        for name, field in kind.model_fields.items()
    }
    return {
        "name": kind.name,
        "tier": kind.tier,
        "summary": kind.summary,
        "source": kind.source,
        "after": list(kind.after),
        "needs": list(kind.needs),
        "options": options,
    }


def passes_text(kinds: Mapping[str, type[Pass]], *, options: bool) -> str:
    """``sparsec passes``."""
    text = table(
        ["pass", "tier", "what it does", "source"],
        [[kind.name, kind.tier, kind.summary, kind.source] for kind in kinds.values()],
    )
    if not options:
        return text + "\n\nOptions of one: sparsec passes NAME"
    for kind in kinds.values():
        described = pass_data(kind)["options"]
        rows = [[name, str(entry["default"]), entry["help"]] for name, entry in described.items()]
        text += "\n\n" + table([f"--set {kind.name}.…", "default", "meaning"], rows)
    return text
