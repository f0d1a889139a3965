"""Prefill rows that choose: each block of queries takes one set of key blocks, by the selector.

Rows are grouped by token number // ``query_block``. The selector's softmax mass of each key block (``block`` tokens),
as a mean over the group's rows in this call, or over every so-manyth of them (``vote_every``), decides: top-p, the
floor, and the forced blocks, which are those of the sinks and of the recent tokens of any row, the row's own included.
Every row is still causal. Rows that are dense (``min_context``) neither choose nor count.

RTPurbo (arXiv 2605.16928) leaves prefill dense; this is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsec.plan import Selector
from sparsec.plugins.selector import by_block, causal, largest, top_p, united


@dataclass(frozen=True)
class Groups:
    """The query groups of one tile of rows."""

    of: Tensor  # [batch, rows of the tile] the row's group, from 0; -1: the row is padding or dense
    first: Tensor  # [batch] what group 0 is, as token number // query_block
    count: int  # groups of the sequence that has most
    start: int  # all rows of the call that belong to them: start .. stop - 1
    stop: int


def group_numbers(q_pos: Tensor, selector: Selector, min_context: int) -> Tensor:
    """Token number // query_block; -1 where a row is padding or dense. [batch, rows]."""
    return torch.where(q_pos < max(0, min_context), -1, q_pos // selector.query_block)


def groups_of(numbers: Tensor, start: int, stop: int) -> Groups | None:
    """The groups that rows start .. stop - 1 stand in; None where none of them chooses. numbers: of the call's rows."""
    tile = numbers[:, start:stop]
    chooses = tile >= 0
    if not bool(chooses.any()):
        return None
    last = tile.amax(1)
    first = torch.where(chooses, tile, last[:, None].clamp_min(0)).amin(1)
    together = ((numbers >= first[:, None]) & (numbers <= last[:, None])).any(0).nonzero()[:, 0]
    of = torch.where(chooses, tile - first[:, None], -1)
    return Groups(of, first, int((last - first).max()) + 1, int(together[0]), int(together[-1]) + 1)


def choose_blocks(
    scores: Tensor,
    numbers: Tensor,
    groups: Groups,
    q_pos: Tensor,
    k_pos: Tensor,
    selector: Selector,
    kv_heads: Sequence[int] = (),
) -> Tensor:
    """The key blocks that each group keeps.

    Args:
        scores: [batch, heads, rows, keys] float32, the rows of all groups, any causal state (masked here).
        numbers: [batch, rows] of :func:`group_numbers`.
        q_pos, k_pos: [batch, rows] and [batch, keys], token numbers from 0; -1 marks padding.
        kv_heads: as in :func:`sparsec.plugins.selector.select`.

    Returns:
        bool [batch, heads (1 for scope 'layer'), groups, key blocks].
    """
    weights = scores.masked_fill(~causal(q_pos, k_pos), float("-inf")).softmax(-1).nan_to_num(0.0)
    of = (k_pos.clamp_min(0) // selector.block)[:, None, None, :].expand(weights.shape)
    mass = by_block(weights, of)
    blocks = mass.shape[-1]
    # Rows of other groups, and those that do not choose, go to one more group that is cut off.
    place = numbers - groups.first[:, None]
    place = torch.where((numbers >= 0) & (place >= 0) & (place < groups.count), place, groups.count)
    empty = torch.zeros(len(place), groups.count + 1, dtype=q_pos.dtype, device=place.device)
    oldest = empty.scatter_reduce(1, place, q_pos, "amin", include_self=False)
    newest = empty.scatter_reduce(1, place, q_pos, "amax", include_self=False)[:, :-1]
    votes = (q_pos - oldest.gather(1, place)) % selector.vote_every == 0
    oldest, place = oldest[:, :-1], torch.where(votes, place, groups.count)
    rows = torch.zeros(len(place), groups.count + 1, device=place.device)
    rows = rows.scatter_add_(1, place, torch.ones(place.shape, device=place.device))
    summed = torch.zeros(*mass.shape[:2], groups.count + 1, blocks, device=mass.device)
    summed = summed.scatter_add_(2, place[:, None, :, None].expand(mass.shape), mass)
    mean = (summed / rows.clamp_min(1)[:, None, :, None])[:, :, :-1]

    low = (oldest - max(selector.recent, 1) + 1).clamp_min(0) // selector.block
    block = torch.arange(blocks, device=mass.device)
    near = (block >= low[..., None]) & (block <= (newest // selector.block)[..., None])
    forced = (near | (block * selector.block < selector.sinks))[:, None]
    least = -(-selector.min_keep // selector.block)
    keep = top_p(mean, selector.top_p) | largest(mean.masked_fill(forced, 0.0), least) | forced
    return united(keep, selector, kv_heads)


def kept_keys(sets: Tensor, groups: Groups, k_pos: Tensor, visible: Tensor, block: int) -> Tensor:
    """The keys that each row of a tile sees: bool [batch, heads or 1, rows, keys]; rows that do not choose see all.

    sets: of :func:`choose_blocks`; visible: bool [batch, 1, rows, keys], the causal mask.
    """
    heads = sets.shape[1]
    of = groups.of.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, sets.shape[3])
    by_row = sets.gather(2, of)
    at = (k_pos.clamp_min(0) // block)[:, None, None, :].expand(-1, heads, by_row.shape[2], -1)
    return (by_row.gather(3, at) | (groups.of < 0)[:, None, :, None]) & visible
