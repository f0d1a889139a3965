"""What the selectors of retrieval heads do on decode rows: the mass they find, the tokens they keep, the bytes read.

Weights below are a row's true attention over all tokens it may see, A; K is what it keeps.

    recall       sum of A over K.
    sinkless     the same with the selector's sinks left out of both: sum of A over K without sinks, divided by the sum
                 of A over all tokens without sinks. Sinks often hold most of the mass, and are kept in any case.
    far          likewise without any forced token, sinks and recent ones: the part that was really chosen.
                 ``far_mass`` is the share of A that lies there.
    other        the same scores at the other granularity, blocks for tokens or tokens for blocks.
    oracle       the same rule (top-p, granularity, forced tokens, floor, union) on the true attention in place of the
                 selector's scores: what a perfect indexer would keep. Of a model's own indexers (DSA): as many tokens,
                 by the attention of all heads together.

Forced tokens are counted as kept everywhere. A row with nothing outside the sinks (or the forced tokens) has no
sinkless (or far) recall and does not count there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.decode_bytes import Read, read_bytes, selecting_kv_heads
from sparsec.plan import Plan, Selector
from sparsec.plugins.selector import select
from sparsec.plugins.step import Selection

SAMPLED = 128  # rows a tile on which the other granularity and the oracle are chosen: a choice sorts all keys
EACH = ("recall", "kept", "sinkless", "far", "far_mass")
SOME = ("other_recall", "other_kept", "oracle_recall", "oracle_kept")
# What is shown of each: the mean, and the 5 % that find least or keep most.
SHOWN = {
    "recall": ("mean", "p5"),
    "sinkless": ("mean", "p5"),
    "far": ("mean", "p5"),
    "far_mass": ("mean",),
    "kept": ("mean", "p95"),
    "other_recall": ("mean",),
    "other_kept": ("mean", "p95"),
    "oracle_recall": ("mean",),
    "oracle_kept": ("mean", "p95"),
}


@dataclass
class _Layer:
    """One layer's rows so far, on their device."""

    heads: tuple[int, ...]
    each: list[Tensor] = field(default_factory=list)  # [len(EACH), heads, rows]
    some: list[Tensor] = field(default_factory=list)  # [len(SOME), heads, sampled rows]
    union: list[Tensor] = field(default_factory=list)  # [rows] tokens read, summed over the KV heads
    context: list[Tensor] = field(default_factory=list)  # [rows]

    def figures(self) -> dict[str, Tensor]:
        """[heads, rows] of each figure, on the CPU."""
        each, some = torch.cat(self.each, -1).cpu(), torch.cat(self.some, -1).cpu()
        return dict(zip((*EACH, *SOME), (*each, *some), strict=True))


@dataclass
class SelectorStats:
    """Collects them by layer and head. Use as ``Step.observe``; padded rows are left out."""

    layers: dict[int, _Layer] = field(default_factory=dict)
    plan: Plan | None = None
    itemsize: int = 0
    _others: dict[int, Tensor] = field(
        default_factory=dict
    )  # by keys seen: the last own index at the other granularity

    @torch.no_grad()
    def __call__(self, seen: Selection) -> None:
        """Add one tile of rows."""
        selector = seen.plan.selector
        forced = (selector.sinks, selector.recent) if selector is not None else (0, 0)
        self.plan, self.itemsize = seen.plan, seen.k.element_size()
        logits = (seen.q.float() @ seen.k.float().transpose(-1, -2)) * seen.scale
        weights = logits.masked_fill(~seen.visible, float("-inf")).softmax(-1).nan_to_num(0.0)
        keep = seen.keep.expand_as(weights)
        real = (seen.q_pos >= 0).flatten()

        def by_head(figures: tuple[Tensor, ...], rows: Tensor) -> Tensor:
            """[batch, heads, rows] of each figure -> [figures, heads, real rows]."""
            return torch.stack([x.float().transpose(0, 1).flatten(1)[:, rows] for x in figures])

        k_pos = seen.k_pos[:, None, None, :]
        distance = seen.q_pos[:, None, :, None] - k_pos
        sinks = k_pos < forced[0]
        found = weights * keep
        figures = [found.sum(-1), keep.sum(-1)]
        for left_out in (sinks, sinks | (distance < forced[1])):
            whole = weights.masked_fill(left_out, 0.0).sum(-1)
            figures.append(found.masked_fill(left_out, 0.0).sum(-1) / whole)  # 0 / 0 is no number, and is not counted
        each = by_head((*figures, whole), real)

        some = _sampled(seen.q_pos.shape[1])
        chosen = []
        for choice in (self._other(seen, some), _oracle(seen, logits, weights, some)):
            if choice is None:
                chosen += [torch.full_like(weights[:, :, some, 0], torch.nan)] * 2
                continue
            kept = choice.expand(-1, len(seen.heads), -1, -1)
            chosen += [(weights[:, :, some] * kept).sum(-1), kept.sum(-1)]
        layer = self.layers.setdefault(seen.layer, _Layer(seen.heads))
        layer.each.append(each)
        layer.some.append(by_head(tuple(chosen), (seen.q_pos[:, some] >= 0).flatten()))
        layer.union.append(_union(seen, keep, distance).flatten()[real])
        layer.context.append(seen.visible.sum(-1).flatten()[real])

    def _other(self, seen: Selection, some: slice) -> Tensor | None:
        """The other granularity; a layer that shares takes it from the layer it shares with. DSA has none."""
        selector = seen.plan.selector
        if selector is None:
            return None
        keys = seen.k_pos.shape[1]
        if seen.scores is not None:
            turned = selector.model_copy(update={"granularity": other_granularity(selector)})
            where = (seen.q_pos[:, some], seen.k_pos)
            kept = select(seen.scores()[:, :, some], *where, turned, seen.plan.min_context, kv_heads=_kv_heads(seen))
            self._others[keys] = kept
        return self._others[keys].to(seen.q.device)

    def table(self) -> list[dict[str, Any]]:
        """A row a head: the figures of :data:`SHOWN`, ``<figure>_mean`` and so on; None where no row counts."""
        return [
            {"layer": number, "head": head} | _shown({name: x[place] for name, x in layer.figures().items()})
            for number, layer in sorted(self.layers.items())
            for place, head in enumerate(layer.heads)
        ]

    def summary(self) -> dict[str, Any]:
        """The same over all retrieval heads and rows, what was run, and the bytes; empty where nothing was selected."""
        if not self.layers or self.plan is None:
            return {}
        selector = self.plan.selector
        layers = [layer.figures() for layer in self.layers.values()]
        together = {name: torch.cat([figures[name].flatten() for figures in layers]) for name in layers[0]}
        context = self._contexts()
        heads = sum(len(layer.heads) for layer in self.layers.values())
        read = self._read(context > self.plan.min_context)
        return {
            "heads": heads,
            "rows": len(context),
            "sampled_rows": together["oracle_kept"].numel() // heads,
            "context_mean": float(context.float().mean()),
            "granularity": selector.granularity if selector is not None else "token",
            "block": selector.block if selector is not None else 1,
            "forced": selector.sinks + selector.recent if selector is not None else 0,
            **_shown(together),
            "read": read.to_json() if read is not None else None,
        }

    def reads(self) -> list[Read]:
        """What a step reads by context, in half octaves, shortest first; rows that are dense by plan left out."""
        if not self.layers or self.plan is None:
            return []
        context = self._contexts()
        octave = (2 * context.double().log2()).floor()
        octave[context <= self.plan.min_context] = -1
        found = [self._read(octave == each) for each in sorted(set(octave.tolist())) if each >= 0]
        return [read for read in found if read is not None]

    def _contexts(self) -> Tensor:
        """Of the rows, the same for every layer; on the CPU, since layers may be on different devices."""
        return torch.cat(next(iter(self.layers.values())).context).cpu()

    def _read(self, rows: Tensor) -> Read | None:
        assert self.plan is not None
        if not bool(rows.any()) or self.plan.selector is None:
            return None
        kept = {i: float(torch.cat(layer.union).cpu()[rows].double().mean()) for i, layer in self.layers.items()}
        context = self._contexts()[rows]
        return read_bytes(self.plan, float(context.double().mean()), kept, self.itemsize)


def other_granularity(selector: Selector) -> str:
    """The one that is not run."""
    return "block" if selector.granularity == "token" else "token"


def _sampled(rows: int) -> slice:
    """Evenly spaced rows, the last one among them."""
    step = -(-rows // SAMPLED)
    return slice((rows - 1) % step, None, step)


def _oracle(seen: Selection, logits: Tensor, weights: Tensor, some: slice) -> Tensor:
    selector = seen.plan.selector
    if selector is None:  # DSA: as many tokens, by the attention of all heads together
        together = weights[:, :, some].sum(1, keepdim=True)
        assert seen.plan.dsa is not None
        best = together.topk(min(seen.plan.dsa.top_k, together.shape[-1]), dim=-1).indices
        return torch.zeros_like(together, dtype=torch.bool).scatter_(-1, best, True) & seen.visible[:, :, some]
    where = (seen.q_pos[:, some], seen.k_pos)
    return select(logits[:, :, some], *where, selector, seen.plan.min_context, kv_heads=_kv_heads(seen))


def _kv_heads(seen: Selection) -> list[int]:
    return [head // seen.plan.model.group for head in seen.heads]


def _union(seen: Selection, keep: Tensor, distance: Tensor) -> Tensor:
    """Tokens that a step reads of each KV head for all of its query heads, summed over KV heads: [batch, rows]."""
    if seen.plan.dsa is not None:  # latents, one for all heads
        return keep[:, 0].sum(-1)
    group, window = seen.plan.model.group, seen.plan.window
    local = {head // group for head in seen.plan.layers[seen.layer].local}
    total = torch.zeros(keep.shape[0], keep.shape[2], device=keep.device)
    for kv in selecting_kv_heads(seen.plan, seen.layer):
        places = [place for place, head in enumerate(seen.heads) if head // group == kv]
        read = keep[:, places].any(1, keepdim=True)
        if kv in local and window is not None:
            read = read | (((distance < window.size) | (seen.k_pos[:, None, None, :] < window.sinks)) & seen.visible)
        total += read.sum(-1)[:, 0]
    return total


def _shown(figures: dict[str, Tensor]) -> dict[str, float | None]:
    """Means and quantiles of what counts."""
    out: dict[str, float | None] = {}
    for name, which in SHOWN.items():
        values = figures[name][~figures[name].isnan()].sort().values
        for one in which:
            at = round((len(values) - 1) * (0.05 if one == "p5" else 0.95))
            value = values.double().mean() if one == "mean" else values[at] if len(values) else None
            out[f"{name}_{one}"] = float(value) if value is not None and len(values) else None
    return out
