"""Puts a plan on a Transformers model and takes it off again.

:func:`install` sets ``attn_implementation="sparsec"``, gives every attention module its
:class:`~sparsec.plugins.step.LayerRuntime` and indexer, and fills each empty cache that reaches the model with
:class:`~sparsec.plugins.cache.SparseLayer`. Weights are not touched.

A call with one new token on a filled cache is a decode row, any other call is prefill; ``generate()`` marks its own
prefill, and :func:`rows_as` overrides both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer
from transformers.masking_utils import causal_mask_function, sdpa_mask

from sparsec.errors import PlanError
from sparsec.plan import Plan
from sparsec.plugins import dsa, merged_writing, vocabulary
from sparsec.plugins.attention import sparsec_attention
from sparsec.plugins.cache import PlanLayer, SparseLayer
from sparsec.plugins.families import attention_modules, native_local_layers, shape_of
from sparsec.plugins.kernels.support import Kernels, chosen, routes
from sparsec.plugins.routed_units import routing_names
from sparsec.plugins.routing import check_routing, install_routing, note_tokens, routing_tensors, uninstall_routing
from sparsec.plugins.selector import Indexer
from sparsec.plugins.step import Step, layer_runtime

NAME = "sparsec"
Rows = Literal["prefill", "decode"]

_rows: ContextVar[Rows | None] = ContextVar("sparsec_rows", default=None)
_step: ContextVar[Step | None] = ContextVar("sparsec_step", default=None)


def plain_mask(*, local_size: int | None = None, config: Any = None, **kwargs: Any) -> Tensor | None:
    """Transformers' mask interface: the 2-D padding mask for our layers, its own mask for native sliding layers."""
    if local_size is not None and config is not None and native_local_layers(config):
        return sdpa_mask(local_size=local_size, config=config, **kwargs)  # type: ignore[no-any-return]
    if local_size is None and kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise ValueError("sparsec attention is causal only: pass each sequence as its own row, not packed")
    mask: Tensor | None = kwargs.get("attention_mask")
    return mask


AttentionInterface.register(NAME, sparsec_attention)
AttentionMaskInterface.register(NAME, plain_mask)


def tensor_names(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Every tensor the plan needs beside the base weights, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, layer in enumerate(plan.layers):
        if layer.index == "full" and plan.selector is not None:  # a model's own indexers are base weights
            shape = (len(layer.retrieval), plan.selector.rank, plan.model.head_dim)
            for part in ("q_proj", "k_proj"):
                shapes[f"model.layers.{i}.self_attn.indexer.{part}.weight"] = shape
    return shapes | routing_names(plan) | vocabulary.stored_names(plan)


def check(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """The plan fits the model, and the tensors fit the plan.

    Raises:
        PlanError: naming the first thing that does not fit.
    """
    shape = shape_of(model.config)
    if shape != plan.model:
        raise PlanError(f"the plan is for {plan.model}, the model is {shape}: use the checkpoint it was compiled from")
    for i in native_local_layers(model.config):
        if plan.layers[i].heads is not None:
            raise PlanError(f"the plan changes layer {i}, which the model itself runs with a sliding window")
    dsa.check(model, plan)
    check_routing(model, plan)
    expected = tensor_names(plan)
    if plan.vocabulary is not None and vocabulary.check(model, plan.vocabulary):
        expected |= vocabulary.tensor_names(plan)
    for name, size in expected.items():
        if name not in tensors:
            raise PlanError(f"the plan needs the tensor {name}, which is missing: compile again")
        if tuple(tensors[name].shape) != size:
            raise PlanError(f"{name} has shape {tuple(tensors[name].shape)}, the plan needs {size}: compile again")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise PlanError(f"{name} holds values that are not finite: compile again")
    if plan.vocabulary is not None and plan.vocabulary.write == "merged":
        merged_writing.check_output(model, plan.vocabulary, tensors)
    for name in tensors:
        if name not in expected:
            raise PlanError(f"the plan has no place for the tensor {name}: compile again")


def install(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Run ``plan`` on ``model`` from now on. A plan already there is replaced.

    Args:
        model: a causal-LM model of a supported family.
        plan: what runs.
        tensors: the plan's tensors by name (:func:`tensor_names`), any float dtype.

    Raises:
        PlanError: plan, model and tensors do not fit together.
        SourceError: the model's family is not supported.
    """
    check(model, plan, tensors)
    uninstall(model)
    dense = getattr(model.config, "_attn_implementation", None)
    if plan.vocabulary is not None and vocabulary.check(model, plan.vocabulary):
        before = vocabulary.extend(model, plan.vocabulary, tensors)
        object.__setattr__(model, "sparsec_base", before)
    merged_writing.keep_output(model, plan, tensors)
    hooks: list[Any] = []
    if plan.dsa is not None:
        dsa.install(model, plan)
    else:
        hooks += _install_heads(model, plan, tensors)
    object.__setattr__(model.get_decoder(), "sparsec_routed", install_routing(model, plan, tensors))  # type: ignore[operator]
    hooks.append(model.get_decoder().register_forward_pre_hook(_begin_call, with_kwargs=True))  # type: ignore[operator]
    object.__setattr__(model, "sparsec_installed", (hooks, dense))
    object.__setattr__(model, "sparsec_plan", plan)
    object.__setattr__(model.get_decoder(), "sparsec_plan", plan)  # type: ignore[operator]
    object.__setattr__(model.get_decoder(), "sparsec_kernels", "reference")  # type: ignore[operator]
    object.__setattr__(model.get_decoder(), "sparsec_modules", attention_modules(model))  # type: ignore[operator]
    model.set_attn_implementation(NAME if plan.dsa is None else dsa.NAME)  # type: ignore[operator]


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """What calls with a cache run on from now on: ``reference``, ``triton``, or ``auto``: Triton on GPUs where it can.

    Routed units run on Triton in all calls then; their heads and caches on the reference.

    Raises:
        UsageError: ``triton`` is demanded and cannot run, with the reason.
    """
    first = next(model.parameters())
    plan: Plan = model.sparsec_plan  # type: ignore[assignment]
    chosen(kernels, plan, first.device, first.dtype)
    decoder = model.get_decoder()  # type: ignore[operator]
    object.__setattr__(decoder, "sparsec_kernels", kernels)
    for unit in decoder.sparsec_routed:
        unit.kernels = routes(kernels, plan, first.device, first.dtype)


def _install_heads(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> list[Any]:
    """Runtimes and indexers of a plan that splits heads."""
    hooks: list[Any] = []
    for i, module in enumerate(attention_modules(model)):
        device = next(module.parameters()).device
        indexer = None
        if plan.layers[i].index == "full":
            prefix = f"model.layers.{i}.self_attn.indexer"
            indexer = Indexer(*(tensors[f"{prefix}.{part}.weight"].to(device) for part in ("q_proj", "k_proj")))
            module.indexer = indexer
        object.__setattr__(module, "sparsec", layer_runtime(plan, i, indexer, device))
        hooks.append(module.register_forward_pre_hook(_note_call, with_kwargs=True))
    return hooks


def uninstall(model: nn.Module) -> None:
    """Back to the dense model."""
    installed = getattr(model, "sparsec_installed", None)
    if installed is None:
        return
    hooks, dense = installed
    for hook in hooks:
        hook.remove()
    if model.sparsec_plan.dsa is not None:  # type: ignore[union-attr]
        dsa.uninstall(model)
    uninstall_routing(model, model.sparsec_plan)  # type: ignore[arg-type]
    for module in attention_modules(model):
        del module.sparsec
        if isinstance(getattr(module, "indexer", None), Indexer):
            del module.indexer
    before = model.__dict__.pop("sparsec_base", None)
    if before is not None:
        vocabulary.restore(model, before)
    vocabulary.set_reader(model, None)
    merged_writing.drop_output(model)
    del model.sparsec_installed, model.sparsec_plan
    decoder = model.get_decoder()  # type: ignore[operator]
    del decoder.sparsec_plan, decoder.sparsec_modules, decoder.sparsec_kernels, decoder.sparsec_routed
    model.set_attn_implementation(dense)  # type: ignore[operator]


@contextmanager
def applied(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """``plan`` runs inside the block, what ran before runs after it."""
    before = getattr(model, "sparsec_plan", None)
    kept = added_tensors(model) | vocabulary.added_tensors(model) if before is not None else {}
    kernels: Kernels = model.get_decoder().sparsec_kernels if before is not None else "reference"  # type: ignore
    install(model, plan, tensors or {})
    try:
        yield
    finally:
        uninstall(model)
        if before is not None:
            install(model, before, kept)
            use_kernels(model, kernels)


@contextmanager
def rows_as(kind: Rows) -> Iterator[None]:
    """Inside the block every row of every call is a prefill row, or a decode row."""
    token = _rows.set(kind)
    try:
        yield
    finally:
        _rows.reset(token)


@contextmanager
def stepping(step: Step) -> Iterator[None]:
    """Inside the block calls use ``step`` (its observer, its commit flag) instead of one of their own."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def new_cache(model: nn.Module, kernels: Kernels | None = None) -> Cache:
    """An empty cache for a model with a plan; pass it as ``past_key_values`` and keep it for the next turn.

    Args:
        kernels: what runs calls with this cache; None: as the model was loaded. Several decode rows at once, and
            observers, need ``reference``.
    """
    if model.sparsec_plan.dsa is not None:  # type: ignore[union-attr]
        return DynamicCache(config=model.config)
    decoder = model.get_decoder()  # type: ignore[operator]
    return _filled(DynamicCache(config=model.config), decoder, kernels or decoder.sparsec_kernels)


def fill_cache(cache: Cache, plan: Plan, config: Any, *, kernels: bool = False) -> Cache:
    """Give an empty Transformers cache the layers that the plan needs; the object stays the caller's.

    Args:
        kernels: layers for the kernels instead of the reference.

    Raises:
        ValueError: the cache was filled by a dense model, or is of a kind that cannot hold a plan's layers.
    """
    if any(isinstance(layer, PlanLayer) for layer in cache.layers):
        return cache
    if type(cache) is not DynamicCache or cache.offloading:
        raise ValueError(f"a plan needs the default cache, not {type(cache).__name__}: drop cache_implementation")
    if cache.get_seq_length() > 0:
        raise ValueError("this cache was filled by a dense model: start with an empty one")
    native = native_local_layers(config)
    cache.layer_class_to_replicate = None
    cache.layers = [
        DynamicSlidingWindowLayer(sliding_window=config.sliding_window) if i in native else _layer(plan, i, kernels)
        for i in range(plan.model.layers)
    ]
    return cache


def _layer(plan: Plan, number: int, kernels: bool) -> Any:
    if not kernels:
        return SparseLayer(plan.window, plan.min_context)
    from sparsec.plugins.kernels.cache import KernelLayer

    return KernelLayer(plan, number)


def _filled(cache: Cache, decoder: Any, kernels: Kernels) -> Cache:
    """The cache with our layers, for the decoder's device and dtype."""
    first = next(decoder.parameters())
    on = chosen(kernels, decoder.sparsec_plan, first.device, first.dtype)
    return fill_cache(cache, decoder.sparsec_plan, decoder.config, kernels=on)


def kv_bytes(cache: Cache) -> int:
    """Bytes resident in a cache: keys, values (or latents) and index keys of all layers."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, PlanLayer):
            total += layer.nbytes
        elif layer.keys is not None:
            total += layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
            own = getattr(layer, "indexer_keys", None)
            total += own.untyped_storage().nbytes() if own is not None else 0
    return total


def added_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The plan's tensors of a model that runs one, by their names in the artifact."""
    kept = routing_tensors(model, model.sparsec_plan) | merged_writing.output_tensors(model)  # type: ignore[arg-type]
    return kept | {
        f"model.layers.{i}.self_attn.indexer.{name}": tensor
        for i, module in enumerate(attention_modules(model))
        if isinstance(indexer := getattr(module, "indexer", None), Indexer)
        for name, tensor in indexer.state_dict().items()
    }


def _begin_call(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before each forward: a cache of the right kind, and a new Step for the layers to share."""
    plan: Plan = decoder.sparsec_plan  # type: ignore[assignment]
    config = decoder.config
    cache = kwargs.get("past_key_values")
    if cache is None and kwargs.get("use_cache"):
        cache = kwargs["past_key_values"] = DynamicCache(config=config)
    if cache is not None and plan.dsa is None and not any(isinstance(layer, PlanLayer) for layer in cache.layers):
        _filled(cache, decoder, decoder.sparsec_kernels)  # type: ignore[arg-type]
    if kwargs.get("output_attentions"):
        raise ValueError("sparse attention has no dense attention weights to return: drop output_attentions")
    step = _step.get()
    ids = kwargs.get("input_ids", args[0] if args else None)
    inputs = kwargs.get("inputs_embeds") if ids is None else ids
    past = cache.get_seq_length() if cache is not None else 0
    if step is None:
        one = inputs is not None and inputs.shape[1] == 1 and past > 0
        rows = _rows.get()
        step = Step(decode=one if rows is None else rows == "decode")
    else:
        step.index_sets.clear()
        step.positions = step.padded = None
        step.masks.clear()
        step.kernel_sets.clear()
        step.kernel_lists.clear()
    for module in decoder.sparsec_modules:  # type: ignore[union-attr]
        module.sparsec.step = step
    if plan.routing is not None and inputs is not None:
        note_tokens(step, plan.routing, ids, kwargs.get("attention_mask"), tuple(inputs.shape[:2]), past)
    for runtime in decoder.sparsec_routed:  # type: ignore[union-attr]
        runtime.step = step
    return args, kwargs


def _note_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before each attention call: this call's rotary tables and this layer's cache."""
    runtime = module.sparsec
    runtime.rope = kwargs.get("position_embeddings")
    cache = kwargs.get("past_key_values")
    layer = cache.layers[runtime.number] if cache is not None else None
    runtime.cache = layer if isinstance(layer, PlanLayer) else None
    if layer is not None and runtime.cache is None and runtime.layer.heads is not None:
        raise ValueError(
            f"layer {runtime.number} has a cache that no plan filled: pass an empty one, or new_cache(model)"
        )


__all__ = [
    "Step",
    "added_tensors",
    "applied",
    "check",
    "fill_cache",
    "install",
    "kv_bytes",
    "new_cache",
    "plain_mask",
    "rows_as",
    "stepping",
    "tensor_names",
    "uninstall",
    "use_kernels",
]
