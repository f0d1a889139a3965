"""Which heads look back to what they have read before: random tokens, repeated.

RazorAttention (arXiv 2407.15891): in a sequence of random tokens that is repeated several times nothing but the earlier
copies can be attended to with sense. A head's *echo* score is the attention of a token to its earlier copies, its
*induction* score the attention to the tokens that followed them, which predict the next one. No text is needed.

The paper's sequence is 2500 tokens, four times. Here a copy is longer than the window, so that no local head can reach
the one before; no token stands twice in a copy; tokens stand before the first copy that are in none, since the first
ones of a sequence draw attention whatever they say.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.capture import Captured, capture
from sparsec.calibrate.needles import FIRST, NeedleDocument
from sparsec.errors import CalibrationError
from sparsec.events import Listener, tracked
from sparsec.plan import ModelShape

TILE = 1 << 26  # attention weights at once, over heads, rows and keys
MARKUP = re.compile(r"<.*>|\[.*\]")  # what tokenizers name <unk>, <0x0A>, [CLS] and unused places


@dataclass(frozen=True)
class Repeats:
    """``tokens`` int64 [length]: ``first`` tokens, then copies of ``period`` tokens to the end."""

    tokens: Tensor
    first: int
    period: int

    def document(self) -> NeedleDocument:
        """The first and the last copy, as the two places of a needle."""
        begin, last = self.first, len(self.tokens) - self.period
        return NeedleDocument(self.tokens, ((range(begin, begin + self.period), range(last, last + self.period)),))


def ordinary_tokens(tokenizer: Any) -> list[int]:
    """Ids of the vocabulary that stand for text: no special and added ones, no names such as <0x0A>; ascending."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    names = tokenizer.get_vocab()
    return sorted(i for name, i in names.items() if i not in special and not MARKUP.fullmatch(name))


def repeats(tokenizer: Any, *, period: int, copies: int, draws: int, seed: int) -> list[Repeats]:
    """Sequences of random ordinary tokens, the same ones for the same arguments; fewer are the first ones of more.

    Args:
        tokenizer: where it puts a BOS token before a text, so does every sequence.
        period: tokens of a copy, all different.
        copies: how often they stand there, 2 or more.
        draws: sequences.

    Raises:
        CalibrationError: the vocabulary has too few tokens.
    """
    vocabulary = ordinary_tokens(tokenizer)
    if len(vocabulary) < period + FIRST:
        raise CalibrationError(
            f"a copy of {period} different tokens and {FIRST} before it need {period + FIRST} ordinary tokens, the "
            f"vocabulary has {len(vocabulary)}: set a smaller window or period"
        )
    bos = getattr(tokenizer, "bos_token_id", None)
    begin = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    made = []
    for draw in range(draws):
        drawn = random.Random(f"{seed}/repeats/{draw}").sample(vocabulary, period + FIRST)
        tokens = begin + drawn[:FIRST] + drawn[FIRST:] * copies
        made.append(Repeats(torch.tensor(tokens), len(begin) + FIRST, period))
    return made


def echo_and_induction(weights: Tensor, rows: Tensor, first: int, period: int) -> tuple[Tensor, Tensor]:
    """Attention to the earlier copies of each row's token, and to the tokens behind them; sums over the copies.

    Args:
        weights: [heads, rows, keys] post-softmax attention.
        rows: [rows] token numbers of the queries, in the second copy or a later one.

    Returns:
        echo and induction, each [heads, rows].
    """
    back = torch.arange(1, int((rows.max() - first) // period) + 1, device=rows.device)
    at = rows[:, None] - back * period  # [rows, copies]
    there = at >= first

    def found(place: Tensor) -> Tensor:
        mass = weights.gather(2, place.clamp_min(0).expand(len(weights), -1, -1))
        return (mass * there).sum(-1)

    return found(at), found(at + 1)


def repeat_scores(model: Any, sequences: Sequence[Repeats], shape: ModelShape, listen: Listener) -> Tensor:
    """Mean echo and induction of every head: [2, sequences, layers, heads], float64.

    All tokens from the second copy on are scored. Rows are tiled: nothing of the size length x length is held.
    """
    scores = torch.zeros(2, len(sequences), shape.layers, shape.heads, dtype=torch.float64)
    for number, each in enumerate(tracked(sequences, "detect repeating heads", listen, len(sequences))):
        begin, length = each.first + each.period, len(each.tokens)

        def note(seen: Captured, number: int = number, each: Repeats = each, begin: int = begin) -> None:
            k = seen.k[0].repeat_interleave(shape.group, 0).float()
            tile = max(1, min(256, TILE // (len(k) * k.shape[1])))
            for start in range(begin, k.shape[1], tile):
                stop = min(start + tile, k.shape[1])
                rows = torch.arange(start, stop, device=k.device)
                logits = (seen.q[0, :, start:stop].float() * seen.scale) @ k[:, :stop].transpose(-1, -2)
                future = torch.arange(stop, device=k.device)[None] > rows[:, None]
                weights = logits.masked_fill_(future, float("-inf")).softmax(-1)
                for kind, mass in enumerate(echo_and_induction(weights, rows, each.first, each.period)):
                    scores[kind, number, seen.layer] += mass.sum(-1).double().cpu()

        capture(model, each.tokens[None], note)
        scores[:, number] /= length - begin
    return scores
