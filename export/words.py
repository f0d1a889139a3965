"""Numbers and sentences that the report and the model card share."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsec.export.dsa import KNOWS_SHARED
from sparsec.plan import Plan
from sparsec.plugins.kernels.support import reason_in

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Reading:
    """One key number: what it is, its value with a unit, and what to compare it with."""

    label: str
    value: str
    note: str


def count(number: float) -> str:
    """A whole number with thousands separators: 12,288."""
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """``1 window``, ``3 windows``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def percent(share: float, digits: int = 1) -> str:
    """0.931 -> 93.1%."""
    return f"{share:.{digits}%}".replace("-", MINUS)


def change(share: float, digits: int = 2) -> str:
    """Relative to something, with its sign: 0.0123 -> +1.23%. What rounds to nothing has no sign."""
    if math.isfinite(share) and round(share, digits + 2) == 0:
        return f"{0:.{digits}%}"
    return f"{share:+.{digits}%}".replace("-", MINUS)


def size(number: float) -> str:
    """Bytes in binary units, three digits: 18.2 MiB."""
    unit = 0
    while number >= 1000 and unit < 4:
        number /= 1024
        unit += 1
    digits = 0 if unit == 0 else 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def measured(measurements: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What the pass ``name`` measured; None where it did not run."""
    return next((each["measured"] for each in measurements["passes"] if each["name"] == name), None)


def configured(measurements: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The configuration of a pass that ran."""
    return next(dict(each["config"]) for each in measurements["passes"] if each["name"] == name)


def model_name(manifest: Mapping[str, Any]) -> str:
    """The base model's name where one is known, else what the user named."""
    source = manifest["source"]
    return str(source["base_model"] or source["spec"])


def kept_heads(plan: Plan) -> tuple[int, int]:
    """Retrieval heads, and query heads of all layers that were split."""
    planned = [layer for layer in plan.layers if layer.heads is not None]
    return sum(len(layer.retrieval) for layer in planned), len(planned) * plan.model.heads


def evicted(plan: Plan) -> int:
    """KV heads that keep sinks and window only."""
    return sum(len(layer.local_kv_heads(plan.model.group)) for layer in plan.layers)


def readings(plan: Plan, gate: Mapping[str, Any]) -> list[Reading]:
    """The headline's key numbers. Percentages with a sign are relative to the dense model."""
    kept, heads = kept_heads(plan)
    full, shared = plan.pattern.count("F"), plan.pattern.count("S")
    dense, found, selector = gate["dense"], gate["artifact"], gate["selector"]
    out = []
    if heads:
        out.append(Reading("heads kept", f"{count(kept)} of {count(heads)}", f"{percent(kept / heads)} of query heads"))
    if full:
        note = f"{full} with an indexer, {shared} shared" if shared else "each with its own indexer"
        out.append(Reading("indexed layers", f"{full + shared} of {plan.model.layers}", note))
    out.append(
        Reading(
            "bits per byte",
            f"{found['bits_per_byte']:.4f}",
            f"{change(gate['loss'])} against dense {dense['bits_per_byte']:.4f}",
        )
    )
    if selector:
        out += [
            Reading(
                "mass recall",
                percent(selector["recall_mean"]),
                f"of true attention; {percent(selector['recall_p5'])} or less in 5% of rows",
            ),
            Reading(
                "tokens kept",
                f"{count(selector['kept_mean'])} of {count(selector['context_mean'])}",
                f"{percent(selector['kept_mean'] / selector['context_mean'])} of the context; "
                f"{count(selector['kept_p95'])} or fewer in 95% of rows",
            ),
        ]
    saved = found["kv_bytes"] / dense["kv_bytes"] - 1
    out.append(
        Reading(
            "KV cache resident", size(found["kv_bytes"]), f"{change(saved, 1)} against dense {size(dense['kv_bytes'])}"
        )
    )
    return out


def verdict_words(gate: Mapping[str, Any]) -> str:
    """Why the gate passed or failed, as a sentence."""
    if gate["failures"]:
        text = "; ".join(gate["failures"])
        return f"{text[:1].upper()}{text[1:]}."
    allowed = gate["allowed"]
    text = f"Bits per byte {change(gate['loss'])} against dense ({change(allowed['max_loss'])} is allowed)"
    if gate["selector"]:
        text += (
            f", the selectors find {percent(gate['selector']['recall_mean'])} of the attention mass "
            f"({percent(allowed['min_recall'])} is the least)"
        )
    return f"{text}."


def far_words(gate: Mapping[str, Any]) -> list[str]:
    """What the gate found beside the plain mean: tokens that need far context, and questions; sentences."""
    found, far = [], gate["far"]
    if far is not None:
        found.append(
            f"{plural(far['tokens'], 'token')} that need far context, weighted by what a window alone costs them: "
            f"{far['dense']:.3f} bits a token dense, {far['artifact']:.3f} in the artifact "
            f"({change(far['artifact'] / far['dense'] - 1)}), {far['near']:.3f} in windows only. They are picked where "
            "dense does well, so anything else looks a little worse."
        )
    if "answered" in gate["dense"]:
        found.append(
            f"Of {plural(gate['questions'], 'long-range question')} dense answers "
            f"{percent(gate['dense']['answered'])}, the artifact {percent(gate['artifact']['answered'])}."
        )
    return found


def gate_words(gate: Mapping[str, Any]) -> str:
    """What the gate read."""
    rows = gate["decode_rows"]
    return (
        f"{plural(gate['windows'], 'held-out window')} of {count(gate['context'])} tokens: the first "
        f"{count(gate['context'] - rows)} are the prompt, the other {count(rows)} are scored as decode steps, on the "
        "artifact as loaded from the disk"
    )


def memory(plan: Plan) -> str:
    """What the reference saves of the cache."""
    if plan.dsa is None:
        return "memory really saved"
    shared = plan.pattern.count("S")
    kept = "every latent stays in the cache"
    return f"{kept}, {plural(shared, 'shared layer')} without index keys" if shared else kept


def runs_on(plan: Plan) -> str:
    """What runs the plan, a sentence; where speed can be learnt."""
    against = reason_in(plan)
    if against is None:
        where = f"On a CUDA GPU Triton's kernels run this plan, elsewhere the PyTorch reference does: {memory(plan)}"
    else:
        where = f"The PyTorch reference runs this plan, on CPU and CUDA ({against}): {memory(plan)}"
    return f"{where}. No speed is claimed here: sparsec bench measures it where it is to run."


def elsewhere(plan: Plan, *, trained: bool) -> str:
    """What stock Transformers makes of an artifact."""
    if plan.dsa is None:
        if plan.frozen is not None:
            return "an ordinary dense model with the larger vocabulary: prompts are shorter there too"
        if trained:
            return "a dense model with the trained weights, which is not the base model"
        return "the plain dense model, with the dense model's answers"
    cheaper = " HISA and MISA are not run." if plan.dsa.hisa is not None or plan.dsa.misa is not None else ""
    if plan.model.model_type in KNOWS_SHARED:
        return f"a model that shares index sets by this pattern, with its own code.{cheaper}"
    return f"the unshared model: every layer runs its own indexer, trained for others or not.{cheaper}"


def own_indexers(plan: Plan) -> list[tuple[str, str]]:
    """What runs of a model's own indexers, part by part; nothing where it has none."""
    if plan.dsa is None:
        return []
    full, every = plan.pattern.count("F"), len(plan.indexed())
    out = [
        (
            "indexers",
            f"the model's own in {full} of {plural(every, 'layer')}: {count(plan.dsa.top_k)} tokens a query, one set "
            "for all heads of a layer, in prefill too",
        ),
        ("sharing", plan.pattern if "S" in plan.pattern else "none"),
    ]
    if plan.dsa.hisa is not None:
        h = plan.dsa.hisa
        gate = f"; all tokens up to {count(h.min_context)}" if h.min_context else ""
        out.append(("HISA", f"tokens of the best {h.top_blocks} blocks of {h.block}, the first and the own one{gate}"))
    if plan.dsa.misa is not None:
        m = plan.dsa.misa
        again = f", the best {count(m.candidates)} tokens again with all" if m.candidates else ""
        gate = f"; all heads up to {count(m.min_context)} tokens" if m.min_context else ""
        out.append(("MISA", f"{m.heads} of {plan.dsa.heads} indexer heads a query{again}{gate}"))
    return out


def runs(plan: Plan) -> list[tuple[str, str]]:
    """What the plan makes run, part by part."""
    if plan.dsa is not None:
        return own_indexers(plan)
    shape = plan.model
    kept, heads = kept_heads(plan)
    holding = sum(bool(layer.retrieval) for layer in plan.layers)
    out = [("retrieval heads", f"{count(kept)} of {count(heads)} query heads, in {holding} of {shape.layers} layers")]
    if plan.vocabulary is not None:
        words = plan.vocabulary
        written = "never written" if words.write == "base" else "written by sparsec's runtime"
        kind = f"merged tokens ({words.boundary}) on {count(words.base)}: read in prompts, {written}"
        if words.mode == "dynamic":
            kind += "; found in each batch, through sparsec.load alone"
            out.append(("vocabulary", f"at most {count(words.merged)} {kind}"))
        else:
            out.append(("vocabulary", f"{count(words.merged)} {kind}"))
    if plan.window is not None:
        local, gone, all_kv = heads - kept, evicted(plan), shape.layers * shape.kv_heads
        seen = f"the last {count(plan.window.size)} and the first {plan.window.sinks} tokens"
        rest = "; the mean of all others stands for them" if plan.window.compensate else ""
        out += [
            ("local heads", f"{count(local)}, each sees {seen}{rest}"),
            ("KV cache", f"{gone} of {all_kv} KV heads keep only these, the others every token"),
        ]
    if plan.selector is not None and plan.indexed():
        s = plan.selector
        unit = "tokens" if s.granularity == "token" else f"blocks of {s.block} tokens"
        indexed = ", ".join(map(str, plan.indexed()))
        joined = "(the union over its retrieval heads)"
        own = {"layer": f"layer {joined}", "kv_head": f"KV head {joined}", "head": "head"}[s.scope]
        out += [
            (
                "indexers",
                f"rank {s.rank}, on q and k {'before' if s.rope == 'pre' else 'after'} the rotary embedding"
                + ("; keys in fp8" if s.index_dtype == "fp8" else "")
                + (
                    f"; beyond {count(s.coarse.min_context)} tokens in one block of {s.coarse.one_in}"
                    if s.coarse
                    else ""
                ),
            ),
            (
                "selection",
                f"in decode, {unit} up to {percent(s.top_p, 0)} of the indexer's softmax mass, one set a {own}; "
                f"the first {s.sinks} and the last {s.recent} tokens always",
            ),
            (
                "prefill",
                "dense"
                if s.prefill == "dense"
                else f"{s.query_block} rows at a time choose blocks of {s.block} tokens by the same indexers",
            ),
            ("sharing", f"{plan.pattern if 'S' in plan.pattern else 'none; indexers'} on layers {indexed}"),
        ]
    if plan.routing is not None:
        r = plan.routing
        instead = f"a forecast of rank {r.rank}" if r.rank else "nothing"
        units = f"attention of {plural(len(r.attention), 'layer')} and MLPs of {len(r.mlp)}"
        out.append(("routing", f"{units}: tokens that a router sends away get {instead} in its place"))
    if plan.min_context:
        out.append(("short contexts", f"dense up to {count(plan.min_context)} tokens"))
    native = [str(i) for i, layer in enumerate(plan.layers) if layer.heads is None]
    if native:
        out.append(("left alone", f"layers {', '.join(native)}, which the model itself runs with a sliding window"))
    return out


def commands(manifest: Mapping[str, Any]) -> str:
    """The two commands that make the artifact again, run inside its folder."""
    source = manifest["source"]
    words = ["sparsec", "compile", str(source["spec"]), "--recipe", "recipe.yaml", "-o", "out"]
    if source["revision"]:
        words += ["--revision", str(source["revision"])]
    for option, default in (("device", "cpu"), ("dtype", "auto")):
        if manifest[option] != default:
            words += [f"--{option}", str(manifest[option])]
    return f"sparsec inspect . --recipe > recipe.yaml\n{shlex.join(words)}\n"
