"""Operators of the decode graph as kernels compiled ahead of time: TensorRT's plugins without TensorRT.

For each operator: shapes and types of its outputs, the kernel, its launch, and PTX for a GPU that need not be there.
All of it is plain: sizes may be numbers or a library's symbols for sizes. :mod:`sparsec.plugins.tensorrt` and
:mod:`sparsec.plugins.tensorrt_rtx` are thin layers over this table. Graphs hold these operators where they were
exported with plugins (:mod:`sparsec.export.onnx.divided`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

NAMESPACE = "sparsec"  # of plugins; TensorRT takes no dots here, so it is not the graphs' domain
CAPABILITIES = (80, 86, 89, 90, 100, 120)
FLOATS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
TYPES = {**FLOATS, "int32": "*i32", "int64": "*i64", "bool": "*i8"}
# PTX that drivers of the time of a GPU read; Blackwell is new in 8.7.
PTX = {80: 83, 86: 83, 89: 83, 90: 83, 100: 87, 120: 87}

CHUNK = 1024  # tokens that a program scores

Kind = Literal["int", "float", "ints"]


@dataclass(frozen=True)
class Tactic:
    """A way to run a kernel, of which TensorRT times all: keys a tile, warps a program, tiles under way."""

    keys: int
    warps: int
    stages: int


# By TensorRT's number of it; 0 is TensorRT's default.
TACTICS = {1: Tactic(64, 4, 3), 2: Tactic(32, 4, 4), 3: Tactic(64, 8, 3)}


@dataclass(frozen=True)
class Launch:
    """A launch but for its threads: the grid and the integers behind the inputs. Sizes may be symbols."""

    grid: tuple[Any, Any, Any]
    integers: tuple[Any, ...]


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU: PTX whose parameters are the inputs, the integers and the outputs, and nothing else."""

    name: str
    ptx: str
    threads: int
    shared: int  # bytes

    @property
    def digest(self) -> str:
        """sha256 of the PTX."""
        return hashlib.sha256(self.ptx.encode()).hexdigest()


@dataclass(frozen=True)
class Use:
    """An operator as a network uses it: what its kernel is compiled from."""

    operator: str
    floats: str  # the type of keys and values; "" where it has none
    shapes: tuple[tuple[int, ...], ...]  # of the inputs; -1: free
    attributes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Operator:
    """One operator of the domain: its interface. Subclasses say what runs.

    ``inputs`` and ``outputs`` are names with types; ``T`` is the type of keys and values. ``attributes``: those that
    plugins get, in this order.
    """

    name: str
    kernel: str  # of sparsec.plugins.kernels.engine
    inputs: Mapping[str, str]
    integers: tuple[str, ...]
    outputs: Mapping[str, str]
    attributes: Mapping[str, Kind]
    tactics: tuple[int, ...]

    def types(self, floats: str) -> tuple[list[str], list[str]]:
        """Types of inputs and outputs where T is ``floats``."""
        return tuple(
            [floats if each == "T" else each for each in side.values()] for side in (self.inputs, self.outputs)
        )  # type: ignore[return-value]

    def shapes(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Shapes of the outputs."""
        raise NotImplementedError

    def launch(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> Launch:
        """How its kernel is launched, by the inputs' shapes."""
        raise NotImplementedError

    def constants(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any], how: Tactic) -> dict[str, Any]:
        """What is compiled into the kernel; head counts and dimensions of ``inputs`` have to be numbers."""
        raise NotImplementedError


class Shares(Operator):
    """Attention of one decode row, divided: q [batch, heads, 1, dim], k and v [batch, stores, slots, dim] first."""

    def shapes(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        batch, heads, _, dim = inputs[0]
        shares = int(attributes["shares"])
        return [(batch, heads, shares, dim), (batch, heads, shares)]

    def launch(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> Launch:
        (batch, heads, _, _), (_, stores, slots, _) = inputs[:2]
        runs = len(runs_of(inputs, attributes))
        groups = runs * -(-(int(heads) // runs) // 16)
        sets = (inputs[3][1],) if "sets" in self.integers else ()
        return Launch((int(attributes["shares"]), groups, batch), (heads, stores, slots, *sets))

    def constants(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any], how: Tactic) -> dict[str, Any]:
        kv_heads, dim = runs_of(inputs, attributes), int(inputs[0][3])
        found = {
            "SCALE": float(attributes["scale"]) * math.log2(math.e),
            "KV_HEADS": kv_heads,
            "GROUP": int(inputs[0][1]) // len(kv_heads),
            **_tile(dim),
            "BLOCK_N": how.keys,
        }
        if "window" in attributes:
            window, sinks, context = (int(attributes[name]) for name in ("window", "sinks", "min_context"))
            # A ring holds as many tokens as the window, or as the dense start where that is more.
            ring = 0 if "kv_heads" in attributes else max(window, context - sinks)
            found |= {"WINDOW": window, "SINKS": sinks, "MIN_CONTEXT": context, "RING": ring}
        return found


class List(Operator):
    """A mask as a list: keep [batch, sets, slots]."""

    def shapes(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        batch, sets, slots = inputs[0]
        return [(batch, sets, slots), (batch, sets)]

    def launch(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> Launch:
        batch, sets, slots = inputs[0]
        return Launch((sets, batch, 1), (slots,))

    def constants(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any], how: Tactic) -> dict[str, Any]:
        return {"TILE": how.keys * how.warps * 8}


class Combine(Operator):
    """The mean of shares: partial [batch, heads, shares, dim], lse, and q, whose shape and type the result has."""

    def shapes(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        return [tuple(inputs[2])]

    def launch(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> Launch:
        batch, heads, shares, _ = inputs[0]
        return Launch((heads, batch, 1), (shares,))

    def constants(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any], how: Tactic) -> dict[str, Any]:
        return {**_tile(int(inputs[0][3])), "STEP": 16}


class Score(Operator):
    """Items of the selector: queries [batch, heads, 1, rank], index [batch, heads, slots, rank]."""

    def shapes(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        return [(inputs[0][0], inputs[0][1], int(attributes["items"]))]

    def launch(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> Launch:
        batch, heads, slots, _ = inputs[1]
        items, block = int(attributes["items"]), int(attributes["block"])
        return Launch((-(-items * block // CHUNK), heads, batch), (heads, slots, items))

    def constants(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any], how: Tactic) -> dict[str, Any]:
        rank = int(inputs[0][3])
        return {"RANK": rank, "BLOCK_R": _power(rank), "ITEM": int(attributes["block"]), "CHUNK": CHUNK}


class Keep(Operator):
    """What a head keeps of its items: values [batch, heads, items]."""

    def shapes(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        return [(inputs[0][0], inputs[0][1], int(attributes["slots"]))]

    def launch(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> Launch:
        batch, heads, items = inputs[0]
        return Launch((heads, batch, 1), (heads, items, int(attributes["slots"])))

    def constants(self, inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any], how: Tactic) -> dict[str, Any]:
        from sparsec.plugins.kernels import choose, lists

        block = int(attributes["block"])
        return {
            "P": float(attributes["top_p"]),
            **{name.upper(): int(attributes[name]) for name in ("sinks", "recent", "min_context")},
            "MIN_KEEP": -(-int(attributes["min_keep"]) // block),
            "ITEM": block,
            "TILE": how.keys * how.warps,
            "WAYS": choose.WAYS,
            "PASSES": choose.PASSES,
            "SLACK": lists.SLACK,
        }


_NEAR: dict[str, Kind] = {"window": "int", "sinks": "int", "min_context": "int", "scale": "float", "shares": "int"}
_ROW = {"q": "T", "k": "T", "v": "T"}
_PARTS = {"partial": "float32", "lse": "float32"}
_LISTS = {"lists": "int32", "counts": "int32"}
_SIZES = ("heads", "stores", "slots")
_EVERY = tuple(TACTICS)
_CHOICE: dict[str, Kind] = dict.fromkeys(("sinks", "recent", "min_keep", "min_context", "block", "slots"), "int")
OPERATORS: dict[str, Operator] = {
    each.name: each
    for each in (
        Shares("WindowShares", "near_shares", {**_ROW, "lengths": "int64"}, _SIZES, _PARTS, _NEAR, _EVERY),
        Shares(
            "BesideShares", "near_shares", {**_ROW, "lengths": "int64"}, _SIZES, _PARTS,
            {**_NEAR, "kv_heads": "ints"}, _EVERY,
        ),
        List("ListKept", "list_kept", {"keep": "bool"}, ("slots",), _LISTS, {}, (1, 2)),
        Shares(
            "ListedShares", "listed_shares", {**_ROW, **_LISTS}, (*_SIZES, "sets"), _PARTS,
            {"kv_heads": "ints", "scale": "float", "shares": "int"}, _EVERY,
        ),
        Score(
            "ScoreItems", "score_items", {"queries": "float32", "index": "T", "lengths": "int64"},
            ("heads", "slots", "items"), {"values": "float32"}, {"block": "int", "items": "int"}, (1, 3),
        ),
        Keep(
            "KeepItems", "keep_items", {"values": "float32", "lengths": "int64"}, ("heads", "items", "slots"),
            {"keep": "bool"}, {"top_p": "float", **_CHOICE}, (3, 1),
        ),
        Combine("CombineShares", "combine_shares", {**_PARTS, "like": "T"}, ("shares",), {"out": "T"}, {}, (1,)),
    )
}  # fmt: skip


def runs_of(inputs: Sequence[Sequence[Any]], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    """The KV head of the store that each run of query heads reads; without ``kv_heads`` all, in order."""
    if "kv_heads" in attributes:
        return tuple(int(kv) for kv in attributes["kv_heads"])
    return tuple(range(int(inputs[1][1])))


def compiled(
    operator: Operator,
    floats: str,
    inputs: Sequence[Sequence[Any]],
    attributes: Mapping[str, Any],
    capability: int,
    tactic: int = 0,
) -> Compiled:
    """An operator's kernel for a GPU, which need not be there.

    Args:
        operator: of :data:`OPERATORS`.
        floats: the type of keys and values: ``float32``, ``float16``, ``bfloat16``.
        inputs: shapes of its inputs; batch and slots are not looked at.
        attributes: its attributes.
        capability: compute capability, e.g. 89; of :data:`CAPABILITIES`.
        tactic: of :data:`TACTICS`; 0: the operator's first.

    Raises:
        ValueError: no such capability or tactic.
    """
    tactic = tactic or operator.tactics[0]
    if capability not in CAPABILITIES or tactic not in operator.tactics:
        raise ValueError(f"{operator.name}: no tactic {tactic} for compute capability {capability}")
    constants = operator.constants(inputs, attributes, TACTICS[tactic])
    return _compiled(operator.name, floats, tuple(constants.items()), capability, tactic)


@lru_cache(maxsize=256)
def _compiled(name: str, floats: str, constants: tuple[tuple[str, Any], ...], capability: int, tactic: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparsec.plugins.kernels import engine

    operator, how = OPERATORS[name], TACTICS[tactic]
    taken, left = operator.types(floats)
    signature = dict(zip(operator.inputs, (TYPES[each] for each in taken), strict=True))
    signature |= dict.fromkeys(operator.integers, "i32")
    signature |= dict(zip(operator.outputs, (TYPES[each] for each in left), strict=True))
    kernel = getattr(engine, operator.kernel)
    places = {parameter: place for place, parameter in enumerate(kernel.arg_names)}
    signature = {parameter: signature.get(parameter, "constexpr") for parameter in kernel.arg_names}
    # TensorRT aligns tensors to more than 16 bytes. Of integers nothing is promised.
    aligned = {(places[each],): [["tt.divisibility", 16]] for each, kind in signature.items() if kind.startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(places[each],): value for each, value in constants},
        attrs=aligned,
    )
    options = {"num_warps": how.warps, "num_stages": how.stages, "ptx_version": PTX[capability]}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    entry = str(made.metadata.name)
    parameters = sum(kind != "constexpr" for kind in signature.values())
    return Compiled(entry, only(made.asm["ptx"], entry, parameters), 32 * how.warps, int(made.metadata.shared))


def only(ptx: str, entry: str, count: int) -> str:
    """PTX whose kernel takes ``count`` parameters: Triton's own behind them, of scratch memory, go.

    TensorRT passes what a plugin declares; a kernel with more parameters would read what is not there.

    Raises:
        ValueError: the kernel uses one of them.
    """
    head = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)", ptx, re.DOTALL)
    assert head is not None
    listed = [each.strip() for each in head[1].split(",")]
    for each in listed[count:]:
        if re.search(rf"\[{re.escape(each.split()[-1])}[\]+]", ptx):
            raise ValueError(f"{entry} needs scratch memory, which a plugin of TensorRT does not get")
    kept = ",\n\t".join(listed[:count])
    return ptx[: head.start(1)] + f"\n\t{kept}\n" + ptx[head.end(1) :]


def _tile(dim: int) -> dict[str, int]:
    return {"DIM": dim, "BLOCK_D": max(16, _power(dim))}  # tensor cores multiply no less


def _power(size: int) -> int:
    """The power of two that holds a size."""
    return 1 << (size - 1).bit_length()
