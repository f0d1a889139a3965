"""The tables of benchmarks/tables.py that are about merged tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def merged(result: Mapping[str, Any]) -> str:
    """Quality of merged prompts by how embeddings are predicted, of what benchmarks/merged_tokens.py found."""
    systems = result["systems"]
    plain = systems["unmerged"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, row in systems.items():
        groups.setdefault(name.split(", seed ")[0], []).append(row)
    rows = []
    for name, found in groups.items():
        cells = []
        for kind in ("text", "recalled"):
            bits = [row[kind]["bits_per_byte"] for row in found]
            mean = sum(bits) / len(bits)
            spread = f" ({min(bits):.4f} to {max(bits):.4f})" if len(bits) > 1 else ""
            cells += [f"{mean:.4f}{spread}", f"{mean / plain[kind]['bits_per_byte'] - 1:+.1%}"]
        positions = found[0]["text"]["positions"] / plain["text"]["positions"]
        rows.append([name, f"{positions:.1%}", *cells, str(len(found))])
    head = ["prompt read", "positions", "text", "against unmerged", "beginning recalled", "against unmerged", "seeds"]
    options, held = result["options"], result["heldout"]
    windows = f"{options['windows']} windows of text and {options['recalled']} of recall"
    note = (
        f"Bits per byte of decode rows in base tokens; {windows}, {options['length']:,} tokens each. "
        f"{result['merges']:,} merges save {held['saved']:.1%} of the tokens of held-out text. "
        f"{result['device']}, torch {result['versions']['torch']}: `{result['command']}`."
    )
    return "\n".join([*markdown(head, rows, 1), "", note])


def lengths(result: Mapping[str, Any]) -> str:
    """What merges save by text and language, and what they cost, of what benchmarks/merged_text.py found."""
    rows = []
    found = {**result["domains"], **{k: v["merged"] for k, v in result["languages"].items() if "merged" in v}}
    for name, one in found.items():
        cut = [f"{one['heldout'][count]['saved']:.1%}" if count in one["heldout"] else "" for count in ("1000", "5000")]
        known = result["languages"].get(name)
        shape = [known["script"], f"{known['characters_a_token']:.2f}"] if known else ["", ""]
        rows.append([name, *shape, f"{one['mined_from']:,}", *cut, f"{one['merges']:,}"])
    head = ["text", "script", "characters a token before", "mined from", "1,000 merges", "5,000", "there were"]
    first = next(iter(result["domains"].values()))
    trip, speed, prompt = result["round_trip"], result["encoding"], result["prompt"]
    broken = sum(trip["differ_from_before"].values())
    notes = (
        f"Tokens saved on held-out text of the same kind. {first['merges']:,} merges from {first['mined_from']:,} "
        f"tokens take {first['mining_seconds']:.1f} s of processor time, tokenizing and trying the wider pieces before "
        f"it {first['reading_seconds']:.1f} s. Round trip: {trip['bytes'] / 1e6:.1f} MB in {len(trip['scripts'])} "
        f"scripts, {broken} of {trip['texts']} texts come back otherwise than from the base tokenizer. Encoding: "
        f"{speed['speed']:.2f} times the base tokenizer's speed. A prompt of {prompt['base_positions']:,} tokens: "
        f"{prompt['positions']:.1%} of the positions in {prompt['time']:.1%} of the time. {result['device']}, torch "
        f"{result['versions']['torch']}: `{result['command']}`."
    )
    return "\n".join([*markdown(head, rows, 2), "", notes])


def large(result: Mapping[str, Any]) -> str:
    """Decode over a large vocabulary beside the original one, of what benchmarks/output_index.py found."""
    base, whole = f"{result['base']:,}", f"{result['base'] + result['merged']:,}"
    names = {
        "dense": ("Transformers, dense", base),
        "original": ("a plan that changes nothing", base),
        "merged": ("a plan that writes merged tokens", whole),
        "original, top_p": ("a plan that changes nothing, top_p", base),
        "merged, top_p": ("a plan that writes merged tokens, top_p", whole),
    }
    rows = []
    for name, one in result["rows"].items():
        low, high = (f"{each * 1e3:.1f}" for each in one["quartiles_s"])
        rows.append([*names[name], f"{one['step_s'] * 1e3:.1f} ms", f"{low} to {high} ms"])
    recall = result["recall"]
    alone = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in result["parts"].items())
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "faiss"))
    notes = (
        f"Medians of {result['tokens']:,} tokens behind {result['prompt']} in one run, {result['threads']} threads, "
        f"where {result['load']:.1f} processes wanted a core. Merged tokens are written {result['ratio']:.2f} times as "
        f"fast as by the plan that changes nothing, {result['ratio_top_p']:.2f} times with top_p, and "
        f"{result['ratio_to_dense']:.2f} times as fast as by the dense model. The output layer alone: {alone}. With "
        f"{result['candidates']:,} candidates the index finds the likeliest merged row for {recall['first']:.1%} of "
        f"{recall['states']} states of held-out text, and {recall['top_50']:.1%} of the 50 likeliest; for "
        f"{recall['greedy']:.1%} the same token is written as with all rows. Building it takes "
        f"{result['building_seconds']:.0f} s. {result['device']}, {versions}: `{result['command']}`."
    )
    return "\n".join([*markdown(["", "output rows", "a token", "quartiles"], rows, 1), "", notes])


def vllm(result: Mapping[str, Any]) -> str:
    """An artifact in vLLM beside stock Transformers, of what benchmarks/vllm_merged.py found."""
    rows = [
        [row["prompt"], str(row["base_positions"]), str(row["positions"]), f"{row['same']} of {row['tokens']}"]
        for row in result["rows"]
    ]
    notes = (
        f"Greedy, {result['dtype']}; the artifact reads {result['merged']:,} merged tokens. Stock Transformers "
        f"{result['transformers']}, vLLM {result['vllm']} on a CPU: `{result['command']}`."
    )
    return "\n".join([*markdown(["prompt", "tokens before", "merged", "same tokens"], rows, 1), "", notes])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table; ``left``: columns that are aligned left."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return [f"| {' | '.join(line)} |" for line in (head, rule, *rows)]
