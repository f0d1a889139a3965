"""The operators of the domain ``ai.sparsec`` as ONNX functions: the execution contract in standard operators.

A runtime that knows an operator by name runs its own kernel, every other one the body, so plain ONNX Runtime runs the
file. Shapes: B sequences, H query heads, K KV heads of which query heads are equal runs, T rows, C slots of a cache,
D dimensions of a head. Token n of a full KV head is in slot n; of a local one in slot n if n < sinks, else in
``sinks + (n - sinks) mod ring``, C = sinks + ring. ``lengths``, int64 [B]: tokens stored before this call, so row i is
token ``lengths + i``; ``added``, int64 [B]: real rows of this call, padding stands behind them, and what its rows
compute is garbage. Softmax is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from sparsec.export.onnx.experts import EXPERTS
from sparsec.export.onnx.indexing import INDEXING
from sparsec.export.onnx.selection import SELECTION

if TYPE_CHECKING:
    import onnx

DOMAIN = "ai.sparsec"
VERSION = 1
OPSET = 24  # TensorScatter is new in it
IR = 11

# Which tokens lie in the slots of a ring that holds ``held`` tokens; negative: none. A ring slot's token is the newest
# one that belongs there: held - 1 - (held - 1 - slot) mod ring, where that is no sink.
_RING_TOKENS = """
    one_i = Constant <value_ints = [1]> ()
    slots_n = Shape <start = 2, end = 3> (ring)
    zero_s = Constant <value_int = 0> ()
    one_s = Constant <value_int = 1> ()
    slots_s = Squeeze (slots_n)
    slot = Range (zero_s, slots_s, one_s)
    sinks_i = Constant <value_int: int = @sinks> ()
    ring_i = Sub (slots_s, sinks_i)
    held_c = Unsqueeze (held, one_i)
    last = Sub (held_c, one_s)
    behind = Sub (last, slot)
    back = Mod (behind, ring_i)
    newest = Sub (last, back)
    is_sink = Less (slot, sinks_i)
    sink_there = Less (slot, held_c)
    none = Constant <value_int = -1> ()
    sink_token = Where (sink_there, slot, none)
    no_sink = GreaterOrEqual (newest, sinks_i)
    ring_token = Where (no_sink, newest, none)
    token = Where (is_sink, sink_token, ring_token)
"""

# Softmax attention of q over k and v under a mask that broadcasts to [B, H, T, C]; q's heads are runs on k's.
_ATTEND = """
    zero_a = Constant <value_ints = [0]> ()
    minus_a = Constant <value_ints = [-1]> ()
    k_heads = Shape <start = 1, end = 2> (k)
    q_dims = Shape <start = 1> (q)
    dim = Shape <start = 3> (q)
    to_runs = Concat <axis = 0> (zero_a, k_heads, minus_a, dim)
    runs = Reshape (q, to_runs)
    scale_f = Constant <value_float: float = @scale> ()
    scale_q = CastLike (scale_f, q)
    scaled = Mul (runs, scale_q)
    k_turned = Transpose <perm = [0, 1, 3, 2]> (k)
    run_logits = MatMul (scaled, k_turned)
    q_rows = Shape <start = 1, end = 3> (q)
    to_heads = Concat <axis = 0> (zero_a, q_rows, minus_a)
    raw_logits = Reshape (run_logits, to_heads)
    logits = Cast <to = 1> (raw_logits)
    hidden = Constant <value_float = -inf> ()
    seen_logits = Where (mask, logits, hidden)
    weights_f = Softmax <axis = -1> (seen_logits)
    weights = CastLike (weights_f, v)
    run_shape = Shape (run_logits)
    run_weights = Reshape (weights, run_shape)
    run_out = MatMul (run_weights, v)
    to_out = Concat <axis = 0> (zero_a, q_dims)
    out = Reshape (run_out, to_out)
"""

# Does row t see token j: 0 <= j <= t, and t - j < window, or j < sinks, or t < min_context. t [B, T, 1], j [.., .., C].
_SEEN = """
    window_i = Constant <value_int: int = @window> ()
    sinks_n = Constant <value_int: int = @sinks> ()
    context_i = Constant <value_int: int = @min_context> ()
    zero_n = Constant <value_int = 0> ()
    there = GreaterOrEqual (j, zero_n)
    past = LessOrEqual (j, t)
    causal = And (there, past)
    distance = Sub (t, j)
    in_window = Less (distance, window_i)
    in_sinks = Less (j, sinks_n)
    short = Less (t, context_i)
    near_a = Or (in_window, in_sinks)
    near = Or (near_a, short)
"""
_NEAR = f"""
    {_SEEN}
    seen = And (causal, near)
    one_m = Constant <value_ints = [1]> ()
    mask = Unsqueeze (seen, one_m)
"""

# Token numbers of a call's rows, [B, T, 1].
_ROWS = """
    rows_n = Shape <start = 2, end = 3> (q)
    rows_s = Squeeze (rows_n)
    zero_r = Constant <value_int = 0> ()
    one_r = Constant <value_int = 1> ()
    row = Range (zero_r, rows_s, one_r)
    axes_r = Constant <value_ints = [1]> ()
    lengths_c = Unsqueeze (lengths, axes_r)
    rows_t = Add (lengths_c, row)
    axes_t = Constant <value_ints = [2]> ()
    t = Unsqueeze (rows_t, axes_t)
"""

# Rows of new [B, K, T, D] by number, row int64 [B, C]: taken [B, K, C, D].
_TAKE = """
    axes_n = Constant <value_ints = [-1]> ()
    row_n = Unsqueeze (row, axes_n)
    new_rows = Transpose <perm = [0, 2, 1, 3]> (new)
    taken_rows = GatherND <batch_dims = 1> (new_rows, row_n)
    taken = Transpose <perm = [0, 2, 1, 3]> (taken_rows)
"""

# Rows of k and v at ``at``, int64 [B, N, n] slots of the KV heads ``kv_heads`` [N]: k_near, v_near [B, N, n, D].
_PICK = """
    heads_v = Constant <value_ints: ints = @kv_heads> ()
    axes_h = Constant <value_ints = [0, 2]> ()
    heads_c = Unsqueeze (heads_v, axes_h)
    at_zero = Sub (at, at)
    heads_at = Add (at_zero, heads_c)
    axes_l = Constant <value_ints = [-1]> ()
    at_l = Unsqueeze (at, axes_l)
    heads_l = Unsqueeze (heads_at, axes_l)
    both = Concat <axis = -1> (heads_l, at_l)
    k_near = GatherND <batch_dims = 1> (k_all, both)
    v_near = GatherND <batch_dims = 1> (v_all, both)
"""

FUNCTIONS = {
    # New tokens of full KV heads, or index keys: cache [B, K, C, D], new [B, K, T, D]; lengths + T <= C.
    "CacheUpdate": """
CacheUpdate (cache, new, lengths) => (present) {
    present = TensorScatter <axis = -2, mode = "linear"> (cache, new, lengths)
}""",
    # The same, by a choice of every slot. A prompt's index keys, which nothing else in its graph reads: TensorRT-RTX
    # fails on several TensorScatter of such ("uses before defs").
    "IndexUpdate": f"""
IndexUpdate (cache, new, lengths) => (present) {{
    zero_s = Constant <value_int = 0> ()
    one_s = Constant <value_int = 1> ()
    slots_n = Shape <start = 2, end = 3> (cache)
    slots_s = Squeeze (slots_n)
    slot = Range (zero_s, slots_s, one_s)
    one_i = Constant <value_ints = [1]> ()
    lengths_c = Unsqueeze (lengths, one_i)
    place = Sub (slot, lengths_c)
    rows_n = Shape <start = 2, end = 3> (new)
    rows_s = Squeeze (rows_n)
    behind = GreaterOrEqual (place, zero_s)
    before = Less (place, rows_s)
    fresh = And (behind, before)
    last = Sub (rows_s, one_s)
    place_a = Min (place, last)
    row = Max (place_a, zero_s)
    {_TAKE}
    axes_e = Constant <value_ints = [1, 3]> ()
    fresh_e = Unsqueeze (fresh, axes_e)
    present = Where (fresh_e, taken, cache)
}}""",
    # One new token of local KV heads: ring [B, K, C, D], new [B, K, 1, D].
    "RingWrite": """
RingWrite <sinks> (ring, new, lengths) => (present) {
    slots_n = Shape <start = 2, end = 3> (ring)
    sinks_i = Constant <value_int: int = @sinks> ()
    size = Sub (slots_n, sinks_i)
    far = Sub (lengths, sinks_i)
    turn = Mod (far, size)
    ring_slot = Add (turn, sinks_i)
    early = Less (lengths, sinks_i)
    slot = Where (early, lengths, ring_slot)
    present = TensorScatter <axis = -2, mode = "linear"> (ring, new, slot)
}""",
    # Several new tokens of local KV heads, ``added`` of them real: new [B, K, T, D].
    "RingUpdate": f"""
RingUpdate <sinks> (ring, new, lengths, added) => (present) {{
    held = Add (lengths, added)
    {_RING_TOKENS}
    lengths_c = Unsqueeze (lengths, one_i)
    fresh = GreaterOrEqual (token, lengths_c)
    place = Sub (token, lengths_c)
    row = Max (place, zero_s)
    {_TAKE}
    axes_e = Constant <value_ints = [1, 3]> ()
    fresh_e = Unsqueeze (fresh, axes_e)
    present = Where (fresh_e, taken, ring)
}}""",
    # Local heads of a prompt: the ring as it was, and the call's own keys. q [B, H, T, D], new_k, new_v [B, K, T, D].
    "WindowAttention": f"""
WindowAttention <window, sinks, min_context, scale> (q, ring, ring_v, new_k, new_v, lengths) => (out) {{
    held = Identity (lengths)
    {_RING_TOKENS}
    {_ROWS}
    tokens_c = Concat <axis = 1> (token, rows_t)
    j = Unsqueeze (tokens_c, one_i)
    k = Concat <axis = 2> (ring, new_k)
    v = Concat <axis = 2> (ring_v, new_v)
    {_NEAR}
    {_ATTEND}
}}""",
    # Local heads of one decode row, whose own token is in the ring already. q [B, H, 1, D].
    "WindowDecode": f"""
WindowDecode <window, sinks, min_context, scale> (q, ring, v, lengths) => (out) {{
    one_h = Constant <value_int = 1> ()
    held = Add (lengths, one_h)
    {_RING_TOKENS}
    j = Unsqueeze (token, one_i)
    axes_t = Constant <value_ints = [1, 2]> ()
    t = Unsqueeze (lengths, axes_t)
    k = Identity (ring)
    {_NEAR}
    {_ATTEND}
}}""",
    # Rows on full KV heads: everything up to the row, or a window of it where a query head's entry of ``local`` is 1; a
    # single entry is for all heads. q [B, H, T, D], k, v [B, K, C, D].
    "CausalAttention": f"""
CausalAttention <window, sinks, min_context, scale, local> (q, k, v, lengths) => (out) {{
    {_ROWS}
    slots_n = Shape <start = 2, end = 3> (k)
    slots_s = Squeeze (slots_n)
    j = Range (zero_r, slots_s, one_r)
    {_SEEN}
    heads_v = Constant <value_ints: ints = @local> ()
    heads_b = Cast <to = 9> (heads_v)
    heads_all = Not (heads_b)
    axes_h = Constant <value_ints = [1, 2]> ()
    heads_c = Unsqueeze (heads_all, axes_h)
    one_m = Constant <value_ints = [1]> ()
    near_h = Unsqueeze (near, one_m)
    causal_h = Unsqueeze (causal, one_m)
    wanted = Or (near_h, heads_c)
    mask = And (causal_h, wanted)
    {_ATTEND}
}}""",
    # One decode row of all query heads on full KV heads, under a mask: where gathering what is kept costs more than
    # it saves. ``sets``: by query head, its set in keep, bool [B, S, C]; -1: sinks and window. q [B, H, 1, D].
    "MaskedDecode": f"""
MaskedDecode <window, sinks, min_context, scale, sets> (q, k, v, keep, lengths) => (out) {{
    axes_t = Constant <value_ints = [1, 2]> ()
    t = Unsqueeze (lengths, axes_t)
    slots_n = Shape <start = 2, end = 3> (k)
    slots_s = Squeeze (slots_n)
    zero_j = Constant <value_int = 0> ()
    one_j = Constant <value_int = 1> ()
    j = Range (zero_j, slots_s, one_j)
    {_SEEN}
    seen_near = And (causal, near)
    sets_v = Constant <value_ints: ints = @sets> ()
    sets_low = Max (sets_v, zero_j)
    kept = Gather <axis = 1> (keep, sets_low)
    some = Less (sets_v, zero_j)
    axes_s = Constant <value_ints = [1]> ()
    local = Unsqueeze (some, axes_s)
    by_window = And (local, seen_near)
    others = Not (local)
    by_choice = And (others, kept)
    wanted = Or (by_window, by_choice)
    axes_m = Constant <value_ints = [2]> ()
    mask = Unsqueeze (wanted, axes_m)
    {_ATTEND}
}}""",
    # One decode row of local heads on full KV heads: sinks and window are read out of the store.
    # q [B, N * G, 1, D]; ``kv_heads``: the KV head of k and v that each of N runs of query heads reads.
    "BesideDecode": f"""
BesideDecode <window, sinks, min_context, scale, kv_heads> (q, k_all, v_all, lengths) => (out) {{
    axes_t = Constant <value_ints = [1, 2]> ()
    t = Unsqueeze (lengths, axes_t)
    window_b = Constant <value_int: int = @window> ()
    sinks_b = Constant <value_int: int = @sinks> ()
    context_b = Constant <value_int: int = @min_context> ()
    reach = Add (window_b, sinks_b)
    most = Max (reach, context_b)
    slots_n = Shape <start = 2, end = 3> (k_all)
    slots_s = Squeeze (slots_n)
    read = Min (most, slots_s)
    zero_b = Constant <value_int = 0> ()
    one_b = Constant <value_int = 1> ()
    place = Range (zero_b, read, one_b)
    held = Add (t, one_b)
    over_a = Sub (held, read)
    over = Max (over_a, zero_b)
    moved = Add (place, over)
    first = Less (place, sinks_b)
    token = Where (first, place, moved)
    j = Identity (token)
    {_NEAR}
    heads_n = Constant <value_ints: ints = @kv_heads> ()
    heads_z = Sub (heads_n, heads_n)
    axes_z = Constant <value_ints = [0, 2]> ()
    heads_zc = Unsqueeze (heads_z, axes_z)
    at = Add (token, heads_zc)
    {_PICK}
    k = Identity (k_near)
    v = Identity (v_near)
    {_ATTEND}
}}""",
    # A prompt's rows on what each of them keeps: q [B, H, T, D], k, v [B, K, C, D], keep bool [B, T, C].
    "KeptAttention": f"""
KeptAttention <scale> (q, k, v, keep) => (out) {{
    axes_m = Constant <value_ints = [1]> ()
    mask = Unsqueeze (keep, axes_m)
    {_ATTEND}
}}""",
    # One decode row, exactly, on what is kept, and on nothing else: q [B, N * G, 1, D], k_all, v_all [B, K, C, D],
    # keep bool [B, 1 or N, C]. Kept slots are listed in order of time, short lists end in -1.
    "ChosenDecode": f"""
ChosenDecode <kv_heads, scale> (q, k_all, v_all, keep) => (out) {{
    keep_i = Cast <to = 7> (keep)
    last_axis = Constant <value_ints = [-1]> ()
    counts = ReduceSum <keepdims = 0> (keep_i, last_axis)
    most_a = ReduceMax <keepdims = 0> (counts)
    one_s = Constant <value_int = 1> ()
    most = Max (most_a, one_s)
    axis_c = Constant <value_int = -1> ()
    place_a = CumSum (keep_i, axis_c)
    place_b = Sub (place_a, one_s)
    place = Where (keep, place_b, most)
    slots_n = Shape <start = 2, end = 3> (keep)
    slots_s = Squeeze (slots_n)
    zero_s = Constant <value_int = 0> ()
    slot = Range (zero_s, slots_s, one_s)
    keep_zero = Sub (keep_i, keep_i)
    slots = Add (keep_zero, slot)
    axes_z = Constant <value_ints = [0]> ()
    one_n = Constant <value_ints = [1]> ()
    most_n = Unsqueeze (most, axes_z)
    room = Add (most_n, one_n)
    rows_n = Shape <start = 0, end = 2> (keep)
    list_shape = Concat <axis = 0> (rows_n, room)
    none = Constant <value_int = -1> ()
    empty = Expand (none, list_shape)
    listed = ScatterElements <axis = -1> (empty, place, slots)
    list_axis = Constant <value_ints = [2]> ()
    chosen = Slice (listed, axes_z, most_n, list_axis)
    valid = GreaterOrEqual (chosen, zero_s)
    low = Max (chosen, zero_s)
    heads_n = Constant <value_ints: ints = @kv_heads> ()
    heads_z = Sub (heads_n, heads_n)
    axes_b = Constant <value_ints = [0, 2]> ()
    heads_zc = Unsqueeze (heads_z, axes_b)
    at = Add (low, heads_zc)
    {_PICK}
    k = Identity (k_near)
    v = Identity (v_near)
    mask_a = Unsqueeze (valid, list_axis)
    sets_n = Shape <start = 1, end = 2> (keep)
    q_heads = Shape <start = 1, end = 2> (q)
    sets_one = Equal (sets_n, one_n)
    per_set = Div (q_heads, sets_n)
    times = Where (sets_one, one_n, per_set)
    mask_e = Unsqueeze (mask_a, list_axis)
    spread = Concat <axis = 0> (one_n, one_n, times, one_n, one_n)
    mask_x = Expand (mask_e, spread)
    to_mask = Concat <axis = 0> (axes_z, last_axis, one_n, most_n)
    mask = Reshape (mask_x, to_mask)
    {_ATTEND}
}}""",
}
FUNCTIONS |= SELECTION | INDEXING | EXPERTS


def function(name: str, bodies: Mapping[str, str] = FUNCTIONS) -> onnx.FunctionProto:
    """The function of an operator of ours, checked by onnx's parser."""
    return _parsed(bodies[name])


@cache
def _parsed(body: str) -> onnx.FunctionProto:
    from onnx import parser

    return parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>{body}')


def with_functions(model: Any) -> None:
    """Add to a model the bodies of the operators that it uses."""
    used = sorted({node.op_type for node in model.graph.node if node.domain == DOMAIN})
    del model.functions[:]
    model.functions.extend(function(name) for name in used)
