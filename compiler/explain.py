"""Words and tables for people: what an artifact is, what a compile did, what an evaluation found."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from sparsec.errors import ArtifactError
from sparsec.export import evaluation
from sparsec.export.evaluation import NONE
from sparsec.export.manifest import manifest_data
from sparsec.export.selectors import KINDS, break_even_words, head_rows, share, unit
from sparsec.export.words import MINUS, elsewhere, far_words, measured, memory, own_indexers, size
from sparsec.layout import MANIFEST, MEASUREMENTS, REPORT, check_tensors, is_artifact, read_json, read_plan
from sparsec.plan import Plan, Selector
from sparsec.plugins.kernels.support import reason_in

if TYPE_CHECKING:
    from sparsec.compiler.pipeline import Outcome
    from sparsec.passes.base import Pass

NUMBER = re.compile(rf"[+\-{MINUS}]?\.?\d|[-{NONE}]?$")  # or nothing, or a dash


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; numbers to the right. No truncation: a pipe gets what a terminal gets."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [bool(rows) and all(NUMBER.match(row[i]) for row in rows) for i in range(len(head))]
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
        "manifest": manifest_data(path),
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
        f"runs on   PyTorch reference (CPU, CUDA): sparse attention computed exactly, {memory(plan)}",
        f"          {_kernels(plan)}",
        f"          stock Transformers opens it as {elsewhere(plan, trained=made['weights'] == 'trained')}",
        "",
        *_plan_lines(plan),
        "",
        _head_map(plan),
        "",
        *_gate_lines(data["measurements"]["gate"]),
        *_selector_lines(measured(data["measurements"], "rtpurbo")),
        "",
        f"report    {path / REPORT}",
    ]
    return "\n".join(lines)


def _kernels(plan: Plan) -> str:
    """Whether Triton's kernels run the plan."""
    against = reason_in(plan)
    if against is not None:
        return f"no kernels: {against}"
    return "Triton's kernels on a CUDA GPU, the PyTorch reference elsewhere"


def _plan_lines(plan: Plan) -> list[str]:
    if plan.dsa is not None:
        return [f"{name:<8}  {words}" for name, words in own_indexers(plan)]
    heads = sum(len(layer.retrieval) for layer in plan.layers if layer.heads is not None)
    local = sum(len(layer.local) for layer in plan.layers)
    freed = sum(len(layer.local_kv_heads(plan.model.group)) for layer in plan.layers)
    lines = [f"heads     {heads} retrieval, {local} local"]
    if plan.window is not None:
        lines += [
            f"window    {plan.window.size} tokens and {plan.window.sinks} sinks; dense up to {plan.min_context} tokens",
            *["          one token more, the mean of all that left the window"] * plan.window.compensate,
            f"memory    {freed} of {plan.model.layers * plan.model.kv_heads} KV heads keep sinks and window only",
        ]
    if (r := plan.routing) is not None:
        what = f"forecasters of rank {r.rank}" if r.rank else "nothing in place of what is skipped"
        lines.append(f"routing   attention of {len(r.attention)} layers, MLPs of {len(r.mlp)}; {what}")
    if plan.selector is not None:
        s = plan.selector
        unit = "tokens" if s.granularity == "token" else f"blocks of {s.block}"
        lines += [
            f"selector  rank {s.rank}, {s.rope}-RoPE, top-p {s.top_p} of {unit}, {s.sinks} sinks and "
            f"the last {s.recent} forced, one set a {s.scope.replace('_', ' ')}",
            *[f"          in prefill too: {s.query_block} rows at a time choose blocks of {s.block}"]
            * (s.prefill == "selector"),
            *_coarse_lines(s),
            *["          its keys are in fp8, one scale a token and head"] * (s.index_dtype == "fp8"),
            f"sharing   {plan.pattern} on layers {', '.join(map(str, plan.indexed()))}",
        ]
    return lines


def _coarse_lines(selector: Selector) -> list[str]:
    if (c := selector.coarse) is None:
        return []
    return [f"          beyond {c.min_context} tokens scored in one block of {c.one_in} alone, by mean keys of blocks"]


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
    lines += [f"          {words}" for words in far_words(gate)] if "far" in gate else []
    if selector:
        lines.append(
            f"          selectors find {selector['recall_mean']:.1%} of the attention mass in "
            f"{selector['kept_mean']:.0f} of {selector['context_mean']:.0f} tokens (p95 {selector['kept_p95']:.0f})"
        )
    return lines


def _selector_lines(split: Mapping[str, Any] | None) -> list[str]:
    """What rtpurbo measured of the selectors, before any sharing: recall, tokens, bytes, and a row a head."""
    if split is None or not split["selector"]["heads"]:
        return []
    found = split["selector"]
    if "contexts" not in found:
        return ["", "selectors measured by an older sparsec, which wrote less: compile again for the rest"]
    all_, held = found["summary"], found["resident"]
    parts = [f"{name} {size(held[kind])}" for kind, name in KINDS.items() if held[kind]]
    return [
        "",
        f"selectors before any sharing, {all_['rows']} decode rows in {all_['context_mean']:.0f} tokens",
        f"          recall {share(all_['recall_mean'])}; without sinks {share(all_['sinkless_mean'])}; without any "
        f"forced token {share(all_['far_mean'])}",
        f"          tokens kept: {all_['kept_mean']:.0f} as {unit(all_)}, {all_['other_kept_mean']:.0f} as "
        f"{unit(all_, other=True)}, {all_['oracle_kept_mean']:.0f} by the true attention",
        f"bytes     break-even of what a decode step reads: {break_even_words(found['break_even'])}; no time",
        f"          cache of {found['context']} tokens: {', '.join(parts)}; dense {size(held['dense'])}",
        "",
        table(*head_rows(found["heads"], all_)),
        "recall of true attention mass: all, no sinks, no forced token (chosen); p5: 5% of rows find less",
        f"kept: tokens as run, p95, by the same scores as {unit(all_, other=True)}, by the true attention (perfect)",
    ]


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
    """``sparsec eval``: its tables, how to read them, what they were measured on."""
    parts = []
    for each in evaluation.tables(result):
        parts += [*([f"{each.title}"] if each.title else []), table(each.head, each.rows), fill(each.note, 110), ""]
    return "\n".join([*parts, *evaluation.made_of(result, result["text"]["spec"])])


def pass_data(kind: type[Pass]) -> dict[str, Any]:
    """A pass as JSON data."""
    from sparsec.passes.base import in_words

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
        "needs": in_words(kind.needs),
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
