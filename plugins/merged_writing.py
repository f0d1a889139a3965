"""Writes merged tokens: ``generate()`` over the large vocabulary, without changing how likely a text is.

A merged token's output row gives the log of a joint probability: that of its pieces, one behind the other, in the base
model. As long as both spellings could be written, that text would be counted twice. So a text has one spelling, the
longest match from the left:

- what merged tokens are given is taken from the token whose text they go on with (the longest one), step by step: the
  logits of all tokens that begin with a piece add up to that of the piece;
- behind a written token those tokens are ruled out that would have made it a longer one.

Where the rows are right, first pieces keep their probabilities, and so does every text. Temperature, top-k, top-p and
penalties then act on the distribution over this vocabulary, as Transformers does them. Logits of base tokens are always
computed, all of them; merged tokens are found by an index (output_index.py) if there are many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import logits_process

from sparsec.errors import PlanError
from sparsec.plan import Plan, Vocabulary
from sparsec.plugins.merging import constituents
from sparsec.plugins.output_index import OutputIndex

OUTPUT = "vocabulary.output.weight"  # [merged, width]
STATES = "vocabulary.states.weight"  # [width, width]
MERGES = "vocabulary.merges.weight"  # int32 [merged, 2]
MOST = 1 - 1e-4  # share of a token's probability that merged tokens which go on with it can have together
# Processors for which a token's id is of no matter: they run on what can be written alone.
BLIND = tuple(
    getattr(logits_process, f"{name}LogitsWarper")
    for name in ("Temperature", "TopH", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta")
    if hasattr(logits_process, f"{name}LogitsWarper")
)

_base_only: ContextVar[bool] = ContextVar("sparsec_base_only", default=False)


def output_names(own: Vocabulary) -> dict[str, tuple[int, ...]]:
    """The tensors that writing merged tokens needs, with their shapes."""
    if own.write == "base":
        return {}
    return {OUTPUT: (own.merged, own.width), STATES: (own.width, own.width), MERGES: (own.merged, 2)}


def check_output(model: Any, own: Vocabulary, tensors: Mapping[str, Tensor]) -> None:
    """Can a plan with this vocabulary write merged tokens on the model?

    Raises:
        PlanError: the output layer is of a kind that merged rows cannot stand beside, or the merges are none.
    """
    check_head(model)
    merges = tensors[MERGES]
    number = own.base + torch.arange(own.merged)[:, None]
    if merges.is_floating_point() or not bool(((merges >= 0) & (merges < number)).all()):
        raise PlanError(f"{MERGES} names tokens that are not there: compile again")


def keep_output(model: Any, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Note the tensors on a model whose plan writes merged tokens."""
    own = plan.vocabulary
    if own is not None and own.write == "merged":
        object.__setattr__(model, "sparsec_output", {name: tensors[name] for name in output_names(own)})


def check_head(model: Any) -> None:
    """A merged token's logit has to be linear in the hidden state, as others' are.

    Raises:
        PlanError: it is not.
    """
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None:
        raise PlanError("this model caps its logits, so that no row gives a merged token's: take write=base")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise PlanError("this model's output layer has a bias, which merged tokens' rows lack: take write=base")


def drop_output(model: Any) -> None:
    """The model writes base tokens again."""
    for name in ("sparsec_output", "sparsec_writer"):
        if name in model.__dict__:
            object.__delattr__(model, name)


def output_tensors(model: Any) -> dict[str, Tensor]:
    """What :func:`keep_output` noted."""
    return dict(model.__dict__.get("sparsec_output", {}))


class Spelling:
    """Which tokens go on with which.

    Args:
        merges: int [merged, 2], the two tokens that each is merged from.
        base: id of the first merged token.
    """

    def __init__(self, merges: Tensor, base: int) -> None:
        self.base = base
        pairs = merges.tolist()
        self._pieces = constituents([(left, right, base + n) for n, (left, right) in enumerate(pairs)], base)
        self._known = {pieces: base + number for number, pieces in enumerate(self._pieces)}
        self._next: dict[tuple[int, ...], set[int]] = {}  # pieces that go on, of all proper beginnings
        parents = []
        for pieces in self._pieces:
            for end in range(1, len(pieces)):
                self._next.setdefault(pieces[:end], set()).add(pieces[end])
            ends = range(len(pieces) - 1, 1, -1)
            parents.append(next((self._known[pieces[:e]] for e in ends if pieces[:e] in self._known), pieces[0]))
        self.parents = torch.tensor(parents)  # int64 [merged]: the longest token that each goes on with
        self.first = torch.tensor([pieces[0] for pieces in self._pieces])  # int64 [merged]
        self._longest = max(map(len, self._pieces))

    def pieces(self, token: int) -> tuple[int, ...]:
        """The base tokens of any token."""
        return self._pieces[token - self.base] if token >= self.base else (token,)

    def beginnings(self, pieces: Sequence[int]) -> list[int]:
        """All tokens that ``pieces`` begin with, the shortest first."""
        found = [int(pieces[0])]
        ahead = tuple(pieces[: self._longest])
        for end in range(1, len(ahead)):
            if ahead[:end] not in self._next:
                break
            if ahead[: end + 1] in self._known:
                found.append(self._known[ahead[: end + 1]])
        return found

    def longest(self, pieces: Sequence[int]) -> list[int]:
        """Base tokens as they are written: the longest match from the left."""
        found: list[int] = []
        while pieces:
            found.append(self.beginnings(pieces)[-1])
            pieces = pieces[len(self.pieces(found[-1])) :]
        return found

    def open(self, written: Sequence[int]) -> list[tuple[int, ...]]:
        """Beginnings of longer tokens that the end of ``written`` has: pieces from the start of one of its tokens."""
        found: list[tuple[int, ...]] = []
        behind: tuple[int, ...] = ()
        for token in reversed(written):
            behind = self.pieces(token) + behind
            if len(behind) >= self._longest:
                break
            if behind in self._next:
                found.append(behind)
        return found

    def heads(self, beginnings: Sequence[tuple[int, ...]]) -> set[int]:
        """First pieces of tokens that may have to be ruled out."""
        return {piece for beginning in beginnings for piece in self._next[beginning]}

    def longer(self, beginnings: Sequence[tuple[int, ...]], token: int) -> bool:
        """Would ``token`` complete a longer token than one that stands there?"""
        pieces = self.pieces(token)
        return any(
            beginning + pieces[:end] in self._known for beginning in beginnings for end in range(1, len(pieces) + 1)
        )


class Writer:
    """Stands for a model's output layer: [..., width] -> float32 logits [..., rows], minus infinity for others.

    Args:
        weight: [at least base, width], the output layer's.
        own: the plan's vocabulary.
        tensors: see :func:`output_names`.
    """

    def __init__(self, weight: Tensor, own: Vocabulary, tensors: Mapping[str, Tensor], **index: int) -> None:
        self.own, self.weight = own, weight
        self.spelling = Spelling(tensors[MERGES], own.base)
        self.index = OutputIndex(tensors[OUTPUT].to(weight), tensors[STATES].float().cpu(), **index)
        self._parents = self.spelling.parents.to(weight.device)
        self.found = torch.empty(0, dtype=torch.long)  # of the last call: numbers of merged tokens that have a logit
        self._place = torch.full((own.merged,), -1, device=weight.device)

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """See the class."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        plain = torch.nn.functional.linear(flat.to(self.weight.dtype), self.weight[: self.own.base]).float()
        numbers, joint = self.index(flat)
        self.found = numbers
        out = plain.new_full((len(flat), self.own.rows), -torch.inf)
        for row, one in enumerate(out):
            base, merged = self._divided(plain[row], numbers[row], joint[row])
            one[: self.own.base] = base
            one[self.own.base + numbers[row]] = merged
        return out.view(*hidden.shape[:-1], -1)

    def _divided(self, plain: Tensor, numbers: Tensor, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of one state when each token keeps what no longer one takes.

        Args:
            plain: float32 [base].
            numbers: int64 [found], of merged tokens, each once.
            joint: float32 [found], their rows' logits.
        """
        base = self.own.base
        self._place[numbers] = torch.arange(len(numbers), device=numbers.device)
        parent = self._parents[numbers]
        while True:  # what was not found takes nothing, and gives nothing on
            lost = parent >= base
            lost &= self._place[(parent - base).clamp_min(0)] < 0
            if not bool(lost.any()):
                break
            parent[lost] = self._parents[parent[lost] - base]
        above = parent >= base
        group = torch.where(above, base + self._place[(parent - base).clamp_min(0)], parent)
        self._place[numbers] = -1
        every = torch.cat([plain, joint])
        share = (joint - every[group]).clamp_max(0).exp()
        taken = torch.zeros_like(every).index_add_(0, group, share)
        share = (share * (MOST / taken.clamp_min(MOST))[group]).log()
        # From the shortest on: a longer one has its share of what the shorter one really has.
        whole = torch.where(above, torch.nan, plain[parent.clamp_max(base - 1)] + share)
        left = above
        while bool(left.any()):
            whole = torch.where(left, whole[(group - base).clamp_min(0)] + share, whole)
            left = left & whole.isnan()
        kept = torch.log1p(-taken.clamp_max(MOST))
        return plain + kept[:base], whole + kept[base:]


class LongestMatch(LogitsProcessor):
    """Rules out what would complete a longer token than one that this model has just written.

    Args:
        writer: whose logits these are.
        prompt: tokens of the prompt, padding included: those were not the model's choice.
    """

    def __init__(self, writer: Writer, prompt: int) -> None:
        self.writer, self.prompt = writer, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Transformers' interface."""
        spelling = self.writer.spelling
        for written, row in zip(input_ids[:, self.prompt :].tolist(), scores, strict=True):
            beginnings = spelling.open(written)
            heads = spelling.heads(beginnings)
            if heads:
                found = self.writer.found.flatten().cpu()
                some = found[torch.isin(spelling.first[found], torch.tensor(sorted(heads)))]
                tokens = [*heads, *(spelling.base + some).tolist()]
                row[[token for token in tokens if spelling.longer(beginnings, token)]] = -torch.inf
        return scores


class Among(LogitsProcessor):
    """Runs processors on the tokens that can be written at all, which are few among a million.

    Args:
        processors: to which ids are of no matter.
    """

    def __init__(self, processors: Sequence[Any]) -> None:
        self.processors = processors

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Transformers' interface."""
        there = scores.isfinite().any(0).nonzero()[:, 0]
        few = scores[:, there]
        for processor in self.processors:
            few = processor(input_ids, few)
        return torch.full_like(scores, -torch.inf).index_copy_(1, there, few)


def writer_of(model: Any) -> Writer | None:
    """What writes merged tokens for this model; None where its plan writes base tokens. Built once."""
    tensors = model.__dict__.get("sparsec_output")
    if tensors is None:
        return None
    if "sparsec_writer" not in model.__dict__:
        writer = Writer(model.get_output_embeddings().weight.detach(), model.sparsec_plan.vocabulary, tensors)
        object.__setattr__(model, "sparsec_writer", writer)
    found: Writer = model.sparsec_writer
    return found


@contextmanager
def writing(model: Any) -> Iterator[Writer | None]:
    """Inside the block the model's logits are those over the large vocabulary, where its plan writes merged tokens."""
    writer = None if _base_only.get() else writer_of(model)
    head = model.get_output_embeddings()
    if writer is None or head.__dict__.get("forward") is writer:
        yield writer
        return
    before = head.__dict__.get("forward")
    head.forward = writer
    try:
        yield writer
    finally:
        del head.forward
        if before is not None:
            head.forward = before


@contextmanager
def base_tokens() -> Iterator[None]:
    """Inside the block every model writes tokens of the base vocabulary: what evaluations compare."""
    token = _base_only.set(True)
    try:
        yield
    finally:
        _base_only.reset(token)


def processors_of(model: Any, made: Any, prompt: int) -> Any:
    """Transformers' list of processors as a model that is writing needs it.

    Args:
        made: ``LogitsProcessorList``.
        prompt: tokens of the prompt.
    """
    writer: Writer | None = getattr(model, "sparsec_writer", None)
    if writer is None or model.get_output_embeddings().__dict__.get("forward") is not writer:
        return made
    own: list[Any] = [LongestMatch(writer, prompt)]
    blind: list[Any] = []
    for processor in made:
        if isinstance(processor, BLIND):
            blind.append(processor)
            continue
        own += [Among(blind)] if blind else []
        blind = []
        # The artifact says to engines that cannot write merged tokens that they must not.
        suppresses = isinstance(processor, logits_process.SuppressTokensLogitsProcessor)
        own += _without_merged(processor, writer.own.base) if suppresses else [processor]
    own += [Among(blind)] if blind else []
    return type(made)(own)


def _without_merged(processor: Any, base: int) -> list[Any]:
    kept = processor.suppress_tokens
    kept = kept[kept < base]
    return [type(processor)(kept.tolist(), device=kept.device)] if len(kept) else []
