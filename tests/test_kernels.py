"""Triton's kernels against float64, and compiled for a Hopper GPU; whole plans on them: test_contract.py.

Without a GPU they run in Triton's interpreter (conftest.py), whose bf16 products are wrong: float32 and float16 here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsec.plan import Selector, Window
from sparsec.plugins.coarse import candidates, extended
from sparsec.plugins.index_keys import loaded, stored
from sparsec.plugins.selector import select

pytest.importorskip("triton")
from sparsec.plugins.blocks import choose_blocks, group_numbers, groups_of
from sparsec.plugins.kernels import append, blocks, choose, coarse, decode, lists
from sparsec.plugins.kernels.rows import kept_rows, takes
from sparsec.plugins.kernels.window import window_prefill

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-6 if DEVICE.type == "cpu" else 2e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# Prompts of local heads ------------------------------------------------------------------------------------------


def windowed(q: Tensor, k: Tensor, v: Tensor, first: list[int], window: Window, min_context: int) -> Tensor:
    """In float64, head h of 6 on KV head h // 3; token 0 is in column 0 or before it."""
    out = torch.zeros_like(q, dtype=torch.float64)
    rows, columns = q.shape[2], k.shape[2]
    for b, begin in enumerate(first):
        t = torch.arange(rows, device=q.device)[:, None] + begin
        n = torch.arange(columns, device=q.device)[None] + begin - (columns - rows)
        near = (t - n < window.size) | (n < window.sinks) | (t < min_context)
        for h in range(q.shape[1]):
            s = q[b, h].double() @ k[b, h // 3].double().T * q.shape[-1] ** -0.5
            s = s.masked_fill(~((n <= t) & (n >= 0) & near), float("-inf"))
            out[b, h] = s.softmax(-1).nan_to_num(0.0) @ v[b, h // 3].double()
    return out


@pytest.mark.parametrize(
    ("rows", "columns", "dim", "window", "sinks", "min_context", "first", "dtype"),
    [
        (300, 300, 64, 100, 4, 0, [0, -37], torch.float32),  # the second sequence is padded on the left
        (130, 330, 96, 64, 4, 150, [200, 150], torch.float32),  # a later chunk; dense up to 150 tokens
        (200, 200, 128, 33, 0, 0, [0, 0], torch.float16),
        (70, 70, 64, 512, 4, 516, [0, -3], torch.float16),  # shorter than the window
        (257, 257, 256, 128, 20, 60, [0, 0], torch.float16),
        (1, 129, 64, 64, 1, 0, [128, 128], torch.float32),
    ],
)
def test_windows_in_a_prompt(
    rows: int, columns: int, dim: int, window: int, sinks: int, min_context: int, first: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    q = torch.randn(2, rows, 6, dim, dtype=dtype, device=DEVICE).transpose(1, 2)
    k, v = torch.randn(2, 2, 2, columns, dim, dtype=dtype, device=DEVICE)
    plan = Window(size=window, sinks=sinks)
    out = torch.full_like(q, float("nan"))
    window_prefill(q, k, v, out, ints(0, 2, 5), ints(0, 0, 1), plan, min_context, dim**-0.5, ints(*first))
    true, heads = windowed(q, k, v, first, plan, min_context), [0, 2, 5]
    assert error(out[:, heads], true[:, heads]) < TOLERANCE[dtype]
    assert bool(out[:, [1, 3, 4]].isnan().all()), "other heads' places are not touched"
    padded = torch.arange(rows, device=DEVICE) + first[1] < 0
    assert not bool(out[1, heads][:, padded].any()), "padded rows are zero"


# Storing a token -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [16, 5])
def test_a_new_token_is_stored_in_fp8_as_the_reference_stores_it(rank: int) -> None:
    """Each head's projection gives one of the keys; halves, subnormals and a key of zeros are among them."""
    torch.manual_seed(rank)
    keys = torch.randn(60, rank, device=DEVICE) * torch.exp(4 * torch.randn(60, rank, device=DEVICE))
    keys[0] = 0.0
    keys[1] = 255.9
    keys[2] = 1.0625 + 0.125 * torch.arange(rank, device=DEVICE)  # between two of e4m3
    keys[3] = keys[2] / 2**12
    keys[3, 0] = -1.9
    how = selector(rank=rank, index_dtype="fp8")
    true = stored(keys, torch.float32, how)
    count, dim = len(keys), 16
    q, k = torch.zeros(1, count, 1, dim, device=DEVICE), torch.zeros(1, count, 1, dim, device=DEVICE)
    k[0, :, 0, :rank] = keys
    eye = torch.eye(rank, dim, device=DEVICE).expand(count, -1, -1).contiguous()
    far = torch.zeros(2, 1, count, 3, dim, device=DEVICE)
    near = torch.zeros(2, 1, 0, 4, dim, device=DEVICE)
    index = torch.zeros(1, count, 3, rank, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(1, count, 3, 1, dtype=torch.uint8, device=DEVICE)
    each = ints(*range(count))
    append.append(
        q, k, k, None, (eye, eye), ints(1), each, each, each, (near[0], near[1]), (far[0], far[1]), index,
        torch.zeros(1, count, rank, device=DEVICE), 4, scales,
    )  # fmt: skip
    found = torch.cat((index, scales), 3)[0]
    assert torch.equal(loaded(found[:, 1]), loaded(true))
    assert not bool(found[:, [0, 2]].any()), "no other token's slot is touched"
    assert torch.equal(far[0, 0, :, 1], k[0, :, 0])
    off = (loaded(true) - keys).abs()
    assert bool((off <= keys.abs() / 16 + keys.abs().amax(1, keepdim=True) * 2.0**-17).all()), "half a step at most"


# One row ---------------------------------------------------------------------------------------------------------


def selector(**changed: Any) -> Selector:
    options: dict[str, Any] = {"rank": 16, "rope": "post", "top_p": 0.9, "granularity": "token", "block": 64}
    return Selector(**(options | {"sinks": 4, "recent": 64, "min_keep": 64, "scope": "head"} | changed))


@dataclass
class Case:
    selector: Selector
    lengths: tuple[int, ...]
    dim: int = 64
    dtype: torch.dtype = torch.float32
    scores: str = "random"


CASES = {
    "tokens": Case(selector(), (700, 1301)),
    "one set a layer": Case(selector(scope="layer"), (700, 1301)),
    "blocks": Case(selector(granularity="block"), (640, 641)),
    "blocks, one set": Case(selector(granularity="block", scope="layer", min_keep=300), (1500,), dim=96),
    "nothing is forced": Case(selector(granularity="block", sinks=0, recent=0, min_keep=0, top_p=0.5), (650, 641)),
    "several programs search": Case(selector(top_p=0.5, min_keep=0), (4500,), dim=128),
    "a large floor": Case(selector(top_p=0.3, min_keep=1000, sinks=0, recent=1), (2100,), dtype=torch.float16),
    "everything": Case(selector(top_p=1.0), (500,)),
    "all on one key": Case(selector(top_p=0.5, min_keep=0), (900,), scores="one"),
    "flat": Case(selector(top_p=0.4, min_keep=10), (900,), scores="flat"),
    "ties": Case(selector(top_p=0.5), (900,), scores="ties"),
    "short": Case(selector(), (1, 2), dim=256, dtype=torch.float16),
    "fp8": Case(selector(index_dtype="fp8"), (700, 1301)),
    "fp8, blocks": Case(selector(index_dtype="fp8", granularity="block", top_p=0.7), (1500,), dtype=torch.float16),
    "fp8, ties": Case(selector(index_dtype="fp8", top_p=0.5), (900,), scores="ties"),
}
HEADS, KV, RETRIEVAL = 8, 2, [1, 5, 6]


def index_keys(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    keys = torch.randn(shape, dtype=dtype, device=DEVICE)
    if kind == "flat":
        keys[:] = keys[:, :, :1]
    if kind == "ties":
        keys[:] = keys[:, :, :7].repeat(1, 1, -(-shape[2] // 7), 1)[:, :, : shape[2]]
    if kind == "one":
        keys *= 0.01
    return keys


def in_store(index: Tensor, how: Selector) -> tuple[Tensor, Tensor | None]:
    """Index keys as the kernels' cache holds them, and the exponents of their scales."""
    if how.index_dtype == "model":
        return index, None
    held = stored(index.float(), index.dtype, how)
    return held[..., :-1].contiguous(), held[..., -1:].contiguous()


@pytest.mark.parametrize("way", ["list", "ranges"])
@pytest.mark.parametrize("name", CASES)
def test_a_decode_step(name: str, way: str) -> None:
    """Local heads 0, 2, 3, 4, 7 on the window, 1, 5, 6 on what is chosen; the lengths differ within the batch."""
    case = CASES[name]
    torch.manual_seed(len(name))
    batch, slots, dim, dtype = len(case.lengths), max(case.lengths) + 37, case.dim, case.dtype
    q = torch.randn(batch, HEADS, 1, dim, dtype=dtype, device=DEVICE)
    k, v = torch.randn(2, batch, KV, slots, dim, dtype=dtype, device=DEVICE)
    index = index_keys(case.scores, (batch, len(RETRIEVAL), slots, 16), dtype)
    queries = torch.randn(batch, len(RETRIEVAL), 16, device=DEVICE)
    if case.scores == "one":
        index[:, :, 333] = (queries * 5).to(dtype)
    lengths, window = ints(*(n - 1 for n in case.lengths)), Window(size=128, sinks=4)
    local = [h for h in range(HEADS) if h not in RETRIEVAL]

    item = case.selector.block if case.selector.granularity == "block" else 1
    items, size = -(-slots // item), 256
    values = torch.full((batch, len(RETRIEVAL), items), float("nan"), device=DEVICE)
    stats = torch.full((batch, len(RETRIEVAL), -(-slots // choose.CHUNK), 3), float("nan"), device=DEVICE)
    totals, edges = (torch.full((batch, len(RETRIEVAL), *more), float("nan"), device=DEVICE) for more in ((), (2,)))
    keys, scales = in_store(index, case.selector)
    index = loaded(stored(index.float(), dtype, case.selector))
    choose.score(keys, queries, lengths, item, values, stats, scales)
    if case.selector.top_p < 1 and way == "ranges":
        sums = torch.full(
            (2, batch, len(RETRIEVAL), choose.shares_of(items), 2 * choose.WAYS), float("nan"), device=DEVICE
        )
        states = torch.full((2, batch, len(RETRIEVAL), 4), float("nan"), device=DEVICE)
        choose.search(values, lengths, stats, case.selector, sums, states, totals, edges)

    def by_kv(heads: list[int]) -> tuple[Tensor, Tensor]:
        return decode.groups_of({g: [h for h in heads if h // 4 == g] for g in range(KV)}, DEVICE)

    ranges = -(-items // size)
    partial = torch.full((batch, HEADS, max(3, ranges), dim), float("nan"), device=DEVICE)
    lse = torch.full((batch, HEADS, max(3, ranges)), float("nan"), device=DEVICE)
    heads, places = by_kv(local)  # KV head 0 of them as if it were a ring that has not turned yet
    near = (k[:, :1], v[:, :1])
    decode.window_decode(q, near, (k, v), lengths, heads, places, 1, window, 0, dim**-0.5, slots, 3, partial, lse)
    union = case.selector.scope == "layer"
    each = torch.tensor([[h] + [-1] * 15 for h in RETRIEVAL], dtype=torch.int32, device=DEVICE)
    groups = by_kv(RETRIEVAL) if union else (each, ints(*(h // 4 for h in RETRIEVAL)))
    sets = ints(*(0 if union else i for i in range(len(groups[1]))))
    of = (ints(0), ints(len(RETRIEVAL))) if union else (ints(*range(len(RETRIEVAL))), ints(*[1] * len(RETRIEVAL)))
    if way == "list":
        found = torch.empty(batch, 1 if union else len(RETRIEVAL), items, dtype=torch.int32, device=DEVICE)
        counts = torch.empty(found.shape[:2], dtype=torch.int32, device=DEVICE)
        lists.kept(values, lengths, case.selector, 0, totals, edges, found, counts, *of)
        decode.listed_decode(q, k, v, lengths, *groups, found, counts, sets, item, dim**-0.5, ranges, partial, lse)
    else:
        scratch = torch.empty(batch, len(sets), ranges, size, dtype=torch.int32, device=DEVICE)
        decode.chosen_decode(
            q, k, v, lengths, *groups, values, totals, edges, sets, *of, len(RETRIEVAL) if union else 1, case.selector,
            0, dim**-0.5, scratch, partial, lse,
        )  # fmt: skip
    out = torch.full_like(q, float("nan"))
    decode.combine(partial, lse, ints(*(3 if h in local else ranges for h in range(HEADS))), out, lengths)
    assert lengths.tolist() == list(case.lengths), "the new token is counted"

    for b, n in enumerate(case.lengths):
        pos = torch.arange(n, device=DEVICE)
        scores = (index[b, :, :n].float() @ queries[b][:, :, None])[None].transpose(2, 3)
        keep = select(scores, pos[None, -1:], pos[None], case.selector, 0)[0, :, 0]
        for h in range(HEADS):
            seen = (n - 1 - pos < window.size) | (pos < window.sinks)
            if h in RETRIEVAL:
                seen = keep[0 if union else RETRIEVAL.index(h)]
            s = (k[b, h // 4, :n].double() @ q[b, h, 0].double()) * dim**-0.5
            true = s.masked_fill(~seen, float("-inf")).softmax(-1) @ v[b, h // 4, :n].double()
            assert error(out[b, h, 0], true) < TOLERANCE[dtype], (b, h)


@pytest.mark.parametrize("dtype", ["model", "fp8"])
@pytest.mark.parametrize(
    ("lengths", "changed"),
    [
        ((1501, 640), {"block": 16, "coarse": {"min_context": 700, "one_in": 4}}),  # the second is short
        ((2300,), {"block": 2, "recent": 1, "sinks": 0, "coarse": {"min_context": 0, "one_in": 3}}),
        ((300, 257), {"block": 64, "recent": 0, "sinks": 0, "coarse": {"min_context": 0, "one_in": 64}}),
        ((40, 1), {"block": 64, "coarse": {"min_context": 0, "one_in": 2}}),  # the row's own block alone
    ],
)
def test_candidates_of_a_coarse_level_are_scored_and_nothing_else(
    lengths: tuple[int, ...], changed: dict[str, Any], dtype: str
) -> None:
    torch.manual_seed(len(lengths))
    how = selector(**{"granularity": "block", "index_dtype": dtype, "rank": 8} | changed)
    slots = -(-max(lengths) // 1024) * 1024
    index = torch.randn(len(lengths), 3, slots, 8, device=DEVICE)
    index[:, :, :, 0] += 2 * torch.randn(len(lengths), 3, slots // how.block, device=DEVICE).repeat_interleave(
        how.block, 2
    )
    queries = torch.randn(len(lengths), 3, 8, device=DEVICE)
    keys, scales = in_store(index, how)
    held = stored(index, index.dtype, how)
    means = torch.full((len(lengths), 3, slots // how.block, 8), float("nan"), device=DEVICE)
    coarse.means_of_prompt(held, means, how.block, 0, max(lengths) // how.block)
    values = torch.full((len(lengths), 3, slots // how.block), float("nan"), device=DEVICE)
    coarse.score(keys, scales, means, queries, ints(*(n - 1 for n in lengths)), how, values)
    for b, n in enumerate(lengths):
        pos = torch.arange(n, device=DEVICE)[None]
        true = extended(None, held[b : b + 1, :, :n], pos, n, how.block, torch.float32)
        whole = n // how.block
        torch.testing.assert_close(means[b, :, :whole], true[0], atol=1e-6, rtol=1e-6)
        chosen = candidates(queries[b][None, :, None], true, pos[:, -1:], pos, how)[0, :, 0]
        scores = (loaded(held[b, :, :n]) @ queries[b][:, :, None])[..., 0].masked_fill(~chosen, float("-inf"))
        padded = torch.nn.functional.pad(scores, (0, -n % how.block), value=float("-inf"))
        expected = padded.unflatten(-1, (-1, how.block)).logsumexp(-1)
        torch.testing.assert_close(values[b, :, : expected.shape[-1]], expected, atol=1e-4, rtol=1e-5)


# Groups of prompt rows that choose blocks --------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize(
    ("rows", "past", "changed"),
    [
        (130, 0, {}),
        (27, 96, {"query_block": 8, "block": 16, "recent": 2, "sinks": 1, "min_keep": 0, "top_p": 0.6}),
        (100, 40, {"query_block": 24, "block": 8, "recent": 0, "sinks": 0, "min_keep": 40, "top_p": 0.2}),
        (100, 33, {"query_block": 16, "block": 16, "vote_every": 4, "top_p": 0.7}),
        (64, 0, {"top_p": 1.0}),
        (100, 33, {"query_block": 16, "block": 16, "vote_every": 2, "top_p": 0.7, "index_dtype": "fp8"}),
    ],
)
def test_groups_choose_the_blocks_that_the_reference_chooses(
    rows: int, past: int, changed: dict[str, Any], scope: str
) -> None:
    torch.manual_seed(rows)
    how = selector(**{"prefill": "selector", "rank": 4, "scope": scope} | changed)
    queries = 2 * torch.randn(2, 3, rows, 4, device=DEVICE)
    index = torch.randn(2, 3, past + rows + 5, 4, device=DEVICE)
    q_pos = (torch.arange(rows, device=DEVICE) + past).expand(2, -1)
    k_pos = torch.arange(past + rows, device=DEVICE).expand(2, -1)
    numbers = group_numbers(q_pos, how, 0)
    groups = groups_of(numbers, 0, rows)
    assert groups is not None
    scores = queries @ loaded(stored(index[:, :, : past + rows], index.dtype, how)).transpose(2, 3)
    keys, scales = in_store(index, how)
    true = choose_blocks(scores, numbers, groups, q_pos, k_pos, how)
    group, count = blocks.group_range(past, rows, 6, how)[0]
    assert count == groups.count
    of = (ints(0), ints(3), 3) if scope == "layer" else (ints(0, 1, 2), ints(1, 1, 1), 1)
    found = blocks.choose_lists(queries, keys, ints(past, past), group, count, past + rows, how, 0, *of, scales)
    for b in range(2):
        for line in range(true.shape[1]):
            for place in range(count):
                kept = found.lists[b, line, place, : found.counts[b, line, place]]
                last = (group + place + 1) * how.query_block - 1  # with top_p 1 the reference lists what nobody sees
                listed = true[b, line, place].nonzero()[:, 0].tolist()
                assert kept.tolist() == [block for block in listed if block * how.block <= last]


# Rows of a measurement or of training --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "top_p", "least", "recent"),
    [(200, 0.9, 16, 8), (150, 0.5, 64, 0), (64, 0.999, 100, 8), (130, 0.95, 0, 8)],
)
def test_rows_keep_what_the_reference_keeps(keys: int, top_p: float, least: int, recent: int) -> None:
    torch.manual_seed(keys)
    selector = Selector(
        rank=4, rope="post", granularity="token", block=64, top_p=top_p, sinks=4, recent=recent, min_keep=least
    )
    scores = 3 * torch.randn(2, 2, 3, keys)  # few: the interpreter adds up in Python
    scores[..., ::7] = scores[..., :1]  # ties
    k_pos = torch.arange(keys).repeat(2, 1)
    k_pos[1] = (k_pos[1] - 5).clamp_min(-1)  # padding in front
    q_pos = k_pos[:, -3:].clone()
    q_pos[0, 0] = -1
    true = select(scores, q_pos, k_pos, selector, 20, union=False)
    found = kept_rows(*(x.to(DEVICE) for x in (scores, q_pos, k_pos)), selector, 20)
    assert torch.equal(found.cpu(), true)
    assert takes(scores, selector)
    assert not takes(scores, selector.model_copy(update={"granularity": "block"}))


# The GPU's compiler ----------------------------------------------------------------------------------------------


def test_every_kernel_compiles_for_a_hopper_gpu() -> None:
    """In a process of its own: the interpreter is chosen when a kernel is defined."""
    script = Path(__file__).parent.parent / "benchmarks" / "compile_kernels.py"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-P", str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for file in Path(blocks.__file__).parent.glob("*.py"):
        for name in re.findall(r"^ +(_\w+)\[", file.read_text(), re.MULTILINE):  # launched
            assert name in done.stdout, name
