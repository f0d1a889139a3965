"""Fits the rank-r projections of retrieval heads: a closed form, then forward KL on the true attention.

Stage 1 of RTPurbo (arXiv 2605.16928): the backbone is frozen and L_proj = sum over heads of KL(a_full || a_proj),
teacher first, over all causal keys. Keys that the plan forces in anyway (sinks, most recent) can be
counted as one outcome, ``lump``: their total mass is still fitted, but no rank is spent on telling them apart (ours;
before RoPE a bilinear score cannot even express recency). Rows are tiled, so memory is rows x length; nothing of
size length x length exists.

The initialisation is ours (the paper gives none). The true logits l(m, n) are approximated by q_m' M k_n. With second
moments Cq, Ck (keys centred: a constant per row does not change a softmax) and G = E[l(m, n) q_m k_n'], least squares
for independent q and k gives M = Cq^-1 G Ck^-1, and the best rank-r factor in that metric is the truncated SVD of
Cq^-1/2 G Ck^-1/2. After RoPE l is itself bilinear and the form is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.capture import Captured, capture
from sparsec.events import Event, Listener
from sparsec.plan import Plan

TILE = 64  # query rows at once


@dataclass(frozen=True)
class Forced:
    """Keys that every selection keeps: the first ``sinks`` and the last ``recent``, the row's own included."""

    sinks: int
    recent: int
    lump: bool = True

    def mask(self, rows: Tensor, keys: int) -> Tensor:
        """bool [rows, keys]."""
        at = torch.arange(keys, device=rows.device)[None]
        return (at < self.sinks) | (rows[:, None] - at < self.recent)


@dataclass
class LayerSample:
    """One window, one layer: what the retrieval heads saw. Heads first, float32 (or the model's dtype on a GPU)."""

    q: Tensor  # [heads, rows, head_dim] as attention sees them
    k: Tensor  # [heads, keys, head_dim]
    q_in: Tensor  # the same as the selector sees them: before or after RoPE
    k_in: Tensor
    rows: Tensor  # [rows] token numbers of the queries
    scale: float


Window = dict[int, LayerSample]  # by layer


def sample_window(
    model: Any,
    plan: Plan,
    heads: dict[int, tuple[int, ...]],
    tokens: Tensor,
    rows: Tensor,
    *,
    rope: str,
    mined: int,
    forced: Forced,
    generator: torch.Generator,
    positions: Tensor | None = None,
) -> Window:
    """One dense forward over [length] token ids; what the retrieval heads of ``heads`` (by layer) see.

    positions: see :func:`sparsec.calibrate.fit_windows.stretched`.

    Kept are the given ``rows`` and, layer by layer, ``mined`` more: those in which a head gives one far key the most
    weight. Such rows are rare in text, and losing their key costs most. All in random order, so that every tile of
    rows is a fair sample; without mined ones, all layers keep the same rows in the same order.
    """
    sample: Window = {}
    place = torch.rand(len(tokens), generator=generator)

    def note(seen: Captured) -> None:
        chosen = heads.get(seen.layer)
        if not chosen:
            return
        query = torch.tensor(chosen, device=seen.q.device)
        kv = query // plan.model.group
        every = torch.arange(len(tokens), device=seen.q.device)
        whole = LayerSample(seen.q[0, query], seen.k[0, kv], seen.q[0, query], seen.k[0, kv], every, seen.scale)
        at = torch.cat((rows.to(every.device), _sharpest(whole, forced, mined))).unique().cpu()  # type: ignore[no-untyped-call]
        at = at[place[at].argsort()].to(every.device)
        q_in, k_in = seen.before_rope() if rope == "pre" else (seen.q, seen.k)
        sample[seen.layer] = LayerSample(whole.q[:, at], whole.k, q_in[0, query][:, at], k_in[0, kv], at, seen.scale)

    capture(model, tokens[None], note, positions)
    return sample


def _sharpest(whole: LayerSample, forced: Forced, count: int) -> Tensor:
    """The ``count`` rows in which some head gives one key that is not forced the largest weight."""
    peaks = []
    for start in range(0, len(whole.rows), TILE):
        logits, seen = _logits(whole, start)
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        far = seen & ~forced.mask(whole.rows[start : start + TILE], seen.shape[-1])
        peaks.append((weights * far).amax((0, 2)))
    return torch.cat(peaks).topk(min(count, len(whole.rows))).indices


def closed_form(samples: Sequence[LayerSample], rank: int, forced: Forced) -> tuple[Tensor, Tensor]:
    """Whitened SVD of the bilinear form: Wq, Wk, each [heads, rank, head_dim], float32."""
    first = samples[0]
    heads, _, dim = first.q_in.shape
    device = first.q.device
    cq = torch.zeros(heads, dim, dim, dtype=torch.float64, device=device)
    ck, g = cq.clone(), cq.clone()
    for sample in samples:
        mean = sample.k_in.double().mean(1, keepdim=True)
        k_in = sample.k_in.double() - mean
        cq += torch.einsum("hmd,hme->hde", sample.q_in.double(), sample.q_in.double()) / sample.q_in.shape[1]
        ck += torch.einsum("hnd,hne->hde", k_in, k_in) / k_in.shape[1]
        for start in range(0, sample.q.shape[1], TILE):
            rows = sample.rows[start : start + TILE]
            logits, seen = _logits(sample, start)
            if forced.lump:
                seen = seen & ~forced.mask(rows, seen.shape[-1])
            count = seen.sum(-1, keepdim=True).clamp_min(1)
            centred = (logits - (logits * seen).sum(-1, keepdim=True) / count) * seen / count
            per_row = centred.double() @ k_in  # [heads, tile, head_dim]
            g += torch.einsum("hmd,hme->hde", sample.q_in[:, start : start + len(rows)].double(), per_row) / len(
                sample.rows
            )
    cq_back = _inverse_root(cq / len(samples))
    ck_back = _inverse_root(ck / len(samples))
    u, s, vh = torch.linalg.svd(cq_back @ (g / len(samples)) @ ck_back)
    root = s[:, :rank].sqrt()[:, :, None]
    wq = (root * u[:, :, :rank].transpose(-1, -2)) @ cq_back
    wk = (root * vh[:, :rank]) @ ck_back
    return wq.float(), wk.float()


def kl(sample: LayerSample, wq: Tensor, wk: Tensor, start: int, forced: Forced) -> Tensor:
    """Forward KL of one tile of rows, summed over heads, mean over rows: sum_j p_j (log p_j - log softmax(s)_j)."""
    return divergence(sample, scores(sample, wq, wk, start), start, forced).sum()


def scores(sample: LayerSample, wq: Tensor, wk: Tensor, start: int) -> Tensor:
    """What an indexer says of one tile of rows: [heads, tile, keys], float32."""
    zq = torch.einsum("hmd,hrd->hmr", sample.q_in[:, start : start + TILE].float(), wq)
    zk = torch.einsum("hnd,hrd->hnr", sample.k_in.float(), wk)
    return zq @ zk.transpose(-1, -2)


def divergence(target: LayerSample, scores: Tensor, start: int, forced: Forced) -> Tensor:
    """Forward KL of the heads' true attention in one tile of rows from softmax(scores), mean over the rows: [heads].

    target: whose q and k say what is true. scores: [heads, tile, keys].
    """
    logits, seen = _logits(target, start)
    log_p = logits.masked_fill(~seen, float("-inf")).log_softmax(-1)
    log_s = scores.masked_fill(~seen, float("-inf")).log_softmax(-1)
    each = torch.where(seen, log_p.exp() * (log_p - log_s).nan_to_num(0.0), 0.0)
    if not forced.lump:
        return each.sum(-1).mean(-1)
    lumped = forced.mask(target.rows[start : start + TILE], seen.shape[-1])
    log_p, log_s = (x.masked_fill(~lumped, float("-inf")).logsumexp(-1) for x in (log_p, log_s))
    return (each.masked_fill(lumped, 0.0).sum(-1) + log_p.exp() * (log_p - log_s)).mean(-1)


Loss = Callable[[Window, int, tuple[Tensor, Tensor], int], Tensor]  # window, layer, (Wq, Wk), first row of the tile


def train(
    windows: Sequence[Window],
    weights: dict[int, tuple[Tensor, Tensor]],
    *,
    forced: Forced,
    steps: int,
    lr: float,
    seed: int,
    listen: Listener,
    loss: Loss | None = None,
    heads: int | None = None,
    stage: str = "train indexers",
) -> tuple[dict[int, tuple[Tensor, Tensor]], list[float]]:
    """AdamW, linear warm-up, cosine, weight decay 0.01, gradient norm 1.0 (the paper's settings, fewer steps).

    Keeps the weights with the lowest smoothed loss, so a run that diverges gives back the best it had.

    Args:
        loss: of one layer's weights on one tile, summed over heads; None: :func:`kl` on the layer's own heads.
        heads: that the losses of all layers sum over; None: those that have weights.

    Returns:
        Wq, Wk by layer and the loss per head of every step.
    """
    loss = loss or (lambda window, layer, pair, start: kl(window[layer], *pair, start, forced))
    parameters = {i: (wq.clone().requires_grad_(), wk.clone().requires_grad_()) for i, (wq, wk) in weights.items()}
    flat = [w for pair in parameters.values() for w in pair]
    heads = heads or sum(pair[0].shape[0] for pair in parameters.values())
    optimizer = torch.optim.AdamW(flat, lr=lr, weight_decay=0.01)
    warm = max(1, steps // 6)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    best, best_loss, smooth = [w.detach().clone() for w in flat], math.inf, None
    for step in range(steps):
        window = windows[step % len(windows)]
        total = 0.0
        for i, pair in parameters.items():
            tiles = max(1, window[i].q.shape[1] // TILE)
            start = int(torch.randint(tiles, (1,), generator=generator)) * TILE
            found = loss(window, i, pair, start)
            found.backward()  # type: ignore[no-untyped-call]
            total += float(found.detach())
        losses.append(total / heads)
        smooth = losses[-1] if smooth is None else 0.9 * smooth + 0.1 * losses[-1]
        if math.isfinite(smooth) and smooth < best_loss and step >= min(len(windows), steps - 1):
            best, best_loss = [w.detach().clone() for w in flat], smooth
        torch.nn.utils.clip_grad_norm_(flat, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        listen(Event(stage, step + 1, steps))
    pairs = iter(best)
    return {i: (next(pairs), next(pairs)) for i in parameters}, losses


@torch.no_grad()
def mean_kl(windows: Sequence[Window], weights: dict[int, tuple[Tensor, Tensor]], forced: Forced) -> float:
    """Mean forward KL a head over all sampled rows, in nats."""
    total, tiles, heads = 0.0, 0, sum(pair[0].shape[0] for pair in weights.values())
    for window in windows:
        for i, sample in window.items():
            starts = range(0, sample.q.shape[1], TILE)
            total += sum(float(kl(sample, *weights[i], start, forced)) for start in starts) / len(starts)
        tiles += 1
    return total / max(1, tiles) / max(1, heads)


def _logits(sample: LayerSample, start: int) -> tuple[Tensor, Tensor]:
    """True logits of a tile [heads, tile, keys] and which of them are causal [tile, keys]."""
    q = sample.q[:, start : start + TILE].float()
    logits = q @ sample.k.float().transpose(-1, -2) * sample.scale
    rows = sample.rows[start : start + TILE]
    seen = torch.arange(sample.k.shape[1], device=rows.device)[None] <= rows[:, None]
    return logits, seen


def _inverse_root(c: Tensor) -> Tensor:
    """c^-1/2 of symmetric matrices; directions without data stay small."""
    values, vectors = torch.linalg.eigh(c)
    values = values.clamp_min(values.amax(-1, keepdim=True) * 1e-6)
    root: Tensor = (vectors * values.rsqrt()[..., None, :]) @ vectors.transpose(-1, -2)
    return root
