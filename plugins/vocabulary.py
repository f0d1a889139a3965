"""Runs a plan's merged tokens: rows behind the model's own embedding, and prompts read in them.

Input rows are what a pass predicted. All output rows behind the base vocabulary are one and the same: a row whose logit
is far below every other's, so that no engine, whatever its sampler, writes a merged token or one that only
fills the matrix up to a multiple of 64. A model with tied embeddings is untied for that. Where the plan writes merged
tokens their own output rows stand beside the model (merged_writing.py): a softmax over all rows would be no right one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sparsec.errors import PlanError
from sparsec.plan import Plan, Vocabulary
from sparsec.plugins.byte_level import ByteLevel, Pieces
from sparsec.plugins.dynamic_merging import NETWORK, BatchReader, network_shapes
from sparsec.plugins.merged_writing import output_names
from sparsec.plugins.merging import Merger

INPUT = "vocabulary.input.weight"  # [merged, width]
NEVER = "vocabulary.never.weight"  # [width]


def tensor_names(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The tensors of frozen merged tokens, as long as they are not rows of the embedding, with their shapes."""
    own = plan.vocabulary
    return {} if own is None or own.mode == "dynamic" else {INPUT: (own.merged, own.width), NEVER: (own.width,)}


def stored_names(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The tensors that merging by the batch, or writing merged tokens, needs whenever it runs, with their shapes."""
    own = plan.vocabulary
    if own is None or own.mode != "dynamic":
        return {} if own is None else output_names(own)
    return network_shapes(own.width, own.inputs) if own.inputs is not None else {}


def check(model: nn.Module, vocabulary: Vocabulary) -> bool:
    """Does the model lack the rows? With them it is an artifact's.

    Raises:
        PlanError: the embedding has neither the base model's size nor the plan's.
    """
    rows, width = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    if width != vocabulary.width or rows not in (vocabulary.base, vocabulary.rows):
        raise PlanError(
            f"the plan's vocabulary has {vocabulary.rows} rows of {vocabulary.width} on {vocabulary.base}, the model's "
            f"embedding {rows} of {width}: use the checkpoint it was compiled from"
        )
    return bool(rows == vocabulary.base)


@dataclass(frozen=True)
class Base:
    """What a model was like before it was extended."""

    embedding: nn.Parameter
    head: nn.Parameter
    bias: nn.Parameter | None
    tied: bool
    stored: Mapping[str, Tensor]  # of merging by the batch
    hook: Any  # which keeps rows that a batch fills from being written


@torch.no_grad()
def extend(model: Any, vocabulary: Vocabulary, tensors: Mapping[str, Tensor]) -> Base:
    """Put the rows behind the model's own, in place; :func:`restore` takes them off."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    stored: dict[str, Tensor] = {}
    if vocabulary.mode == "dynamic":  # rows that each batch fills anew
        stored = {name: tensors[name] for name in tensors if name.startswith(NETWORK)}
        empty = torch.zeros(vocabulary.merged, vocabulary.width)
        tensors = {INPUT: empty, NEVER: empty[0]}
    hook = head.register_forward_hook(_never_written(vocabulary.base)) if vocabulary.mode == "dynamic" else None
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    before = Base(embedding.weight, head.weight, head.bias, tied, stored, hook)
    new, fill = vocabulary.rows - vocabulary.base, vocabulary.rows - vocabulary.base - vocabulary.merged
    rows = torch.cat([tensors[INPUT], tensors[INPUT].new_zeros(fill, vocabulary.width)])
    embedding.weight = _behind(before.embedding, rows)
    head.weight = _behind(before.head, tensors[NEVER].expand(new, -1))
    if before.bias is not None:
        head.bias = _behind(before.bias, before.bias.new_zeros(new))
    _size(model, vocabulary.rows, tied=False)
    return before


def restore(model: Any, before: Base) -> None:
    """As the model was before :func:`extend`."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight, head.weight, head.bias = before.embedding, before.head, before.bias
    if before.hook is not None:
        before.hook.remove()
    _size(model, len(before.embedding), tied=before.tied)


def added_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors that :func:`extend` put behind the rows of a model that runs a plan; none where it put none."""
    if "sparsec_base" not in model.__dict__:
        return {}
    own: Vocabulary = model.sparsec_plan.vocabulary
    if own.mode == "dynamic":
        return dict(model.sparsec_base.stored)
    rows, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return {INPUT: rows[own.base : own.base + own.merged].detach().clone(), NEVER: head[own.base].detach().clone()}


def extended_weights(model: Any) -> dict[str, Tensor]:
    """Embedding and output layer by their names in the checkpoint, on the CPU."""
    parts = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return {
        f"{name}.{kind}": weight.detach().cpu().clone()
        for name, module in model.named_modules()
        if id(module) in parts
        for kind, weight in module.named_parameters(recurse=False)
    }


def _never_written(base: int) -> Callable[[Any, Any, Tensor], Tensor]:
    """Puts the logits of ids from ``base`` on below all others; not infinitely, so that logits can be subtracted."""

    def hook(module: Any, args: Any, logits: Tensor) -> Tensor:
        logits[..., base:] = torch.finfo(logits.dtype).min
        return logits

    return hook


def _behind(own: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([own, rows.to(own)]), requires_grad=own.requires_grad)


def _size(model: Any, rows: int, *, tied: bool) -> None:
    model.get_input_embeddings().num_embeddings = rows
    model.get_output_embeddings().out_features = rows
    for part in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        part.vocab_size, part.tie_word_embeddings = rows, tied
    model.get_decoder().vocab_size = model.vocab_size = rows


class Reader:
    """Reads token ids of the base vocabulary as the artifact's tokenizer reads their text.

    Args:
        tokenizer: the artifact's.
        base: ids from here on are merged tokens.
    """

    def __init__(self, tokenizer: Any, base: int) -> None:
        own = ByteLevel.of(tokenizer)
        merges = [(left, right, token) for token, (left, right) in own.parts.items() if token >= base]
        self._merger = Merger(merges)
        self._pieces = Pieces(own, "pretoken")  # the artifact's pretokens are as wide as the merges need

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """The merged ids."""
        return self._merger(ids, self._pieces(ids))[0]

    def batch(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """The merged ids of several prompts."""
        return [self(row) for row in rows]


def reads_merged(model: Any) -> bool:
    """Are this model's prompts read in merged tokens?"""
    return getattr(model, "sparsec_reader", None) is not None


def merges_by_batch(model: Any) -> bool:
    """Are they merged by the batch, so that a tokenizer cannot do it?"""
    return isinstance(getattr(model, "sparsec_reader", None), BatchReader)


def read(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts as the model reads them: merged where it has a reader, else as they are.

    Where the plan merges by the batch, ids of merged tokens hold until the next call: they are rows that it fills.

    Args:
        ids: int64 [batch, length] of the base vocabulary, no padding.

    Returns:
        ids and attention mask, int64 [batch, at most length], padded on the left.
    """
    reader: Reader | BatchReader | None = getattr(model, "sparsec_reader", None)
    if reader is None:
        return ids, torch.ones_like(ids)
    rows = reader.batch(ids.tolist())
    longest = max(map(len, rows))
    out = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(out, device=ids.device), torch.tensor(mask, device=ids.device)


def set_reader(model: Any, tokenizer: Any) -> None:
    """From now on :func:`read` merges for this model, if its plan has merged tokens; None as tokenizer: no more."""
    plan: Plan | None = getattr(model, "sparsec_plan", None)
    if tokenizer is not None and plan is not None and plan.vocabulary is not None:
        own = plan.vocabulary
        if own.mode == "dynamic":
            object.__setattr__(model, "sparsec_reader", BatchReader(tokenizer, model, own, model.sparsec_base))
        else:
            object.__setattr__(model, "sparsec_reader", Reader(tokenizer, own.base))
    elif hasattr(model, "sparsec_reader"):
        object.__delattr__(model, "sparsec_reader")


def unmerged(tokenizer: Any, base: int) -> Any:
    """The tokenizer without its merged tokens: it gives the ids that the base model's gives."""
    plain = copy.deepcopy(tokenizer)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    gone = {word for word, token in model["vocab"].items() if token >= base}
    model["vocab"] = {word: token for word, token in model["vocab"].items() if word not in gone}
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in gone]
    plain._tokenizer = Tokenizer.from_str(json.dumps(description))
    return plain
