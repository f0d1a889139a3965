"""Bodies of the operators by which a model's own indexers choose (DSA), with HISA and MISA.

Words as in :mod:`.functions`. An indexer has H heads of D dimensions: q float32 [B, T, H, D] and w float32 [B, T, H],
scales inside, index [B, 1, C, D]. Scores are float32 [B, T, C], minus infinity where a row may not look. Token n is in
slot n of every sequence, so blocks begin at its first token. What is left out is masked, not skipped.
"""

from __future__ import annotations

# Numbers of a call's tokens, t [B, T], of ``rows_n`` rows.
_TOKENS = """
    zero_r = Constant <value_int = 0> ()
    one_r = Constant <value_int = 1> ()
    rows_s = Squeeze (rows_n)
    row = Range (zero_r, rows_s, one_r)
    axes_r = Constant <value_ints = [1]> ()
    lengths_c = Unsqueeze (lengths, axes_r)
    t = Add (lengths_c, row)
"""

# Per head ReLU(q . mean key) of every block, ``found`` [B, T, H, n], where a row's own block is pooled up to the row;
# which blocks begin at or before the row, ``begun`` [B, T, 1, n]; which is its own, ``is_own``; and ``blocks`` [n].
_POOLED = f"""
    rows_n = Shape <start = 1, end = 2> (q)
    {_TOKENS}
    block_s = Constant <value_int: int = @block> ()
    zeros_l = Constant <value_ints = [0]> ()
    minus_l = Constant <value_ints = [-1]> ()
    block_n = Unsqueeze (block_s, zeros_l)
    slots_n = Shape <start = 2, end = 3> (index)
    dim_n = Shape <start = 3> (index)
    negative = Neg (slots_n)
    missing = Mod (negative, block_n)
    pads = Concat <axis = 0> (zeros_l, missing)
    nothing = Constant <value_float = 0.0> ()
    pad_axis = Constant <value_ints = [2]> ()
    keys = Cast <to = 1> (index)
    padded = Pad (keys, pads, nothing, pad_axis)
    to_blocks = Concat <axis = 0> (zeros_l, minus_l, block_n, dim_n)
    in_blocks = Reshape (padded, to_blocks)
    axis_c = Constant <value_int = 2> ()
    sums = CumSum (in_blocks, axis_c)
    last_s = Sub (block_s, one_r)
    totals = Gather <axis = 2> (sums, last_s)
    block_f = Cast <to = 1> (block_s)
    whole = Div (totals, block_f)
    own = Div (t, block_s)
    to_tokens = Concat <axis = 0> (zeros_l, minus_l, dim_n)
    upto = Reshape (sums, to_tokens)
    t_l = Unsqueeze (t, minus_l)
    part = GatherND <batch_dims = 1> (upto, t_l)
    begin = Mul (own, block_s)
    before = Sub (t, begin)
    count_i = Add (before, one_r)
    count = Cast <to = 1> (count_i)
    count_l = Unsqueeze (count, minus_l)
    partial = Div (part, count_l)
    whole_turned = Transpose <perm = [0, 2, 1]> (whole)
    whole_rows = Unsqueeze (whole_turned, axes_r)
    far_a = MatMul (q, whole_rows)
    far = Relu (far_a)
    partial_l = Unsqueeze (partial, minus_l)
    near_a = MatMul (q, partial_l)
    near = Relu (near_a)
    blocks_n = Shape <start = 1, end = 2> (whole)
    blocks_s = Squeeze (blocks_n)
    blocks = Range (zero_r, blocks_s, one_r)
    axes_o = Constant <value_ints = [2, 3]> ()
    own_e = Unsqueeze (own, axes_o)
    is_own = Equal (blocks, own_e)
    found = Where (is_own, near, far)
    begun = LessOrEqual (blocks, own_e)
"""


def _best(attribute: str, kept: str) -> str:
    """``kept`` [B, T, C]: tokens of a row's best ``scores``, so many as the attribute says, or all that it may see."""
    return f"""
    slots_n = Shape <start = 2, end = 3> (scores)
    zeros_l = Constant <value_ints = [0]> ()
    wanted_s = Constant <value_int: int = @{attribute}> ()
    wanted = Unsqueeze (wanted_s, zeros_l)
    most = Min (wanted, slots_n)
    best, best_at = TopK <axis = -1> (scores, most)
    hidden = Constant <value_float = -inf> ()
    there = Greater (best, hidden)
    never = Less (scores, scores)
    {kept} = ScatterElements <axis = -1> (never, best_at, there)
"""


INDEXING = {
    # I of every token that a row sees; the heads of q and w may be some.
    "IndexScores": f"""
IndexScores (q, w, index, lengths) => (scores) {{
    rows_n = Shape <start = 1, end = 2> (q)
    {_TOKENS}
    keys = Cast <to = 1> (index)
    keys_turned = Transpose <perm = [0, 1, 3, 2]> (keys)
    hits_a = MatMul (q, keys_turned)
    hits = Relu (hits_a)
    axes_w = Constant <value_ints = [2]> ()
    w_row = Unsqueeze (w, axes_w)
    total_row = MatMul (w_row, hits)
    total = Squeeze (total_row, axes_w)
    slots_n = Shape <start = 2, end = 3> (index)
    slots_s = Squeeze (slots_n)
    j = Range (zero_r, slots_s, one_r)
    t_e = Unsqueeze (t, axes_w)
    visible = LessOrEqual (j, t_e)
    hidden = Constant <value_float = -inf> ()
    scores = Where (visible, total, hidden)
}}""",
    # HISA: scores stand in each row's best blocks by all heads, in the first block and in the row's own.
    "InBlocks": f"""
InBlocks <block, top_blocks> (q, w, index, scores, lengths) => (inside) {{
    {_POOLED}
    w_row = Unsqueeze (w, pad_axis)
    ranks_row = MatMul (w_row, found)
    hidden = Constant <value_float = -inf> ()
    begun_ranks = Where (begun, ranks_row, hidden)
    ranks = Squeeze (begun_ranks, pad_axis)
    top_s = Constant <value_int: int = @top_blocks> ()
    top_n = Unsqueeze (top_s, zeros_l)
    most = Min (top_n, blocks_n)
    best, best_at = TopK <axis = -1> (ranks, most)
    there = Greater (best, hidden)
    never = Less (ranks, ranks)
    ranked = ScatterElements <axis = -1> (never, best_at, there)
    own_block = Squeeze (is_own, pad_axis)
    is_first = Equal (blocks, zero_r)
    forced = Or (own_block, is_first)
    kept = Or (ranked, forced)
    slots_s = Squeeze (slots_n)
    slot = Range (zero_r, slots_s, one_r)
    block_of = Div (slot, block_s)
    competes = Gather <axis = 2> (kept, block_of)
    inside = Where (competes, scores, hidden)
}}""",
    # MISA: each row's best heads, int64 [B, T, heads].
    "RouteHeads": f"""
RouteHeads <block, heads> (q, w, index, lengths) => (best) {{
    {_POOLED}
    looked = Where (begun, found, nothing)
    sum_b = ReduceSum <keepdims = 0> (looked, minus_l)
    own_count_i = Add (own, one_r)
    own_count = Cast <to = 1> (own_count_i)
    own_count_l = Unsqueeze (own_count, minus_l)
    mean = Div (sum_b, own_count_l)
    weighted = Mul (w, mean)
    energy = Abs (weighted)
    heads_s = Constant <value_int: int = @heads> ()
    heads_n = Unsqueeze (heads_s, zeros_l)
    most, best = TopK <axis = -1> (energy, heads_n)
}}""",
    # MISA's second stage: the best candidates by ``scores`` have their score of ``every`` head, the others none.
    "Rescore": f"""
Rescore <candidates> (scores, every) => (again) {{
    {_best("candidates", "candidate")}
    again = Where (candidate, every, hidden)
}}""",
    # A length gate: rows of at most ``min_context`` tokens have their score of ``every`` token and head.
    "ShortRows": f"""
ShortRows <min_context> (scores, every, lengths) => (gated) {{
    rows_n = Shape <start = 1, end = 2> (scores)
    {_TOKENS}
    context_i = Constant <value_int: int = @min_context> ()
    short = Less (t, context_i)
    minus_l = Constant <value_ints = [-1]> ()
    short_l = Unsqueeze (short, minus_l)
    gated = Where (short_l, every, scores)
}}""",
    # The ``top_k`` best tokens of each row, or all that it may look at where they are fewer: bool [B, T, C].
    "TopTokens": f"""
TopTokens <top_k> (scores) => (keep) {{
    {_best("top_k", "keep")}
}}""",
}
