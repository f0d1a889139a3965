"""Output rows of merged tokens: a row's logit is the log of the joint probability of the token's pieces.

With a the token that m goes on with (its longest beginning, plugins/merged_writing.py) and W its output row, m's row is
W_a + d: at a hidden state h that the output layer gets, exp(d·h) is how likely the rest of m's pieces are to follow,
once a has. The base model says that itself, on any text: where a is what comes next, its next-token distributions
behind a give the rest's probability y. So hidden states of the frozen model on base tokens are all that is needed, and
d minimises the mean of exp(d·h) - y - y (d·h - log y): Poisson regression, the generalised Kullback-Leibler divergence.
At its minimum both are equal on the average, in any direction of h. The problem is convex.

d is predicted from the output rows of the rest's pieces, by one linear map for all merged tokens, over a constant, and
corrected for each token by a term of its own, which starts at nothing: the short training of new rows alone. Dynamic
tokenization (arXiv 2411.18553) takes its hypernetwork's output embeddings instead, which imitate tokens of the
vocabulary; with them a text's spellings compete, since no probability is moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.calibrate.hypernetwork import cosine
from sparsec.events import Event, Listener, silent
from sparsec.plugins.merged_writing import MOST, LongestMatch, Spelling, Writer

ROWS = 2048  # positions whose logits over the base vocabulary are held at once
POSITIONS = 512  # a step
FOLLOWING = 256  # tokens that go on with the same one and are looked at for a position, at most; drawn by lot
LEAST = 1e-6  # of a constant probability
LARGEST = 4.0  # d·h at most: exp of it does not overflow, and no probability needs it
RIDGE = 1e-3
BACK = 32  # written tokens in which a longer one can begin


@dataclass(frozen=True)
class States:
    """What the output layer gets on text, and the text."""

    tokens: Tensor  # int64 [windows, length], base tokens
    hidden: Tensor  # float32 [windows, length, width]
    total: Tensor  # float32 [windows, length], log of the sum over the base vocabulary of exp(logit)


@torch.no_grad()
def read_states(model: Any, head: Tensor, tokens: Tensor, batch: int, listen: Listener = silent) -> States:
    """Run the frozen model on base tokens, int64 [windows, length]."""
    hidden, total = [], []
    stage = "read for output rows"
    listen(Event(stage, 0, len(tokens)))
    for part in torch.split(tokens, batch):
        states = model.get_decoder()(input_ids=part.to(model.device), use_cache=False).last_hidden_state
        rows = states.flatten(0, 1)
        sums = [nn.functional.linear(few.to(head.dtype), head).float().logsumexp(-1) for few in torch.split(rows, ROWS)]
        hidden.append(states.float().cpu())
        total.append(torch.cat(sums).view(part.shape).cpu())
        listen(Event(stage, sum(map(len, hidden)), len(tokens)))
    return States(tokens.cpu(), torch.cat(hidden), torch.cat(total))


@dataclass(frozen=True)
class Events:
    """Of each position (but a window's last), the merged tokens that go on with what stands behind it."""

    ends: Tensor  # int64 [positions + 1]: a position's events lie between two of them
    numbers: Tensor  # int64 [events], merged tokens
    likely: Tensor  # float32 [events], y
    weights: Tensor  # float32 [events], of those that were drawn among too many

    def of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Events of positions, and which of ``positions`` each is of, int64 [events of these] both."""
        starts, sizes = self.ends[positions], self.ends[positions + 1] - self.ends[positions]
        which = torch.repeat_interleave(torch.arange(len(positions)), sizes)
        inside = torch.arange(len(which)) - (sizes.cumsum(0) - sizes)[which]
        return starts[which] + inside, which


class Follow:
    """Finds which merged tokens go on with which, and how likely the base model says they are."""

    def __init__(self, spelling: Spelling, head: Tensor) -> None:
        self.spelling, self.head = spelling, head
        children: dict[int, list[int]] = {}
        self.rest = []  # of each merged token, its pieces behind the token that it goes on with
        for number, parent in enumerate(spelling.parents.tolist()):
            children.setdefault(parent, []).append(number)
            self.rest.append(spelling.pieces(spelling.base + number)[len(spelling.pieces(parent)) :])
        self._size = torch.tensor([len(rest) for rest in self.rest])
        self._longest = int(self._size.max())
        self._rest = torch.tensor([rest + (0,) * (self._longest - len(rest)) for rest in self.rest])
        self._children = {parent: torch.tensor(found) for parent, found in children.items()}

    def events(self, states: States, seed: int) -> Events:
        """Of all positions of a text, window by window."""
        generator = torch.Generator().manual_seed(seed)
        ends, numbers, likely, weights = [0], [], [], []
        for window, ids in enumerate(states.tokens.tolist()):
            for place in range(len(ids) - 1):
                ends.append(ends[-1])
                for end, children in self._behind(ids, place):
                    few = children
                    if len(children) > FOLLOWING:
                        few = children[torch.randperm(len(children), generator=generator)[:FOLLOWING]]
                    ends[-1] += len(few)
                    numbers.append(few)
                    likely.append(self._likely(states, window, end, few))
                    weights.append(torch.full((len(few),), len(children) / len(few)))
        if not numbers:
            return Events(torch.tensor(ends), torch.empty(0).long(), torch.empty(0), torch.empty(0))
        return Events(torch.tensor(ends), torch.cat(numbers), torch.cat(likely), torch.cat(weights))

    def _behind(self, ids: list[int], place: int) -> list[tuple[int, Tensor]]:
        """For each token that stands behind a position: where it ends, and the merged tokens that go on with it."""
        found = []
        for token in self.spelling.beginnings(ids[place + 1 :]):
            end = place + len(self.spelling.pieces(token))  # the hidden state there has read the token
            if token in self._children and end < len(ids):
                found.append((end, self._children[token]))
        return found

    def _likely(self, states: States, window: int, end: int, children: Tensor) -> Tensor:
        """y: of rests of one piece the model's probability; of longer ones too where the text has all but the last."""
        size, rest = self._size[children], self._rest[children]
        text = states.tokens[window, end + 1 : end + 1 + self._longest]
        text = nn.functional.pad(text, (0, self._longest - len(text)), value=-1)
        free = torch.arange(self._longest) >= size[:, None] - 1
        fits = ((rest == text) | free).all(1)
        last = rest.gather(1, size[:, None] - 1)[:, 0]
        at = (end + size - 1).clamp_max(states.tokens.shape[1] - 1)
        logit = (states.hidden[window, at] * self.head[last]).sum(-1) - states.total[window, at]
        found: Tensor = logit.exp() * fits
        return found


class OutputRows(nn.Module):
    """d of merged tokens in whitened coordinates, in which hidden states have unit second moments.

    Args:
        constant: float32 [width], x·constant is near 1 for whitened hidden states x.
        start: float32 [merged], log of the mean of y.
        features: float32 [merged, width], mean of the output rows of the rest's pieces.
    """

    start: Tensor
    features: Tensor
    constant: Tensor

    def __init__(self, constant: Tensor, start: Tensor, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("constant", constant)
        self.register_buffer("start", start)
        self.register_buffer("features", features / features.pow(2).mean().sqrt().clamp_min(1e-12))
        width = len(constant)
        self.map = nn.Parameter(torch.zeros(width, width))
        self.own = nn.Parameter(torch.zeros(len(start), width))

    def forward(self, which: Tensor) -> Tensor:
        """[tokens] -> [tokens, width]."""
        shared = self.features[which] @ self.map / self.features.shape[1] ** 0.5
        found: Tensor = self.start[which, None] * self.constant + shared + self.own[which]
        return found


@dataclass(frozen=True)
class OutputSettings:
    """How long the new rows are trained."""

    steps: int
    lr: float = 1e-4
    own_lr: float = 1e-3
    decay: float = 1e-2  # of corrections, which have seen little text
    seed: int = 0


def fit_output(
    spelling: Spelling, head: Tensor, train: States, held: States, settings: OutputSettings, listen: Listener = silent
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Output rows of merged tokens.

    Args:
        head: [at least base, width], the output layer's weight.

    Returns:
        rows, float32 [merged, width]; E[h hᵀ], float32 [width, width]; and JSON data: the divergence on held-out text
        (nats a position) by step, the first of constant probabilities.
    """
    table = head.float().cpu()
    flat = train.hidden.flatten(0, 1)
    moments = flat.T @ flat / len(flat)
    values, vectors = torch.linalg.eigh(
        moments.double() + RIDGE * moments.diagonal().double().mean() * torch.eye(len(moments), dtype=torch.double)
    )
    turn = (vectors / values.sqrt()).float()  # x = h turn, and d = turn δ
    whitened = flat @ turn
    constant = torch.linalg.lstsq(
        whitened.T @ whitened + RIDGE * len(flat) * torch.eye(len(moments)), whitened.sum(0)[:, None]
    ).solution[:, 0]
    follow = Follow(spelling, table)
    events, judge = follow.events(train, settings.seed), follow.events(held, settings.seed)
    states, apart = (_places(part.hidden) @ turn for part in (train, held))
    generator = torch.Generator().manual_seed(settings.seed)
    start = _constants(events, len(follow.rest))
    features = torch.stack([table[list(rest)].mean(0) for rest in follow.rest])
    rows = OutputRows(constant, start, features)
    optimizer = torch.optim.AdamW(
        [
            {"params": [rows.map], "lr": settings.lr, "weight_decay": 0.0},
            {"params": [rows.own], "lr": settings.own_lr, "weight_decay": settings.decay},
        ]
    )
    schedule = cosine(optimizer, max(1, settings.steps))
    checks = [(0, _held(rows, judge, apart))]
    best = {name: value.clone() for name, value in rows.state_dict().items()}
    stage = "train output rows"
    listen(Event(stage, 0, settings.steps))
    for step in range(1, settings.steps + 1):
        loss = _loss(rows, events, states, torch.randint(len(states), (POSITIONS,), generator=generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step == settings.steps or step % max(1, settings.steps // 5) == 0:
            checks.append((step, _held(rows, judge, apart)))
            if checks[-1][1] <= min(value for _, value in checks):
                best = {name: value.clone() for name, value in rows.state_dict().items()}
        listen(Event(stage, step, settings.steps))
    rows.load_state_dict(best)
    made = _whole(rows, spelling, table, turn)
    measured = {
        "checks": [{"step": step, "loss": value} for step, value in checks],
        "best_step": min(checks, key=lambda check: check[1])[0],
        "positions": train.tokens.numel(),
    }
    return made, moments, measured


@torch.no_grad()
def _whole(rows: OutputRows, spelling: Spelling, table: Tensor, turn: Tensor) -> Tensor:
    """All rows: those of what they go on with first, and d."""
    every = torch.arange(len(rows.start))
    made = torch.cat([rows(part) @ turn.T for part in torch.split(every, 4096)])
    parents = spelling.parents
    # The shorter ones first, since a longer one's row is theirs and d.
    for number in sorted(every.tolist(), key=lambda n: len(spelling.pieces(spelling.base + n))):
        parent = int(parents[number])
        made[number] += table[parent] if parent < spelling.base else made[parent - spelling.base]
    return made


def _places(hidden: Tensor) -> Tensor:
    """Hidden states that have a token behind them: [windows, length, width] -> [positions, width]."""
    return hidden[:, :-1].flatten(0, 1)


def _constants(events: Events, size: int) -> Tensor:
    """Log of the mean probability with which each merged token follows what it goes on with, over the whole text."""
    seen = torch.zeros(size).index_add_(0, events.numbers, torch.ones_like(events.likely))
    sums = torch.zeros(size).index_add_(0, events.numbers, events.likely)
    # One more that never followed: what was seen once is not certain.
    return (sums / (seen + 1)).clamp(LEAST, MOST).log()


def _loss(rows: OutputRows, events: Events, states: Tensor, positions: Tensor) -> Tensor:
    """The divergence of exp(d·h) from y, summed over merged tokens, averaged over positions; states: whitened."""
    at, which = events.of(positions)
    used, place = events.numbers[at].unique(return_inverse=True)  # type: ignore[no-untyped-call]
    d = (rows(used)[place] * states[positions[which]]).sum(-1).clamp_max(LARGEST)
    y = events.likely[at]
    loss: Tensor = (events.weights[at] * (d.exp() - y + torch.xlogy(y, y) - y * d)).sum() / len(positions)
    return loss


@torch.no_grad()
def _held(rows: OutputRows, judge: Events, apart: Tensor) -> float:
    """The loss over all held-out positions."""
    parts = torch.split(torch.arange(len(apart)), POSITIONS)
    return sum(float(_loss(rows, judge, apart, part)) * len(part) for part in parts) / len(apart)


@torch.no_grad()
def written_bits(writer: Writer, states: States) -> dict[str, Any]:
    """What text costs in base tokens and in merged ones, by longest match, and how many of each it takes; JSON data.

    Hidden states are the base model's: what reading merged tokens changes is not in it. A window's first token and its
    last merged one, which may be cut, do not count.

    Args:
        writer: of the rows.
        states: of held-out text.
    """
    spelling = writer.spelling
    found = {"tokens": 0, "steps": 0, "bits_base": 0.0, "bits_merged": 0.0}
    for tokens, hidden, total in zip(states.tokens, states.hidden, states.total, strict=True):
        ids: list[int] = tokens.tolist()
        written = spelling.longest(ids[1:])[:-1]
        sizes = torch.tensor([len(spelling.pieces(token)) for token in written])
        starts, size = sizes.cumsum(0) - sizes, int(sizes.sum())
        device = writer.weight.device
        ruled = LongestMatch(writer, 0)
        every = writer(hidden[starts].to(device))
        for number, token in enumerate(written):
            scores = ruled(torch.tensor([written[max(0, number - BACK) : number]]), every[number : number + 1])
            found["bits_merged"] -= float(scores[0].log_softmax(-1)[token]) / math.log(2)
        logits = (hidden[:size] * writer.weight[tokens[1 : size + 1].to(device)].float().cpu()).sum(-1)
        found["bits_base"] += float((total[:size] - logits).sum()) / math.log(2)
        found["tokens"] += size
        found["steps"] += len(written)
    return found
