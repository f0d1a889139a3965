"""Runs the decode rows of a window again from any layer boundary.

When a plan changes at layer l, everything below l stays as it was: hidden states at the boundary, index sets of the
full layers below, and the whole prompt, where prefill rows never select and so a sharing pattern cannot touch them.
What is left to compute is the decode rows through layers l and up. Where prefill rows select, as they always do in
models with indexers of their own (DSA), they are replayed too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.decode import nll
from sparsec.plugins.families import attention_modules, decoder_layers, final_norm, lm_head
from sparsec.plugins.runtime import new_cache, rows_as, stepping
from sparsec.plugins.step import Step


@dataclass(frozen=True)
class State:
    """What one run left behind, for runs that differ from it from some layer on."""

    inputs: list[Tensor]  # hidden states at each layer boundary, [1, rows, hidden]
    index_sets: dict[tuple[int, int], Tensor]  # see Step.index_sets
    losses: Tensor  # float32 [decode rows - 1]


class Replay:
    """One window under the plan that is installed on the model.

    ``state`` is what the accepted plan gives.

    Args:
        model: with a plan installed.
        tokens: [length] ids.
        prompt: prefill rows; the others are decode rows.
    """

    @torch.no_grad()
    def __init__(self, model: Any, tokens: Tensor, prompt: int) -> None:
        self.model = model
        self.layers, self.modules = decoder_layers(model), attention_modules(model)
        self.tokens = tokens[prompt:].to(model.device)
        self.calls: list[dict[str, Any]] = []  # what each layer was called with, beside the hidden states
        self.first: Tensor | None = None  # hidden states before the first layer
        cache, replayed = new_cache(model, "reference"), self.tokens
        self.prompt = 0  # replayed rows that are prefill rows
        if model.sparsec_plan.selects_in_prefill:
            replayed, self.prompt = tokens.to(model.device), prompt
            # Transformers' own cache layers would grow with every run.
            cache = None if model.sparsec_plan.dsa is not None else cache
        else:
            with rows_as("prefill"):
                ids = tokens[None, :prompt].to(model.device)
                model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
        hooks = [layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in self.layers]
        step = Step(decode=True, prompt=self.prompt, commit=False)
        with stepping(step):
            model.get_decoder()(input_ids=replayed[None], past_key_values=cache, use_cache=cache is not None)
        for hook in hooks:
            hook.remove()
        self.positions = step.positions
        assert self.first is not None
        self.state: State = self.run(0, State([self.first], {}, torch.empty(0)))

    def _note(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.first = args[0] if self.first is None else self.first
        self.calls.append(kwargs)

    @property
    def losses(self) -> Tensor:
        """Under the accepted plan: float32 [decode rows - 1]."""
        return self.state.losses

    @torch.no_grad()
    def run(self, start: int, known: State | None = None) -> State:
        """Layers ``start`` and up under the plan now installed.

        known: of a run that did the same below ``start``; None is the accepted plan's.
        """
        known = known or self.state
        sets = {key: keep for key, keep in known.index_sets.items() if key[0] < start}
        step = Step(decode=True, prompt=self.prompt, commit=False, index_sets=sets, positions=self.positions)
        hidden, inputs = known.inputs[start], known.inputs[:start]
        for number in range(start, len(self.layers)):
            layer: Any = self.layers[number]
            inputs.append(hidden)
            module: Any = self.modules[number]
            module.sparsec.step = step
            hidden = layer(hidden, **self.calls[number])
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # some also hand their index set on
        logits = lm_head(self.model)(final_norm(self.model)(hidden[:, self.prompt :]))
        return State(inputs, sets, nll(logits[0], self.tokens))
