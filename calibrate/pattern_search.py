"""Greedy search for the layers that share index sets: IndexCache, Algorithm 1, at the price of what a flip changes.

IndexCache (arXiv 2603.12201): start with an indexer in every layer; again and again turn the layer into a shared one
whose loss is lowest, first layer excepted. A candidate here costs the decode rows through some layers alone
(replay.py), which is the plain search's result exactly: those from the flipped one up, or, where the candidate was
tried before, from the lowest flip accepted since, if that is above it. ``lazy`` re-ranks only the candidates that were
best before: an approximation, exact where the rise of a flip never shrinks by flips made earlier.

Windows are divided among processes; losses are put back in order before they are averaged, in double precision, so the
pattern does not depend on how many there are.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsec.calibrate import ranks
from sparsec.calibrate.patterns import share
from sparsec.calibrate.replay import Replay, State
from sparsec.errors import ArtifactError
from sparsec.events import Event, Listener
from sparsec.layout import read_json
from sparsec.plan import Plan
from sparsec.plugins.masked import ROWS
from sparsec.plugins.runtime import install, tensor_names

STAGE = "search sharing pattern"
Order = Literal["exact", "lazy"]


@dataclass(frozen=True)
class Goal:
    """When to stop, and what stays."""

    full: int  # layers that keep an indexer
    max_loss: float | None  # share by which the loss may rise
    fixed: frozenset[int]  # layers that are never shared
    order: Order = "exact"
    margin: float | None = None  # standard errors by which the best candidate has to win, else the search stops


@dataclass
class Work:
    """What the search computed, and what the plain one would have."""

    candidates: int = 0
    layers: int = 0  # layer-forwards of a window
    layers_plain: int = 0
    tokens: int = 0  # tokens through a layer
    tokens_plain: int = 0


@dataclass
class Search:
    """Windows under a changing pattern. The plan has been installed on the model, one index set a layer.

    Args:
        model: the dense model.
        plan: all indexers in place.
        tensors: theirs.
        windows: token ids, [length] each.
        prompt: prefill rows of each.
        reuse: candidates start at what a flip changes; False runs every layer again.
        hold: bytes that candidates' states may take, in all processes together.
    """

    model: Any
    plan: Plan
    tensors: Mapping[str, Tensor]
    windows: Sequence[Tensor]
    prompt: int
    reuse: bool
    listen: Listener
    hold: int = 0
    state: Path | None = None  # a file that is written after every flip, and continued from
    flips: list[dict[str, Any]] = field(default_factory=list)
    base: float = 0.0
    now: float = 0.0  # loss under ``plan``
    stopped: str = "target"
    work: Work = field(default_factory=Work)
    replays: list[Replay] = field(default_factory=list)
    overlap: list[list[float]] = field(default_factory=list)  # of index sets before any sharing, see set_overlap
    total: int = 0  # candidates expected
    # By candidate: how many flips there were when it was tried, and each window's state.
    tried: dict[int, tuple[int, list[State]]] = field(default_factory=dict)

    def run(self, goal: Goal) -> None:
        """Flip layers until the goal is met. What came out: ``plan``, ``flips``, ``base``, ``stopped``, ``work``."""
        self._resume()
        now = self._start()
        self.now = float(now.mean())
        left = [i for i in self.plan.indexed() if i not in goal.fixed and self.plan.layers[i].index == "full"]
        self.total = self.work.candidates + sum(len(left) - i for i in range(self._full() - goal.full))
        self.listen(Event(STAGE, self.work.candidates, self.total))
        while self._full() > goal.full and left:
            trials = self._round(left, float(now.mean()), goal.order)
            ranked = sorted(trials, key=lambda layer: (float(trials[layer].mean()), layer))
            best = ranked[0]
            loss = float(trials[best].mean())
            if goal.max_loss is not None and loss > self.base * (1 + goal.max_loss):
                self.stopped = "budget"
                break
            flip: dict[str, Any] = {"layer": best, "loss": loss}
            flip["trials"] = {str(i): float(trials[i].mean()) for i in sorted(trials)}
            if len(ranked) > 1:
                flip["second"] = ranked[1]
                flip["margin"], flip["error"] = paired(trials[ranked[1]], trials[best])
                if goal.margin is not None and flip["margin"] < goal.margin * flip["error"]:
                    self.stopped = "unclear"
                    self.listen(Event(STAGE, note=f"layers {best} and {ranked[1]} cannot be told apart: stopped"))
                    break
            self.flips.append(flip)
            self._accept(best)
            now = trials[best]
            self.now = loss
            left.remove(best)
            self._save()
            self.listen(Event(STAGE, note=f"{self.plan.pattern} {loss / self.base - 1:+.2%}"))
        self._install(self.plan)  # not the last candidate's
        if self.stopped == "target" and self._full() > goal.full:
            self.stopped = "fixed"
        if self.work.candidates < self.total:  # a budget, or lazy: fewer than there might have been
            self.listen(Event(STAGE, self.total, self.total))

    def _start(self) -> Tensor:
        """The windows recorded under the plan so far; every row's loss."""
        self._install(self.plan)
        self.replays = [Replay(self.model, window, self.prompt) for window in ranks.own(self.windows)]
        losses = torch.cat(ranks.in_order([replay.losses for replay in self.replays])).double()
        if not self.flips:
            self._count(0, whole=True, plain=True)
            self.base = float(losses.mean())
            parts = [set_overlap(replay, self.plan, self.prompt) for replay in self.replays]
            self.overlap = torch.stack(ranks.in_order(parts)).mean(0).tolist()
        return losses

    def take(self, plan: Plan) -> None:
        """No search: this pattern, measured on the same rows as the one before."""
        self._start()
        self.now = float(self.losses(plan).mean())
        self.plan, self.stopped = plan, "given"

    def _full(self) -> int:
        return self.plan.pattern.count("F")

    def losses(self, plan: Plan) -> Tensor:
        """Loss of every decode row under another pattern, float64, window after window; nothing is accepted."""
        changed = [i for i in plan.indexed() if plan.layers[i].index != self.plan.layers[i].index]
        self._install(plan)
        start = min(changed, default=plan.model.layers - 1) if self.reuse else 0
        found = [replay.run(start) for replay in self.replays]
        self._install(self.plan)
        return self._together(found)

    def _together(self, states: Sequence[State]) -> Tensor:
        return torch.cat(ranks.in_order([state.losses for state in states])).double()

    def _round(self, left: Sequence[int], now: float, order: Order) -> dict[int, Tensor]:
        """Rows' losses of this round's candidates: all of them, or in lazy order as many as it takes."""
        if order == "exact" or not self.flips:
            return {layer: self._trial(layer) for layer in left}
        # The rise that a flip had when it was last tried, smallest first; what is on top and fresh wins.
        last: dict[int, float] = {}
        before = self.base
        for flip in self.flips:
            last |= {int(layer): loss - before for layer, loss in flip["trials"].items()}
            before = flip["loss"]
        queue = [(last[layer], layer, False) for layer in left]
        heapq.heapify(queue)
        found: dict[int, Tensor] = {}
        while not queue[0][2]:
            _, layer, _ = heapq.heappop(queue)
            found[layer] = self._trial(layer)
            heapq.heappush(queue, (float(found[layer].mean()) - now, layer, True))
        # The plain search tries the others too.
        skipped = (len(left) - len(found)) * len(self.windows) * self.plan.model.layers
        self.work.layers_plain += skipped
        self.work.tokens_plain += skipped * len(self.windows[0])
        return found

    def _trial(self, layer: int) -> Tensor:
        """The candidate's losses. What it computed is kept for the next round, as far as there is room."""
        self._install(share(self.plan, layer))
        start, known = self._known(layer)
        states = [replay.run(start, state) for replay, state in zip(self.replays, known, strict=True)]
        self._count(start, plain=True)
        self.tried.pop(layer, None)
        if self.reuse and self._bytes(layer) + sum(map(self._bytes, self.tried)) <= self.hold:
            self.tried[layer] = (len(self.flips), states)
        self.work.candidates += 1
        self.listen(Event(STAGE, self.work.candidates, self.total))
        return self._together(states)

    def _known(self, layer: int) -> tuple[int, Sequence[State | None]]:
        """The layer that a candidate has to be run from, and each window's state up to there; None: the accepted one.

        A candidate that was tried before did below every flip accepted since what it would do again.
        """
        if layer in self.tried:
            since, states = self.tried[layer]
            return min(flip["layer"] for flip in self.flips[since:]), states
        return layer if self.reuse else 0, [None] * len(self.replays)

    def _accept(self, layer: int) -> None:
        """The flip is made: the candidate's states are those to start from, and what stood on others' is let go."""
        self.plan = share(self.plan, layer)
        self._install(self.plan)
        if layer in self.tried:
            states = self.tried[layer][1]
        else:
            states = [replay.run(layer) for replay in self.replays]
            self._count(layer)  # for its boundaries: the plain search need not
        for replay, state in zip(self.replays, states, strict=True):
            replay.state = state
        self.tried = {other: kept for other, kept in self.tried.items() if other < layer}

    def _bytes(self, layer: int) -> int:
        """What a candidate's states take beside the accepted ones, all windows together: boundaries and index sets."""
        length = len(self.windows[0])
        rows = length if self.plan.selects_in_prefill else length - self.prompt
        hidden = int(self.model.config.get_text_config().hidden_size) * int(self.model.dtype.itemsize)
        chosen = length if self.plan.dsa is None else 8 * self.plan.dsa.top_k
        sets = sum(i >= layer and each.index == "full" for i, each in enumerate(self.plan.layers))
        return len(self.windows) * rows * ((self.plan.model.layers - layer) * hidden + sets * chosen)

    def _install(self, plan: Plan) -> None:
        install(self.model, plan, {name: self.tensors[name] for name in tensor_names(plan)})

    def _count(self, start: int, *, whole: bool = False, plain: bool = False) -> None:
        """One run of all windows from layer ``start`` up, whichever process runs them.

        whole: the prompts too. plain: the plain search runs it as well, whole windows through all layers.
        """
        layers, windows, length = self.plan.model.layers, len(self.windows), len(self.windows[0])
        rows = length if whole or self.plan.selects_in_prefill else length - self.prompt
        self.work.layers += windows * (layers - start)
        self.work.tokens += windows * (layers - start) * rows
        if plain:
            self.work.layers_plain += windows * layers
            self.work.tokens_plain += windows * layers * length

    def _save(self) -> None:
        if self.state is not None and ranks.is_first():
            aside = self.state.with_suffix(".part")
            kept = {"base": self.base, "flips": self.flips, "work": vars(self.work), "overlap": self.overlap}
            aside.write_text(json.dumps(kept), encoding="utf-8")
            aside.rename(self.state)

    def _resume(self) -> None:
        """Continue behind the last flip of a run that was stopped."""
        kept = None
        if self.state is not None and ranks.is_first() and self.state.is_file():
            try:
                kept = read_json(self.state)
            except ArtifactError:  # a failing disk: the search starts again
                self.state.unlink()
        kept = ranks.same(kept)
        if kept is not None:
            self.base, self.flips, self.overlap = kept["base"], kept["flips"], kept["overlap"]
            self.work = Work(**kept["work"])
            for flip in self.flips:
                self.plan = share(self.plan, flip["layer"])


def paired(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean of a - b over rows, and its standard error."""
    difference = a - b
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def set_overlap(replay: Replay, plan: Plan, prompt: int) -> Tensor:
    """Mean intersection over union of layers' index sets, without tokens kept in any case: float64 [layers, layers].

    Args:
        replay: with every indexer in place.
        plan: what it ran.
        prompt: rows from here on are decode rows.
    """
    every = plan.indexed()
    total, rows = torch.zeros(len(every), len(every), dtype=torch.float64), 0
    for sets in chosen_sets(replay, plan, prompt):
        chosen = sets.float()
        both = torch.einsum("irk,jrk->ijr", chosen, chosen)
        sizes = chosen.sum(-1)
        either = sizes[:, None] + sizes[None] - both
        total += (both / either.clamp_min(1)).sum(-1).double().cpu()
        rows += sets.shape[1]
    return total / max(1, rows)


def chosen_sets(replay: Replay, plan: Plan, prompt: int) -> Iterator[Tensor]:
    """Decode rows' index sets, tile by tile, without tokens kept in any case: bool [indexed layers, rows, keys]."""
    sources = [plan.index_source(layer) for layer in plan.indexed()]
    if plan.dsa is not None:
        found = torch.stack([replay.state.index_sets[layer, 0][0] for layer in sources])  # [layers, tokens, top_k]
        keys = torch.arange(found.shape[1], device=found.device)
        for start in range(prompt, found.shape[1], ROWS):
            part = found[:, start : start + ROWS].long()
            at = torch.arange(start, start + part.shape[1], device=found.device)
            sets = torch.zeros(*part.shape[:2], len(keys), dtype=torch.bool, device=found.device)
            yield sets.scatter_(-1, part, True) & (keys <= at[:, None])
        return
    assert plan.selector is not None
    for start in sorted({key[1] for key in replay.state.index_sets if key[1] >= prompt}):
        sets = torch.stack([replay.state.index_sets[layer, start].any(1)[0] for layer in sources])
        keys = torch.arange(sets.shape[-1], device=sets.device)
        at = torch.arange(start, start + sets.shape[1], device=sets.device)
        yield sets & (keys >= plan.selector.sinks) & (at[:, None] - keys >= plan.selector.recent)
