"""Decode as one CUDA graph a step: no Python between the layers, the next token chosen on the device.

    cache = new_cache(model, "triton")
    model(ids, past_key_values=cache, use_cache=True)      # the prompt
    steps = DecodeGraph(model, cache, next_token, room=512)
    for _ in range(512):
        token = steps()                                     # int64 [batch, 1], on the device

On a CPU, where Triton's interpreter runs, the steps are called one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsec.plugins.fused import fused_layers
from sparsec.plugins.kernels.cache import KernelLayer
from sparsec.plugins.kernels.support import uncapturable
from sparsec.plugins.runtime import stepping
from sparsec.plugins.step import Step


class DecodeGraph:
    """Greedy steps of a model with a plan on its kernels; small operations of its layers are fused for them (fused.py).

    Args:
        model: a plan installed.
        cache: filled by a prompt, with layers for the kernels.
        token: int64 [batch, 1], the first token that is fed in.
        room: steps that may follow; the cache is made large enough first, since a captured graph cannot grow it.

    Raises:
        ValueError: the cache is another kind of cache, or empty; or the model cannot be captured.
    """

    def __init__(self, model: Any, cache: Any, token: Tensor, room: int) -> None:
        self.layers = [layer for layer in cache.layers if isinstance(layer, KernelLayer)]
        if len(self.layers) != len(cache.layers) or not cache.get_seq_length():
            raise ValueError(
                "no filled cache of the kernels: make one by new_cache(model, 'triton') and run the prompt"
            )
        lengths = self.layers[0].lengths
        assert lengths is not None
        self.model, self.cache, self.left = model, cache, room
        if (against := uncapturable(model)) is not None:
            raise ValueError(f"no graph of a step can be captured: {against}")
        self.token, self.position = token.clone(), lengths[:, None].long().clone()
        for layer in self.layers:
            layer.reserve(layer.length + room)
        self.seen = self._state()
        self.graph = self._captured() if token.is_cuda else None

    def __call__(self) -> Tensor:
        """One step: the token after the last one, int64 [batch, 1]; the same tensor every time.

        Raises:
            ValueError: there is no room left, or something else has used the cache.
        """
        if not self.left:
            raise ValueError("the cache is full: make a DecodeGraph with more room")
        if self.seen != self._state():
            raise ValueError("the cache was used or changed by something else: make a new DecodeGraph")
        self.left -= 1
        if self.graph is None:
            self._step(commit=True)
        else:
            self.graph.replay()
            for layer in self.layers:
                layer.length += 1
        self.seen = self._state()
        return self.token

    def _state(self) -> list[tuple[int, int]]:
        """What a captured graph relies on: where each layer's stores lie, and how many tokens they hold."""
        return [(layer.far_keys.data_ptr() or layer.near_keys.data_ptr(), layer.length) for layer in self.layers]

    @torch.no_grad()
    def _step(self, *, commit: bool) -> None:
        with stepping(Step(decode=True, commit=commit)):
            logits = self.model(
                input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
            ).logits
        if commit:
            self.token.copy_(logits[:, -1:].argmax(-1))
            self.position.add_(1)

    def _captured(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with fused_layers(self.model, self.cache):
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles kernels, fills allocators; nothing is counted
                    self._step(commit=False)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self._step(commit=True)
        for layer in self.layers:  # counted on the host while capturing, though nothing ran
            layer.length -= 1
        return graph
