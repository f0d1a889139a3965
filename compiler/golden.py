"""Golden prompts: what an artifact did when it was compiled, so that later it can be seen to do the same.

A short prompt would see no window and no selector. So a golden prompt is longer than two spans of the plan and than its
dense contexts, and its end runs as decode rows. Of every layer it is kept what each head put out and which keys the
selectors chose: a change in one head or one indexer is seen where it is, and not only in what the logits show of it.

golden.json, by prompt: ``tokens``; ``top``, the most likely next tokens of every decode row; ``greedy``, the tokens
that the artifact writes behind them, from the same cache; ``outputs``, each head's output in some rows, projected on
fixed random directions, float32 [rows, layers, heads, directions]; ``chosen``, by layer the keys kept in those rows,
forced ones left out, bits [sets, rows, keys]. Arrays are zlib in base64. The text is Python's own documentation:
calibration text may be private, and an artifact may be published.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.decode import decode_logits
from sparsec.errors import ArtifactError
from sparsec.export.parity import Runner
from sparsec.plan import Plan
from sparsec.plugins.families import decoder_layers, family_of
from sparsec.plugins.runtime import new_cache, rows_as
from sparsec.plugins.step import Selection
from sparsec.plugins.vocabulary import read

FORMAT = 2  # greedy tokens follow the decode rows; in 1 they followed the prompt
ROWS = 32  # decode rows at the end of a prompt
SEEN = 4  # of them, those whose heads and choices are kept
TOP = 8
GREEDY = 16
DIRECTIONS = 4
ONE_FROM = 4096  # tokens; from here on there is one prompt, else there are two
SHORTEST = 256


def length_for(plan: Plan, readable: int) -> int:
    """Tokens of a golden prompt: beyond what is dense by plan and beyond two spans, as far as the model reads."""
    span = plan.span or 0
    return min(readable, max(SHORTEST, 2 * span, plan.min_context + span) + ROWS)


def prompts_for(plan: Plan, tokenizer: Any, readable: int) -> list[Tensor]:
    """Token ids of the prompts, int64 [length] each: one text, cut.

    Raises:
        CalibrationError: this Python comes without its documentation.
    """
    length = length_for(plan, readable)
    count = 1 if length >= ONE_FROM else 2
    ids: list[int] = []
    documents = read_corpus().documents
    while len(ids) < count * length:
        for document in documents:
            ids += tokenizer(document.text, add_special_tokens=False)["input_ids"]
            if len(ids) >= count * length:
                break
    return [torch.tensor(ids[i * length : (i + 1) * length]) for i in range(count)]


def record(model: Any, prompts: Sequence[Tensor]) -> dict[str, Any]:
    """What a model with a plan does on the prompts: the content of golden.json."""
    plan: Plan = model.sparsec_plan
    return {
        "format": FORMAT,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "layers": described(plan),
        "prompts": [_one(model, plan, tokens) for tokens in prompts],
    }


def described(plan: Plan) -> list[str]:
    """What runs in each layer, in words that can be compared: heads (1: retrieval) and where the index comes from."""
    words = []
    for number, layer in enumerate(plan.layers):
        heads = "as the model made it" if layer.heads is None else "".join(map(str, layer.heads))
        index = f"shared with {plan.index_source(number)}" if layer.index == "shared" else layer.index
        words.append(f"{heads}, index {index}")
    return words


def again(model: Any, golden: Mapping[str, Any]) -> dict[str, Any]:
    """The same prompts, on this model now.

    Raises:
        ArtifactError: golden.json is none that this sparsec reads.
    """
    return record(model, tokens_of(golden, int(model.config.get_text_config().vocab_size)))


def tokens_of(golden: Mapping[str, Any], vocabulary: int) -> list[Tensor]:
    """The prompts' token ids.

    Raises:
        ArtifactError: there are none, or they are none of this model's.
    """
    try:
        if golden["format"] != FORMAT:
            raise ArtifactError(
                f"golden.json has format {golden['format']!r}, this sparsec reads {FORMAT}: use the sparsec that wrote "
                "it, or compile the artifact again"
            )
        prompts = [torch.tensor(each["tokens"], dtype=torch.int64) for each in golden["prompts"]]
        good = prompts and all(p.ndim == 1 and len(p) > ROWS and 0 <= p.min() <= p.max() < vocabulary for p in prompts)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        good = False
    if not good:
        raise ArtifactError("golden.json holds no prompts of this model: compile the artifact again")
    return prompts


def on_kernels(model: Any, tokens: Tensor, kernels: Any) -> dict[str, Any]:
    """``top`` and ``greedy`` of one prompt, a step at a time, as it is served."""
    ids = tokens[None].to(model.device)
    cache = new_cache(model, kernels)

    def step(token: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).logits
        return logits[0, -1]

    with torch.no_grad():
        with rows_as("prefill"):
            model.get_decoder()(input_ids=read(model, ids[:, :-ROWS])[0], past_key_values=cache, use_cache=True)
        rows = [step(token) for token in ids[0, -ROWS:]]
        return {"top": top_of(torch.stack(rows).cpu()), "greedy": greedy(rows[-1], step)}


def on_runner(runner: Runner, tokens: Tensor, read: Callable[[list[int]], list[int]] | None = None) -> dict[str, Any]:
    """The same on what runs an export; ``read`` merges a prompt as the artifact's tokenizer does, None: nothing."""
    ids: list[int] = tokens.tolist()
    prompt = ids[:-ROWS] if read is None else read(ids[:-ROWS])

    def step(token: Any) -> Tensor:
        return torch.from_numpy(runner.step([int(token)])[0])

    runner.reset(1)
    runner.prefill([prompt])
    rows = [step(token) for token in ids[-ROWS:]]
    return {"top": top_of(torch.stack(rows)), "greedy": greedy(rows[-1], step)}


def greedy(logits: Tensor, step: Callable[[Tensor], Tensor]) -> list[int]:
    """The tokens that follow, whatever they are: an end token does not stop it.

    Args:
        logits: [vocabulary], behind all that was read.
        step: reads one token, gives the logits behind it.
    """
    out = []
    for number in range(GREEDY):
        token = logits.argmax(-1)
        out.append(int(token))
        if number < GREEDY - 1:
            logits = step(token)
    return out


def top_of(logits: Tensor) -> dict[str, Any]:
    """The most likely next tokens: ids and logits, row by row."""
    best = logits.float().topk(min(TOP, logits.shape[-1]), dim=-1)
    return {"ids": best.indices.tolist(), "logits": [[round(v, 4) for v in row] for row in best.values.tolist()]}


def _one(model: Any, plan: Plan, tokens: Tensor) -> dict[str, Any]:
    prompt = len(tokens) - ROWS
    chosen: dict[int, list[Tensor]] = {}
    rows = _seen(torch.arange(prompt, len(tokens)))

    def note(seen: Selection) -> None:
        mine = torch.isin(seen.q_pos[0], rows.to(seen.q_pos.device))
        if bool(mine.any()):
            free = seen.keep[0][:, mine] & ~_forced(plan, seen.q_pos[0, mine], seen.k_pos[0])
            chosen.setdefault(seen.layer, []).append(free.cpu())

    cache = new_cache(model, "reference")
    with _outputs(model, plan) as outputs:
        logits, _ = decode_logits(model, tokens[None], prompt, note, cache)

    def step(token: Tensor) -> Tensor:
        found: Tensor = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).logits
        return found[0, -1]

    with torch.no_grad():
        written = greedy(logits[0, -1], step)
    return {
        "tokens": tokens.tolist(),
        "top": top_of(logits[0].cpu()),
        "greedy": written,
        "outputs": packed(outputs.numpy().astype("<f4")),
        "chosen": {str(layer): _bits(parts) for layer, parts in sorted(chosen.items())},
    }


def _forced(plan: Plan, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Keys that are kept whatever is chosen: bool [rows, keys]."""
    sinks, recent = (plan.selector.sinks, plan.selector.recent) if plan.selector is not None else (0, 0)
    return (k_pos[None] < sinks) | (q_pos[:, None] - k_pos[None] < recent)


def _seen(rows: Tensor) -> Tensor:
    """Evenly spread, the last one among them."""
    step = len(rows) // SEEN
    return rows[step - 1 :: step]


@contextmanager
def _outputs(model: Any, plan: Plan) -> Iterator[Tensor]:
    """Of the decode rows' call: each head's projected output, float32 [rows, layers, heads, directions] on the CPU.

    A layer that tokens take different paths through stays zero: what it does is seen in those behind it.
    """
    layers = decoder_layers(model)
    found = torch.zeros(SEEN, len(layers), plan.model.heads, DIRECTIONS)
    path = attrgetter(family_of(model.config).output)

    def note(number: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            if len(rows) == ROWS:
                heads = rows.float().cpu().view(ROWS, plan.model.heads, -1)
                found[:, number] = _seen(heads) @ _directions(heads.shape[-1])

        return hook

    hooks = [path(layer).register_forward_pre_hook(note(number)) for number, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _directions(dim: int) -> Tensor:
    """[dim, DIRECTIONS], the same everywhere."""
    signs = np.random.RandomState(0).randint(0, 2, (dim, DIRECTIONS)) * 2 - 1  # a stream that NumPy never changes
    return torch.from_numpy(signs / dim**0.5).float()


def _bits(parts: Sequence[Tensor]) -> dict[str, Any]:
    """Kept keys of one layer. Tiles of rows are given all keys, or those up to their last row: filled up."""
    keys = max(part.shape[-1] for part in parts)
    whole = torch.cat([torch.nn.functional.pad(part, (0, keys - part.shape[-1])) for part in parts], 1)
    return packed(np.packbits(whole.numpy(), axis=-1))


def packed(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """An array as JSON data."""
    return {"shape": list(array.shape), "data": base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()}
