"""Decode attention and choosing divided into the operators that are plugins of TensorRT, each one kernel.

A plugin compiled ahead of time is a single launch, so what takes several is several operators: shares of the keys, and
what combines them. They, too, have bodies of standard operators, so such a graph runs wherever the other one does. What
a share holds is the kernels' business: combined they are the attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsec.export.onnx.functions import DOMAIN, FUNCTIONS, VERSION, function
from sparsec.export.onnx.selection import BLOCKS, FORCED, KEEP_BLOCKS, SCORES, TOKENS
from sparsec.plugins.ahead import NAMESPACE, OPERATORS
from sparsec.plugins.kernels.support import LARGEST_BLOCK, MOST_ITEMS

SHARE = 256  # keys a program, about
MOST = 16  # programs that divide a head's keys
DIVIDED = {"WindowDecode": "WindowShares", "BesideDecode": "BesideShares", "ChosenDecode": "ListedShares"}

SELECTORS = ("SelectTokens", "SelectBlocks")

# All keys as the first share; the others saw nothing.
_FIRST = """
    lse_e = ReduceLogSumExp <keepdims = 0> (seen_logits, minus_a)
    base = Constant <value_float = 1.4426950408889634> ()
    lse_2 = Mul (lse_e, base)
    shares_i = Constant <value_int: int = @shares> ()
    one_y = Constant <value_int = 1> ()
    others = Sub (shares_i, one_y)
    zero_y = Constant <value_ints = [0]> ()
    axis_y = Constant <value_ints = [2]> ()
    others_n = Unsqueeze (others, zero_y)
    pads = Concat <axis = 0> (zero_y, others_n)
    lse = Pad (lse_2, pads, hidden, axis_y)
    out_f = Cast <to = 1> (out)
    nothing_y = Constant <value_float = 0.0> ()
    partial = Pad (out_f, pads, nothing_y, axis_y)
}"""


def _shares(name: str, of: str, inputs: str, attributes: str) -> str:
    """The body of ``of``, whose result and logits are left as shares."""
    body = FUNCTIONS[of].strip()
    inside = body[body.index("{") + 1 : body.rindex("}")]
    return f"\n{name} <{attributes}, shares> ({inputs}) => (partial, lse) {{{inside}{_FIRST}"


def _listed() -> str:
    """ChosenDecode's body from where its list is made; a list's end is known by its count."""
    body = FUNCTIONS["ChosenDecode"]
    attend = body[body.index("    heads_n = Constant") : body.rindex("}")]
    attend = attend.replace("Shape <start = 1, end = 2> (keep)", "Shape <start = 1, end = 2> (lists)")
    start = """
    last_axis = Constant <value_ints = [-1]> ()
    axes_z = Constant <value_ints = [0]> ()
    one_n = Constant <value_ints = [1]> ()
    one_s = Constant <value_int = 1> ()
    zero_s = Constant <value_int = 0> ()
    counts_l = Cast <to = 7> (counts)
    most_a = ReduceMax <keepdims = 0> (counts_l)
    most = Max (most_a, one_s)
    most_n = Unsqueeze (most, axes_z)
    list_axis = Constant <value_ints = [2]> ()
    listed = Cast <to = 7> (lists)
    chosen = Slice (listed, axes_z, most_n, list_axis)
    place = Range (zero_s, most, one_s)
    ends = Unsqueeze (counts_l, list_axis)
    valid = Less (place, ends)
    low_a = Max (chosen, zero_s)
    low = Where (valid, low_a, zero_s)
"""
    head = "ListedShares <kv_heads, scale, shares> (q, k_all, v_all, lists, counts) => (partial, lse)"
    return f"\n{head} {{{start}{attend}{_FIRST}"


BODIES: Mapping[str, str] = {
    "WindowShares": _shares("WindowShares", "WindowDecode", "q, ring, v, lengths", "window, sinks, min_context, scale"),
    "BesideShares": _shares(
        "BesideShares", "BesideDecode", "q, k_all, v_all, lengths", "window, sinks, min_context, scale, kv_heads"
    ),
    "ListedShares": _listed(),
    # keep bool [B, N, C] -> int32 slots [B, N, C], the kept ones first and in order, and int32 counts [B, N].
    "ListKept": """
ListKept (keep) => (lists, counts) {
    keep_i = Cast <to = 7> (keep)
    last_axis = Constant <value_ints = [-1]> ()
    counts_l = ReduceSum <keepdims = 0> (keep_i, last_axis)
    counts = Cast <to = 6> (counts_l)
    axis_c = Constant <value_int = -1> ()
    one_s = Constant <value_int = 1> ()
    zero_s = Constant <value_int = 0> ()
    kept_a = CumSum (keep_i, axis_c)
    kept_b = Sub (kept_a, one_s)
    left_i = Sub (one_s, keep_i)
    left_a = CumSum (left_i, axis_c)
    left_b = Sub (left_a, one_s)
    counts_c = Unsqueeze (counts_l, last_axis)
    left = Add (left_b, counts_c)
    place = Where (keep, kept_b, left)
    slots_n = Shape <start = 2, end = 3> (keep)
    slots_s = Squeeze (slots_n)
    slot = Range (zero_s, slots_s, one_s)
    keep_zero = Sub (keep_i, keep_i)
    slots = Add (keep_zero, slot)
    listed = ScatterElements <axis = -1> (keep_zero, place, slots)
    lists = Cast <to = 6> (listed)
}""",
    # Step 1 of the selector and the mass of its items, of ``block`` tokens each: values float32 [B, H, items], whose
    # weights are their softmax.
    "ScoreItems": f"""
ScoreItems <block, items> (queries, index, lengths) => (values) {{
    {SCORES}
    {BLOCKS}
    padded = Pad (seen_scores, pads, hidden, pad_axis)
    in_blocks = Reshape (padded, to_blocks)
    values = ReduceLogSumExp <keepdims = 0> (in_blocks, minus_l)
}}""",
    # Steps 3 to 8 by the items' values: keep bool [B, H, slots].
    "KeepItems": f"""
KeepItems <top_p, sinks, recent, min_keep, min_context, block, slots> (values, lengths) => (keep) {{
    slots_s = Constant <value_int: int = @slots> ()
    axes_s = Constant <value_ints = [0]> ()
    slots_n = Unsqueeze (slots_s, axes_s)
    {TOKENS}
    {FORCED}
    {BLOCKS}
    weights = Softmax <axis = -1> (values)
    {KEEP_BLOCKS}
}}""",
    # partial float32 [B, H, S, D], lse float32 [B, H, S] in units of log 2, q [B, H, 1, D].
    "CombineShares": """
CombineShares (partial, lse, q) => (out) {
    last_axis = Constant <value_ints = [-1]> ()
    top = ReduceMax <keepdims = 1> (lse, last_axis)
    apart = Sub (lse, top)
    two = Constant <value_float = 2.0> ()
    weights = Pow (two, apart)
    total = ReduceSum <keepdims = 1> (weights, last_axis)
    shares = Div (weights, total)
    row_axis = Constant <value_ints = [2]> ()
    row = Unsqueeze (shares, row_axis)
    mean = MatMul (row, partial)
    out = CastLike (mean, q)
}""",
}


def divide(model: Any, slots: int) -> None:
    """Put the operators that are plugins in place of a decode graph's attention, and of its choosing where they can.

    They stand in the graph itself: in the body of a function TensorRT's parser does not look for plugins.

    Args:
        model: the graph with its functions; changed.
        slots: of full KV heads.
    """
    from onnx import helper

    nodes = []
    for node in model.graph.node:
        given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.domain == DOMAIN and node.op_type in DIVIDED:
            nodes += _attention(node, given, slots)
        elif node.domain == DOMAIN and _chooses(node.op_type, given, slots):
            nodes += _choice(node, {"block": 1, **given, "slots": slots})
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {node.op_type for node in nodes if node.domain == DOMAIN}
    del model.functions[:]
    model.functions.extend(function(name, {**FUNCTIONS, **BODIES}) for name in sorted(used))


def _node(name: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    from onnx import helper

    plugin = {"plugin_namespace": NAMESPACE, "plugin_version": str(VERSION), "aot": 1}
    return helper.make_node(name, inputs, outputs, f"{outputs[0]}.{name}", None, DOMAIN, **attributes, **plugin)


def _attention(node: Any, given: Mapping[str, Any], slots: int) -> list[Any]:
    """What attends, as shares and what combines them."""
    reach = max(given.get("window", 0) + given.get("sinks", 0), given.get("min_context", 0)) or slots
    (out,), (*row, last) = node.output, node.input
    parts, name = [f"{out}.partial", f"{out}.lse"], DIVIDED[node.op_type]
    own = {each: given[each] for each in OPERATORS[name].attributes if each in given}
    own["shares"] = min(MOST, -(-min(reach, slots) // SHARE))
    combine = _node("CombineShares", [*parts, node.input[0]], [out])
    if name != "ListedShares":
        return [_node(name, [*row, last], parts, **own), combine]
    lists = [f"{out}.lists", f"{out}.counts"]
    return [_node("ListKept", [last], lists), _node(name, [*row, *lists], parts, **own), combine]


def _chooses(name: str, given: Mapping[str, Any], slots: int) -> bool:
    """A selector that the kernels can be: blocks of 1, 2, 4 ... tokens, and not too many."""
    block = int(given.get("block", 1))
    return name in SELECTORS and not block & (block - 1) and block <= LARGEST_BLOCK and slots <= MOST_ITEMS * block


def _choice(node: Any, given: Mapping[str, Any]) -> list[Any]:
    """What chooses, as items that are scored and what keeps some."""
    (out,), lengths = node.output, node.input[2]
    values, own = f"{out}.values", {each: given[each] for each in OPERATORS["KeepItems"].attributes}
    items = -(-given["slots"] // given["block"])
    scored = _node("ScoreItems", node.input, [values], block=given["block"], items=items)
    return [scored, _node("KeepItems", [values, lengths], [out], **own)]
