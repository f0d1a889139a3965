"""Bodies of the selector's operators, steps 1 to 8 of the execution contract; words as in :mod:`.functions`."""

from __future__ import annotations

from sparsec.plugins.selector import TIE

# Tokens j, [C] of ``slots_s``, that the row t sees and has to keep: visible and token_forced [B, 1, C].
TOKENS = """
    zero_s = Constant <value_int = 0> ()
    one_s = Constant <value_int = 1> ()
    j = Range (zero_s, slots_s, one_s)
    axes_t = Constant <value_ints = [1, 2]> ()
    t = Unsqueeze (lengths, axes_t)
    visible = LessOrEqual (j, t)
"""
FORCED = """
    sinks_i = Constant <value_int: int = @sinks> ()
    recent_i = Constant <value_int: int = @recent> ()
    distance = Sub (t, j)
    in_sinks = Less (j, sinks_i)
    in_recent = Less (distance, recent_i)
    token_forced_a = Or (in_sinks, in_recent)
    token_forced = And (token_forced_a, visible)
"""

# Step 1 of the selector: scores, minus infinity where a token is not visible, [B, H, C].
SCORES = f"""
    slots_n = Shape <start = 2, end = 3> (index)
    slots_s = Squeeze (slots_n)
    {TOKENS}
    keys = Cast <to = 1> (index)
    keys_turned = Transpose <perm = [0, 1, 3, 2]> (keys)
    row_scores = MatMul (queries, keys_turned)
    axes_m = Constant <value_ints = [2]> ()
    scores = Squeeze (row_scores, axes_m)
    hidden = Constant <value_float = -inf> ()
    seen_scores = Where (visible, scores, hidden)
"""

# Step 2: weights of all visible tokens, [B, H, C].
_WEIGHTS = f"""
    {SCORES}
    token_weights = Softmax <axis = -1> (seen_scores)
    {FORCED}
"""

# Steps 3 to 6 over the items of ``weights`` [B, H, n] and ``forced`` [B, 1, n]; ``least``: the floor, int64 [1].
_TOP_P = f"""
    last_axis = Constant <value_ints = [-1]> ()
    items_n = Shape <start = 2, end = 3> (weights)
    ranked, ranks = TopK <axis = -1> (weights, items_n)
    axis_c = Constant <value_int = -1> ()
    before = CumSum <exclusive = 1> (ranked, axis_c)
    p = Constant <value_float: float = @top_p> ()
    below = Less (before, p)
    below_i = Cast <to = 7> (below)
    count_a = ReduceSum <keepdims = 1> (below_i, last_axis)
    one_c = Constant <value_int = 1> ()
    count = Max (count_a, one_c)
    edge_at = Sub (count, one_c)
    edge = GatherElements <axis = -1> (ranked, edge_at)
    slack = Constant <value_float = {1 - TIE!r}> ()
    edge_low = Mul (edge, slack)
    crossed = GreaterOrEqual (weights, edge_low)
    full_p = Constant <value_float = 1.0> ()
    every = GreaterOrEqual (p, full_p)
    kept_p = Or (crossed, every)
    nothing = Constant <value_float = 0.0> ()
    free = Where (forced, nothing, weights)
    one_l = Constant <value_ints = [1]> ()
    least_a = Min (least, items_n)
    floor_k = Max (least_a, one_l)
    largest, largest_at = TopK <axis = -1> (free, floor_k)
    floor_place = Sub (floor_k, one_l)
    floor_edge = Gather <axis = 2> (largest, floor_place)
    floor_low = Mul (floor_edge, slack)
    in_floor_a = GreaterOrEqual (free, floor_low)
    some = Greater (free, nothing)
    zero_l = Constant <value_ints = [0]> ()
    wanted = Greater (least, zero_l)
    in_floor_b = And (in_floor_a, some)
    in_floor = And (in_floor_b, wanted)
    kept_a = Or (kept_p, in_floor)
    kept = Or (kept_a, forced)
"""

# Step 8, and what the row cannot see goes.
_KEEP = """
    context_i = Constant <value_int: int = @min_context> ()
    short = Less (t, context_i)
    kept_all = Or (token_kept, short)
    keep = And (kept_all, visible)
"""

# How tokens become blocks of ``block``: what is missing behind them, ``pads``, and the shape ``to_blocks``.
BLOCKS = """
    block_s = Constant <value_int: int = @block> ()
    axes_z = Constant <value_ints = [0]> ()
    block_n = Unsqueeze (block_s, axes_z)
    zeros_l = Constant <value_ints = [0]> ()
    minus_l = Constant <value_ints = [-1]> ()
    negative = Neg (slots_n)
    behind = Mod (negative, block_n)
    pad_axis = Constant <value_ints = [2]> ()
    pads = Concat <axis = 0> (zeros_l, behind)
    to_blocks = Concat <axis = 0> (zeros_l, zeros_l, minus_l, block_n)
"""

# Steps 3 to 8 by the blocks' weights.
KEEP_BLOCKS = f"""
    no_weight = Constant <value_float = 0.0> ()
    forced_f = Cast <to = 1> (token_forced)
    padded_f = Pad (forced_f, pads, no_weight, pad_axis)
    in_blocks_f = Reshape (padded_f, to_blocks)
    forced_b = ReduceMax <keepdims = 0> (in_blocks_f, minus_l)
    forced = Greater (forced_b, no_weight)
    least_s = Constant <value_int: int = @min_keep> ()
    least_o = Add (least_s, block_s)
    one_k = Constant <value_int = 1> ()
    least_b = Sub (least_o, one_k)
    least_c = Div (least_b, block_s)
    least = Unsqueeze (least_c, axes_z)
    {_TOP_P}
    kept_l = Unsqueeze (kept, minus_l)
    ones_l = Constant <value_ints = [1]> ()
    spread = Concat <axis = 0> (ones_l, ones_l, ones_l, block_n)
    kept_x = Expand (kept_l, spread)
    flat = Concat <axis = 0> (zeros_l, zeros_l, minus_l)
    kept_t = Reshape (kept_x, flat)
    token_kept = Slice (kept_t, zeros_l, slots_n, pad_axis)
    {_KEEP}
"""

SELECTION = {
    # What a decode row of each retrieval head keeps, by tokens: queries float32 [B, H, 1, R], index [B, H, C, R];
    # keep bool [B, H, C].
    "SelectTokens": f"""
SelectTokens <top_p, sinks, recent, min_keep, min_context> (queries, index, lengths) => (keep) {{
    {_WEIGHTS}
    weights = Identity (token_weights)
    forced = Identity (token_forced)
    least_s = Constant <value_int: int = @min_keep> ()
    axes_z = Constant <value_ints = [0]> ()
    least = Unsqueeze (least_s, axes_z)
    {_TOP_P}
    token_kept = Identity (kept)
    {_KEEP}
}}""",
    # The same by blocks of ``block`` tokens.
    "SelectBlocks": f"""
SelectBlocks <top_p, sinks, recent, min_keep, min_context, block> (queries, index, lengths) => (keep) {{
    {_WEIGHTS}
    {BLOCKS}
    nothing_b = Constant <value_float = 0.0> ()
    padded = Pad (token_weights, pads, nothing_b, pad_axis)
    in_blocks = Reshape (padded, to_blocks)
    weights = ReduceSum <keepdims = 0> (in_blocks, minus_l)
    {KEEP_BLOCKS}
}}""",
    # One set for a layer, the union over its heads: [B, H, C] -> [B, 1, C].
    "Union": """
Union (keep) => (every) {
    keep_i = Cast <to = 6> (keep)
    axes_h = Constant <value_ints = [1]> ()
    some_i = ReduceMax <keepdims = 1> (keep_i, axes_h)
    every = Cast <to = 9> (some_i)
}""",
}
