"""Times an artifact beside the dense model: time to first token, time per token, bytes of the cache, by context.

Prompts are natural text, so that selectors keep what they keep in use; documents one behind the other.
Dense: :mod:`sparsec.compiler.dense_baseline`. On a GPU a decode step of either is one captured graph, its layers'
small operations fused; where it cannot be one, the row says so. All in one process, in turns.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers.cache_utils import DynamicCache

from sparsec.calibrate.corpus import Corpus, read_corpus
from sparsec.compiler.dense_baseline import BACKENDS, PLAIN, DenseLayer, dense_cache
from sparsec.compiler.explain import artifact_data
from sparsec.compiler.shapes import installed, made_plan, random_model
from sparsec.compiler.versions import versions
from sparsec.errors import SparsecError
from sparsec.events import Event, Listener, silent
from sparsec.plan import Plan
from sparsec.plugins.device import device_name
from sparsec.plugins.families import native_local_layers
from sparsec.plugins.fused import fused_layers
from sparsec.plugins.kernels.support import Kernels, chosen, uncapturable
from sparsec.plugins.load import load
from sparsec.plugins.runtime import added_tensors, install, kv_bytes, new_cache, uninstall, use_kernels

CHUNK = 16384  # tokens of a prompt a forward: activations of a whole long prompt are gigabytes
WHOLE = 131072  # up to here dense reads a prompt in one forward, which its kernels like best
REPEATS = 3  # prompts; the first one only warms up
LONG = 5.0  # seconds from which on a prompt is timed once
WARM = 65536  # tokens from which on a prompt's beginning warms up in its place: it has all shapes that chunks have


@dataclass(frozen=True)
class Subject:
    """What is timed: a model that runs a plan, and token ids that its prompts are cut from, [length]."""

    model: Any
    ids: Tensor
    about: Mapping[str, Any]  # goes into the result


def of_artifact(artifact: Path, length: int, *, text: str | None, device: str, dtype: str, kernels: Kernels) -> Subject:
    """An artifact on natural text.

    Args:
        artifact: its folder.
        length: tokens of the longest prompt.
        text: what prompts are cut from, as in a compile; None: as the artifact was compiled.

    Raises:
        ArtifactError: there is none, or it cannot be loaded.
        UsageError: kernels that are demanded and cannot run.
        CalibrationError: the text is not there or not readable.
    """
    made = artifact_data(artifact)["manifest"]
    model, tokenizer = load(artifact, device=device, dtype=dtype, kernels=kernels)
    spec = text or made["recipe"]["calibration"]
    return Subject(model, _text(read_corpus(spec), tokenizer, length), {"artifact": artifact.name, "text": spec})


def of_shape(
    config: Path, length: int, *, device: str, dtype: str, kernels: Kernels, **stated: Any,
) -> Subject:  # fmt: skip
    """Random weights on random tokens; ``stated``: what :func:`sparsec.compiler.shapes.made_plan` takes."""
    model = random_model(config, device=device, dtype=dtype)
    installed(model, made_plan(model, **stated))
    use_kernels(model, kernels)
    ids = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    return Subject(model, ids, {"shape": config.name, "random weights": True, **stated})


def bench(
    subject: Subject,
    contexts: Sequence[int],
    *,
    batch: int,
    tokens: int,
    kernels: Kernels,
    dense: bool = True,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Measure.

    Args:
        subject: what.
        contexts: prompt lengths in tokens.
        batch: sequences at once.
        tokens: decode steps that are timed.
        kernels: what the plan runs on.
        dense: beside the dense model.

    Returns:
        JSON data: a row a context and system, with the device, versions and what ran; ``break_even`` is the least of
        the contexts from which on decode is faster than dense, or null.

    Raises:
        SparsecError: nothing fits into memory.
    """
    model, rows = subject.model, []
    plan: Plan = model.sparsec_plan
    on_kernels = chosen(kernels, plan, model.device, model.dtype)
    tensors = added_tensors(model)
    for context in contexts:
        prompts = subject.ids[None, :context].expand(batch, -1).to(model.device)
        for system in ("dense", "artifact") if dense else ("artifact",):
            if system == "dense":
                uninstall(model)
            else:
                install(model, plan, tensors)
                use_kernels(model, kernels)
            listen(Event(f"{system} {context}", 0, 1))
            try:
                if system == "artifact":
                    against = uncapturable(model) if on_kernels else None
                    found = {"runs": "Triton kernels" if on_kernels else "PyTorch reference"}
                    found["runs"] += f", uncaptured: {against}" if against else ""
                    graphs = on_kernels and against is None
                    found |= _timed(model, prompts, tokens, lambda: new_cache(model, kernels), graphs)
                else:
                    found = _dense(model, prompts, tokens)
            except torch.OutOfMemoryError as error:
                found = {"runs": "out of memory", "said": str(error).splitlines()[0]}
            rows.append({"system": system, "context": context, "batch": batch, **found})
            listen(Event(f"{system} {context}", 1, 1))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if all("prefill_s" not in row for row in rows):
        raise SparsecError("nothing of this fits into memory: use shorter --contexts or --batch 1")
    return {
        "rows": rows,
        "break_even": _break_even(rows),
        **subject.about,
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": tokens,
        "plan": plan.digest,
        "versions": versions(),
    }


def _break_even(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The least context from which on a step of the artifact takes less time than dense's."""
    steps = {(row["system"], row["context"]): row.get("step_s") for row in rows}
    least = None
    for context in sorted({row["context"] for row in rows}, reverse=True):
        dense, ours = steps.get(("dense", context)), steps["artifact", context]
        if ours is None or dense is None or ours >= dense:
            break
        least = context
    return least


def _text(corpus: Corpus, tokenizer: Any, length: int) -> Tensor:
    """So many tokens of the documents, one behind the other, over again where they are too few: int64 [length]."""
    found: list[int] = []
    while len(found) < length:
        for document in corpus.documents:
            found += tokenizer(document.text, add_special_tokens=False)["input_ids"]
            if len(found) >= length:
                break
    return torch.tensor(found[:length])


def _dense(model: Any, prompts: Tensor, tokens: int) -> dict[str, Any]:
    """The fastest backend for the prompt and the fastest for the steps, each named; and why others did not run."""
    room = prompts.shape[1] + tokens + 1
    if not prompts.is_cuda:
        return {"runs": "PyTorch SDPA"} | _timed(model, prompts, tokens, lambda: dense_cache(model, room), graphs=False)
    if native_local_layers(model.config):  # its windows need masks: as Transformers runs it
        cache = partial(DynamicCache, config=model.config)
        return {"runs": "Transformers SDPA, uncaptured"} | _timed(model, prompts, tokens, cache, graphs=False)
    before, found, failed = model.config._attn_implementation, {}, {}
    model.set_attn_implementation(PLAIN)
    try:
        for name, backend in BACKENDS.items():
            try:
                with sdpa_kernel(backend):
                    found[name] = _fitting(model, prompts, tokens, lambda: dense_cache(model, room))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a backend without a kernel for this shape says so
                failed[name] = str(error).splitlines()[0][:200]
                torch.cuda.synchronize()
    finally:
        model.set_attn_implementation(before)
    if not found:
        raise SparsecError(
            f"no fast backend of PyTorch runs this model's attention ({failed}): use --no-dense, or --dtype bfloat16"
        )
    first = min(found, key=lambda name: found[name]["prefill_s"])
    step = min(found, key=lambda name: found[name]["step_s"])
    whole = found[first]["prompt_chunk"] >= prompts.shape[1]
    prompt = first if whole else "flash in chunks"  # those behind the first have no other kernel
    named = {"runs": f"SDPA: prompt {prompt}, steps {step}", "did_not_run": failed}
    timed = found[step] | {"prefill_s": found[first]["prefill_s"]} | named
    return {name: value for name, value in timed.items() if name != "prompt_chunk"}


def _fitting(model: Any, prompts: Tensor, tokens: int, make: Callable[[], Any]) -> dict[str, Any]:
    """Dense prompts in one forward; in chunks where they are too long for that, or the memory too small."""
    try:
        return _timed(model, prompts, tokens, make, graphs=True, chunk=WHOLE) | {"prompt_chunk": WHOLE}
    except torch.OutOfMemoryError:
        if prompts.shape[1] > WHOLE:  # it was read in chunks
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return _timed(model, prompts, tokens, make, graphs=True, chunk=CHUNK) | {"prompt_chunk": CHUNK}


@torch.no_grad()
def _timed(
    model: Any, prompts: Tensor, tokens: int, make: Callable[[], Any], graphs: bool, chunk: int = CHUNK
) -> dict[str, Any]:
    """Seconds from the prompt to the first token and of a later step (medians), and bytes resident after the prompt."""
    prefill: list[float] = []
    in_chunks = prompts.shape[1] > max(chunk, WARM)
    if in_chunks:
        _prompt(model, prompts[:, : 2 * CHUNK], make(), CHUNK)
    else:
        _prompt(model, prompts, make(), chunk)
    cache = None
    for _ in range(REPEATS - 1):
        del cache
        gc.collect()  # caches lie in cycles, and two of them may not fit
        cache = make()
        with _clock(prompts) as seconds:
            token = _prompt(model, prompts, cache, chunk)
        prefill.append(seconds())
        if prefill[-1] > LONG:
            break
    resident = _resident(cache)
    steps: list[float] = []
    step = _stepper(model, cache, token, tokens, graphs and prompts.is_cuda)
    for _ in range(tokens):
        with _clock(prompts) as seconds:
            step()
        steps.append(seconds())
    median = statistics.median(steps)
    return {
        "prefill_s": statistics.median(prefill),
        "step_s": median,
        "tokens_per_s": len(prompts) / median,
        "kv_bytes": resident,
    }


def _prompt(model: Any, prompts: Tensor, cache: Any, chunk: int) -> Tensor:
    """The prompt in chunks; the first token after it, [batch, 1]."""
    logits = None
    for part in torch.split(prompts, chunk if prompts.shape[1] <= chunk else CHUNK, dim=1):
        logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    assert logits is not None
    token: Tensor = logits.argmax(-1)
    return token


def _stepper(model: Any, cache: Any, token: Tensor, room: int, graphs: bool) -> Callable[[], Any]:
    """Something that decodes one token when called."""
    if graphs and not isinstance(cache.layers[0], DenseLayer):
        from sparsec.plugins.kernels.graph import DecodeGraph

        return DecodeGraph(model, cache, token, room)

    def once() -> None:
        token.copy_(model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1))

    if not graphs:
        return once
    # The same step again and again: dense reads as many keys in each, which does not flatter the other side.
    position = torch.full_like(token, cache.get_seq_length())

    def fixed() -> None:
        before = [layer.length for layer in cache.layers]
        model(token, position_ids=position, past_key_values=cache, use_cache=True)
        for layer, length in zip(cache.layers, before, strict=True):
            layer.length = length

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with fused_layers(model, cache):
        with torch.cuda.stream(stream):
            fixed()
            fixed()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            fixed()
    return graph.replay


def _resident(cache: Any) -> int:
    """Bytes of keys, values and index keys; of the dense cache as far as it is filled."""
    if not isinstance(cache.layers[0], DenseLayer):
        return kv_bytes(cache)
    filled = ((layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]) for layer in cache.layers)
    return sum(keys.nbytes + values.nbytes for keys, values in filled)


@contextmanager
def _clock(on: Tensor) -> Iterator[Callable[[], float]]:
    """Wall-clock of the block, all work on the device included."""
    if on.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    ended = [began]
    yield lambda: ended[0] - began
    if on.is_cuda:
        torch.cuda.synchronize()
    ended[0] = time.perf_counter()


def bench_text(result: Mapping[str, Any]) -> str:
    """``sparsec bench`` as a table."""
    by: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        by.setdefault(row["context"], {})[row["system"]] = row
    lines = [
        f"{'context':>9}  {'system':<9} {'first token':>12} {'a token':>10} {'tokens/s':>9} {'KV cache':>11}  runs on",
    ]
    for context, systems in by.items():
        for name, row in systems.items():
            if "prefill_s" not in row:
                lines.append(f"{context:>9,}  {name:<9} {row['runs']}")
                continue
            lines.append(
                f"{context:>9,}  {name:<9} {row['prefill_s']:>10.3f} s {row['step_s'] * 1e3:>7.2f} ms "
                f"{row['tokens_per_s']:>9.1f} {row['kv_bytes'] / 2**20:>7.1f} MiB  {row['runs']}"
            )
        if all("prefill_s" in systems.get(name, {}) for name in ("dense", "artifact")):
            dense, ours = systems["dense"], systems["artifact"]
            lines.append(
                f"{'':>9}  {'ratio':<9} {dense['prefill_s'] / ours['prefill_s']:>11.2f}x "
                f"{dense['step_s'] / ours['step_s']:>8.2f}x {'':>9} {dense['kv_bytes'] / ours['kv_bytes']:>10.2f}x"
            )
    if result["break_even"] is not None:
        lines += ["", f"A token takes less time than dense's from {result['break_even']:,} tokens of context on."]
    if result.get("random weights"):
        lines += [
            "",
            f"Random weights; {result['ratio']:.0%} of the heads, drawn at random, are retrieval heads, made to keep "
            f"about {result['rate']:.0%} of their blocks; window {result['window']:,}.",
        ]
    lines += [
        "",
        f"{result['device']}, {result['dtype']}, batch {result['rows'][0]['batch']}; medians, a token over "
        f"{result['tokens']} steps. Ratios: dense over artifact. Dense's cache is counted as far as it is filled.",
    ]
    return "\n".join(lines)
