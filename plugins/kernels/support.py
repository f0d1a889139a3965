"""Where the kernels run, and the one line that says why they do not."""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from sparsec.errors import UsageError
from sparsec.plan import Plan

if TYPE_CHECKING:  # asked of plans where no PyTorch is needed otherwise
    import torch

Kernels = Literal["auto", "triton", "reference"]
LEAST_TRITON = (3, 4)
LARGEST_HEAD, LARGEST_BLOCK, LARGEST_GROUP = 256, 256, 128
MOST_ITEMS = 32768  # of a head, that one program searches: 2M tokens in blocks of 64
DTYPES = ("bfloat16", "float16", "float32")
WAITING = ("longrope", "dynamic")  # kinds of rotary embeddings

log = logging.getLogger("sparsec")


def reason_against(plan: Plan, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run this plan there; None: they can."""
    fp8 = plan.selector is not None and plan.selector.index_dtype == "fp8"
    return reason_there(device, dtype, fp8=fp8) or reason_in(plan)


def reason_there(device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> str | None:
    """Why no plan's kernels run there; None: they do. fp8: index keys are stored in it."""
    if (old := triton_missing()) is not None:
        return old
    if not interpreted():
        if device.type != "cuda":
            return f"the kernels need a CUDA GPU, the model is on {device.type}"
        import torch

        if torch.cuda.get_device_capability(device) < (least := (8, 9) if fp8 else (8, 0)):
            needed = f"compute capability {least[0]}.{least[1]} or higher{' for index keys in fp8' * fp8}"
            return f"the kernels need {needed}, {torch.cuda.get_device_name(device)} has less"
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        return f"the kernels take {', '.join(DTYPES)}, the model is {name}"
    return None


def reason_in(plan: Plan) -> str | None:
    """What of a plan the kernels do not do, wherever they run."""
    if plan.dsa is not None:
        return "the model has indexers of its own: Transformers runs it, there are no kernels for it yet"
    if plan.routing is not None:
        return "the plan routes tokens: kernels gather, forecast and scatter there, the reference runs heads and caches"
    if plan.model.head_dim > LARGEST_HEAD:
        return f"the kernels take heads of up to {LARGEST_HEAD} dimensions, the model has {plan.model.head_dim}"
    if plan.window is not None and plan.window.compensate:
        return "the plan's window compensates for what it drops: only the reference does that"
    if (s := plan.selector) is not None and (s.granularity == "block" or s.prefill == "selector"):
        if s.block & (s.block - 1) or s.block > LARGEST_BLOCK:
            return f"the kernels take blocks of 2, 4, 8 … {LARGEST_BLOCK} tokens, the plan's have {s.block}"
        if s.prefill == "selector" and s.query_block > LARGEST_GROUP:
            return f"the kernels take query blocks of up to {LARGEST_GROUP} rows, the plan's have {s.query_block}"
    return None


def uncapturable(model: Any) -> str | None:
    """Why a decode step of this model cannot be one CUDA graph; None: it can."""
    from sparsec.plugins.families import native_local_layers

    if native_local_layers(model.config):
        return "some of the model's own layers have a sliding window"
    rope = str((getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default"))
    return f"{rope} rotary embeddings wait for the device in every step" if rope in WAITING else None


@cache
def triton_missing() -> str | None:
    """Why there is no Triton to use, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (PyTorch for CUDA brings it)"
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < LEAST_TRITON:
        return f"Triton {triton.__version__} is too old: the kernels need {'.'.join(map(str, LEAST_TRITON))} or newer"
    return None


def launching_on(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which is not a layer's where a model is spread over several."""
    import torch

    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def interpreted() -> bool:
    """Triton runs its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def chosen(kernels: Kernels, plan: Plan, device: torch.device, dtype: torch.dtype) -> bool:
    """Do the kernels run?

    Raises:
        UsageError: they are demanded and cannot, with the reason.
    """
    if kernels == "reference":
        return False
    against = reason_against(plan, device, dtype)
    if against is None:
        return kernels == "triton" or device.type == "cuda"
    if kernels == "triton":
        raise UsageError(against)
    if device.type == "cuda":
        _warn(against)
    return False


def routes(kernels: Kernels, plan: Plan, device: torch.device, dtype: torch.dtype) -> bool:
    """Do the plan's routed units run on kernels? Its heads and caches are another question: :func:`chosen`."""
    wanted = plan.routing is not None and kernels != "reference" and device.type == "cuda"
    return wanted and plan.model.head_dim <= LARGEST_HEAD and reason_there(device, dtype) is None


@cache
def _warn(against: str) -> None:
    """Once a reason."""
    log.warning("sparsec runs the reference, which is slow: %s", against)
