"""Traces a model under its plan into two graphs, for prompts and for decode steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.export.onnx import dsa
from sparsec.export.onnx.attention import NAME, STORES, Call, stores_of
from sparsec.export.onnx.files import Kind
from sparsec.export.onnx.functions import OPSET
from sparsec.export.onnx.routing import keep, routed
from sparsec.plan import Plan
from sparsec.plugins.families import attention_modules, final_norm


def store_shapes(plan: Plan, config: Any, batch: Any, slots: Any) -> dict[tuple[int, str], tuple[Any, ...]]:
    """Shapes of all stores by layer and name, in the order of the graphs' inputs and outputs."""
    rank = plan.selector.rank if plan.selector else 0
    found: dict[tuple[int, str], tuple[Any, ...]] = {}
    for i in range(plan.model.layers):
        if plan.dsa is not None:
            own = dsa.shapes(plan, i, config, batch, slots)
        else:
            own = stores_of(plan, i, config).shapes(plan.model.head_dim, rank, batch, slots)
        found |= {(i, name): own[name] for name in STORES if name in own}
    return found


class Traced(nn.Module):
    """What is traced: token ids and stores in, logits of each sequence's last token and stores out."""

    def __init__(self, model: Any, kind: Kind, *, masked: bool, rewrite: bool) -> None:
        super().__init__()
        self.model, self.kind, self.masked, self.rewrite = model, kind, masked, rewrite
        self.plan: Plan = model.sparsec_plan
        self.names = list(store_shapes(self.plan, model.config, 1, 1))

    def forward(self, input_ids: Tensor, lengths: Tensor, added: Tensor, stores: list[Tensor]) -> tuple[Tensor, ...]:
        """input_ids: int64 [batch, rows]; lengths, added: int64 [batch]. Logits are [batch, vocabulary]."""
        past = dict(zip(self.names, stores, strict=True))
        call = Call(self.kind == "decode", lengths, added, past, self.masked, self.rewrite)
        for module in attention_modules(self.model):
            module.sparsec.call = call  # type: ignore[union-attr]
        last = (added - 1).clamp_min(0)  # a sequence may have no token in this call

        def only_last(norm: nn.Module, args: Any, hidden: Tensor) -> Tensor:
            if self.kind == "decode":
                return hidden
            return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))

        hook = final_norm(self.model).register_forward_hook(only_last)
        try:
            positions = lengths[:, None] + torch.arange(input_ids.shape[1])
            keep(self.model, input_ids, positions)
            logits = self.model(input_ids=input_ids, position_ids=positions, use_cache=False).logits[:, 0]
        finally:
            hook.remove()
        return logits, *(call.present[name] for name in self.names)


def trace(model: Any, kind: Kind, slots: int | None = None, *, masked: bool = False) -> Any:
    """A model that runs a plan as ONNX: PyTorch's ``ONNXProgram``, whose weights are the model's own tensors.

    Args:
        model: a model that runs a plan.
        kind: rows of prompts, or one decode row.
        slots: of full KV heads, where the runtime wants a number; None: any. TensorRT does, and wants index keys to be
            chosen slot by slot.
        masked: a decode row reads all keys of full KV heads under a mask instead of gathering what is kept.
    """
    traced = Traced(model, kind, masked=masked, rewrite=slots is not None).eval()
    plan, config = traced.plan, model.config
    batch, room, rows = 2, slots or 24, 1 if kind == "decode" else 5
    dtype = next(model.parameters()).dtype
    stores = [torch.zeros(shape, dtype=dtype) for shape in store_shapes(plan, config, batch, room).values()]
    dims = {name: torch.export.Dim(name) for name in ("batch", "slots", "rows")}
    growing = {} if slots else {name: {2: dims["slots"]} for name in (*STORES[:2], *STORES[4:])}
    moving = [{0: dims["batch"], **growing.get(name, {})} for _, name in traced.names]
    ids = {0: dims["batch"], **({1: dims["rows"]} if kind == "prefill" else {})}
    shapes_in = {"input_ids": ids, "lengths": {0: dims["batch"]}, "added": {0: dims["batch"]}, "stores": moving}
    past, present = ([f"{when}.{i}.{name}" for i, name in traced.names] for when in ("past", "present"))
    with _attention(model), routed(model), dsa.latents_traced(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            traced,
            (),
            kwargs={
                "input_ids": torch.zeros(batch, rows, dtype=torch.long),
                "lengths": torch.full((batch,), 3),
                "added": torch.full((batch,), rows),
                "stores": stores,
            },
            dynamic_shapes=shapes_in,
            input_names=["input_ids", "lengths", "added", *past],
            output_names=["logits", *present],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # its folding would store transposed copies of weights, under other names in each graph
            verbose=False,
        )
    assert program is not None
    return program


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for module in attention_modules(model):
            module.sparsec.call = None  # type: ignore[union-attr]
