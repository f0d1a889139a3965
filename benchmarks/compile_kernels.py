"""Compile every kernel for a Hopper GPU, on any machine: python benchmarks/compile_kernels.py

Prints, for the shapes of Llama-3.1-8B in bfloat16, what each takes: shared memory, registers, spills, tensor-core
instructions. Nothing runs.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sparsec.plan import Coarse, Selector, Window
from sparsec.plugins.kernels import append, blocks, choose, coarse, decide, decode, edge, forecast, lists, picked
from sparsec.plugins.kernels.rows import kept_rows
from sparsec.plugins.kernels.window import window_prefill

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}
HEADS, KV, DIM, SLOTS, RETRIEVAL = 32, 8, 128, 131072, 5
RANKS = ((256, HEADS * DIM), (HEADS * DIM, 256))  # of a forecaster


def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In place of a launch."""
    parameters = inspect.signature(self.fn).parameters
    values = dict(zip(parameters, args, strict=False)) | options
    build = {name: values.pop(name) for name in ("num_warps", "num_stages") if name in values}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, (name, parameter) in enumerate(parameters.items()):
        value = values[name]
        if isinstance(value, float) and "constexpr" not in str(parameter.annotation):
            signature[name] = "fp32"
        elif "constexpr" in str(parameter.annotation) or (isinstance(value, int) and value == 1):
            signature[name], constants[place,] = "constexpr", value
        else:
            signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=aligned)
    # PTX 8.3: newer than any that a Hopper driver refuses.
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=build | {"ptx_version": 83})
    ptx = made.asm["ptx"]
    registers = re.search(r"\.reg \.b32\s+%r<(\d+)>", ptx)
    print(
        f"{self.fn.__name__:16} shared {made.metadata.shared:7,d}  warps {made.metadata.num_warps}  "
        f"virtual registers {registers.group(1) if registers else '?':>5}  "
        f"wgmma {ptx.count('wgmma.mma_async'):3d}  mma {ptx.count('mma.sync'):3d}  cubin {len(made.asm['cubin']):,d}"
    )


def main() -> None:
    """All kernels once; the selector's also for blocks, and for index keys in fp8."""
    JITFunction.run = compiled

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def halves(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    window, scale = Window(size=8192, sinks=4), DIM**-0.5
    q, k = halves(1, HEADS, 4096, DIM), halves(1, KV, 4096, DIM)
    window_prefill(q, k, k, q, ints(27), ints(27), window, 0, scale, ints(1))
    one, far, near = halves(1, HEADS, 1, DIM), halves(1, KV, 1024, DIM), halves(1, KV, 8196, DIM)
    index, queries = halves(1, RETRIEVAL, SLOTS, 16), torch.zeros(1, RETRIEVAL, 16)
    projection = torch.zeros(RETRIEVAL, 16, DIM)
    eight, scales = (torch.zeros(1, RETRIEVAL, SLOTS, last, dtype=torch.uint8) for last in (16, 1))
    means = halves(1, RETRIEVAL, SLOTS // 64, 16)
    for keys, exponents in ((index, None), (eight, scales)):
        append.append(
            one, k[:, :, :1], k[:, :, :1], (torch.zeros(1, 1, DIM),) * 2, (projection, projection), ints(1), ints(KV),
            ints(RETRIEVAL), ints(RETRIEVAL), (near, near), (far, far), keys, queries, 4, exponents, means, 64,
        )  # fmt: skip
    partial, lse = torch.zeros(1, HEADS, 128, DIM), torch.zeros(1, HEADS, 128)
    decode.window_decode(
        one, (near, near), (far, far), ints(1), ints(8, 16), ints(8), 4, window, 0, scale, 8192, 32, partial, lse
    )
    for granularity, item, size in (("token", 1, 1024), ("block", 64, 64)):
        selector = Selector(
            rank=16, rope="post", top_p=0.9, granularity=granularity, block=64, sinks=4, recent=64, min_keep=64
        )
        items = SLOTS // item
        values, stats = torch.zeros(1, RETRIEVAL, items), torch.zeros(1, RETRIEVAL, SLOTS // choose.CHUNK, 3)
        totals, edges = torch.zeros(1, RETRIEVAL), torch.zeros(1, RETRIEVAL, 2)
        choose.score(index, queries, ints(1), item, values, stats)
        choose.score(eight, queries, ints(1), item, values, stats, scales)
        sums = torch.zeros(2, 1, RETRIEVAL, choose.shares_of(items), 2 * choose.WAYS)
        choose.search(values, ints(1), stats, selector, sums, torch.zeros(2, 1, RETRIEVAL, 4), totals, edges)
        decode.chosen_decode(
            one, far, far, ints(1), ints(RETRIEVAL, 16), ints(RETRIEVAL), values, totals, edges, ints(RETRIEVAL),
            ints(RETRIEVAL), ints(RETRIEVAL), 1, selector, 0, scale, ints(1, RETRIEVAL, items // size, size), partial,
            lse,
        )  # fmt: skip
        if edge.fits(items):
            for scope, sets in (("head", RETRIEVAL), ("layer", 1)):
                how = selector.model_copy(update={"scope": scope})
                kept = (ints(1, sets, items), ints(1, sets), ints(sets), ints(sets))
                lists.kept(values, ints(1), how, 0, totals, edges, *kept)
            decode.listed_decode(
                one, far, far, ints(1), ints(RETRIEVAL, 16), ints(RETRIEVAL), ints(1, RETRIEVAL, items),
                ints(1, RETRIEVAL), ints(RETRIEVAL), item, scale, 64, partial, lse,
            )  # fmt: skip
    prompt = Selector(
        rank=16, rope="post", top_p=0.9, granularity="block", block=64, sinks=4, recent=64, min_keep=64,
        prefill="selector", query_block=64, vote_every=4,
    )  # fmt: skip
    levels = prompt.model_copy(update={"coarse": Coarse(min_context=65536)})
    for keys, exponents in ((index, None), (eight, scales)):
        found = torch.zeros(1, RETRIEVAL, SLOTS // 64)
        coarse.score(keys, exponents, means, queries, ints(1), levels, found)
    rows = torch.zeros(1, RETRIEVAL, 4096, 16)
    of = (ints(RETRIEVAL), ints(RETRIEVAL), 1)
    chosen = blocks.choose_lists(rows, index, ints(1), 0, 8, SLOTS, prompt, 0, *of)
    blocks.choose_lists(rows, eight, ints(1), 0, 8, SLOTS, prompt, 0, *of, scales)
    blocks.block_prefill(
        q, k, k, q, ints(RETRIEVAL), ints(RETRIEVAL), ints(RETRIEVAL), ints(1), chosen, prompt, 0, scale
    )
    decode.combine(partial, lse, ints(HEADS), one, ints(1))
    several = prompt.model_copy(update={"granularity": "token"})
    places = torch.zeros(1, 8192, dtype=torch.long)
    kept_rows(torch.zeros(1, 1, 512, 8192), places[:, :512], places, several, 516)
    routed()


def routed() -> None:
    """What routed units run: a prompt of 4 x 2,048 tokens, and one token."""
    for tokens in (8192, 1):
        x, flags = torch.zeros(tokens, HEADS * DIM, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.uint8)
        on, off = torch.zeros(2, tokens, dtype=torch.long)
        before = torch.zeros(tokens + 1, dtype=torch.int32)
        router = (torch.zeros(17, HEADS * DIM), torch.zeros(17), torch.zeros(16))
        decide.decide(x, router, 0.5, flags, None, flags, on, off, before)
        down, up = ((torch.zeros(shape, dtype=x.dtype), torch.zeros(shape[0], dtype=x.dtype)) for shape in RANKS)
        forecast.forecast(x, down, up, True, off, before[-1:], x)
    forecast.scatter(x, on, x)
    listed = picked.Listed(on, before, 1, 2048, False)
    q, k = (torch.zeros(1, heads, 2048, DIM, dtype=x.dtype) for heads in (HEADS, KV))
    listed.attend(q, k, k, torch.zeros(HEADS, dtype=torch.long), torch.zeros(1, 2048, dtype=torch.long), DIM**-0.5)


if __name__ == "__main__":
    main()
