"""Body of the operator that is a mixture of experts; what routes tokens to them is the model's own and traced as it is.

Each expert that a token of the call was routed to runs once, on its tokens alone; no other one is computed or read.
"""

from __future__ import annotations

ACTIVATION = "silu"  # of the experts' gates

EXPERTS = {
    # x [N, D]; experts int64 [N, K], the experts of each row; weights [N, K]; gate_up [E, 2 I, D], gates first; down
    # [E, D, I]. The sum over experts is float32.
    "Experts": """
Experts (x, experts, weights, gate_up, down) => (out) {
    minus_l = Constant <value_ints = [-1]> ()
    axes_o = Constant <value_ints = [1]> ()
    zeros_l = Constant <value_ints = [0]> ()
    asked_all = Reshape (experts, minus_l)
    asked = Unique <sorted = 1> (asked_all)
    count_n = Shape (asked)
    count = Squeeze (count_n)
    x_f = Cast <to = 1> (x)
    empty = Sub (x_f, x_f)
    weights_f = Cast <to = 1> (weights)
    nothing = Constant <value_float = 0.0> ()
    going = Constant <value = bool {1}> ()
    out_f = Loop (count, going, empty) <body = one_expert (int64 turn, bool before, float[rows, width] sum)
        => (bool after, float[rows, width] more) {
        after = Identity (before)
        expert = Gather <axis = 0> (asked, turn)
        chosen = Equal (experts, expert)
        share = Where (chosen, weights_f, nothing)
        share_row = ReduceSum <keepdims = 0> (share, axes_o)
        chosen_i = Cast <to = 7> (chosen)
        times = ReduceSum <keepdims = 0> (chosen_i, axes_o)
        some = Cast <to = 9> (times)
        at_turned = NonZero (some)
        at = Transpose <perm = [1, 0]> (at_turned)
        own = GatherND (x, at)
        own_share = GatherND (share_row, at)
        first = Gather <axis = 0> (gate_up, expert)
        first_turned = Transpose <perm = [1, 0]> (first)
        both = MatMul (own, first_turned)
        gate, up = Split <axis = -1, num_outputs = 2> (both)
        open = Sigmoid (gate)
        gate_open = Mul (gate, open)
        middle = Mul (gate_open, up)
        second = Gather <axis = 0> (down, expert)
        second_turned = Transpose <perm = [1, 0]> (second)
        left = MatMul (middle, second_turned)
        left_f = Cast <to = 1> (left)
        share_c = Unsqueeze (own_share, axes_o)
        part = Mul (left_f, share_c)
        more = ScatterND <reduction = "add"> (sum, at, part)
    }>
    out = CastLike (out_f, x)
}""",
}
