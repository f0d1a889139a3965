"""After ``import sparsec``, ``AutoModelForCausalLM.from_pretrained(artifact)`` runs the plan.

Every supported family's class is registered again with Transformers as a subclass that looks for a plan in config.json.
A checkpoint without one loads as ever. Without ``import sparsec`` an artifact is the plain dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.utils import cached_file

from sparsec.errors import ArtifactError
from sparsec.layout import PLAN_KEY, TENSORS
from sparsec.plan import Plan
from sparsec.plugins.families import FAMILIES
from sparsec.plugins.merged_writing import processors_of, writing
from sparsec.plugins.runtime import added_tensors, install, rows_as, tensor_names, uninstall, use_kernels
from sparsec.plugins.vocabulary import added_tensors as vocabulary_tensors

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class SparseMixin:
    """A causal-LM class whose ``from_pretrained`` and ``save_pretrained`` know plans."""

    config: Any

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers', then the plan of config.json is installed; with none this is the dense model.

        On a GPU Triton's kernels run it where they can; :func:`sparsec.plugins.runtime.use_kernels` changes that.
        """
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        loaded = super().from_pretrained(name, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        data = getattr(model.config, PLAN_KEY, None)
        if data is not None:
            plan = Plan.parse(data)
            install(model, plan, _added_tensors(name, plan, hub))
            use_kernels(model, "auto")
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers', with the plan's tensors in their own file, so that dense loaders do not meet them."""
        plan: Plan | None = getattr(self, "sparsec_plan", None)
        if plan is None:
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if plan.vocabulary is not None and plan.vocabulary.mode == "dynamic":
            # The rows that batches fill are no weights: the base model is saved, and the plan beside it.
            added = added_tensors(self) | vocabulary_tensors(self)  # type: ignore[arg-type]
            reader = self.__dict__.get("sparsec_reader")
            uninstall(self)  # type: ignore[arg-type]
            try:
                setattr(self.config, PLAN_KEY, plan.to_json())
                super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            finally:
                install(self, plan, added)  # type: ignore[arg-type]
                object.__setattr__(self, "sparsec_reader", reader)
            write_tensors(Path(save_directory) / TENSORS, added)
            return None
        state = kwargs.pop("state_dict", None) or self.state_dict()  # type: ignore[attr-defined]
        names = tensor_names(plan)
        kwargs["state_dict"] = {key: value for key, value in state.items() if key not in names}
        setattr(self.config, PLAN_KEY, plan.to_json())
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_tensors(Path(save_directory) / TENSORS, added_tensors(self))  # type: ignore[arg-type]
        return None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'; where the plan says so, over base and merged tokens."""
        with writing(self):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        return processors_of(self, made, kwargs["input_ids_seq_length"])

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        # generate() says here which rows are prompt rows, even where a chunk of them has one token.
        with rows_as("prefill"):
            return super()._prefill(*args, **kwargs)  # type: ignore[misc]


def register() -> None:
    """Put our subclasses behind ``AutoModelForCausalLM``."""
    for model_type in FAMILIES:
        config = CONFIG_MAPPING[model_type]
        base = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        if not issubclass(base, SparseMixin):
            # The same name: config.json's "architectures" must stay what stock Transformers knows.
            sparse = type(base.__name__, (SparseMixin, base), {"__module__": __name__})
            AutoModelForCausalLM.register(config, sparse, exist_ok=True)
            if MODEL_FOR_CAUSAL_LM_MAPPING[config] is not sparse:
                # Some releases (5.17) drop a registration for a config class of their own without a word.
                MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[config] = sparse


def _added_tensors(name: Any, plan: Plan, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of sparsec.safetensors, from a folder or the Hub."""
    if not tensor_names(plan):
        return {}
    local = Path(name) / hub.get("subfolder", "") / TENSORS
    path = str(local) if local.is_file() else None
    if path is None and not Path(name).is_dir():
        path = cached_file(str(name), TENSORS, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        raise ArtifactError(f"{name} has a plan with indexers, but no {TENSORS}: copy the whole artifact")
    return read_tensors(Path(path))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file as others write files: with the user's permissions, and OSError where the disk is full."""
    path.write_bytes(save({name: t.cpu().contiguous() for name, t in tensors.items()}, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): copy or compile it again") from None
    for key, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{path} holds values that are not finite in {key}: copy or compile it again")
    return found


register()
