"""What a folder must be before it is opened as a dense checkpoint, told from its small files alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sparsec.compiler.quiet import transformers_call
from sparsec.errors import SourceError
from sparsec.layout import PLAN_KEY

# A tokenizer needs one of these; the rest of its files only add to it.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_files(path: Path) -> list[Path]:
    """The tokenizer's files in folder ``path``, chat templates included, sorted by name.

    Raises:
        SourceError: none of them holds a vocabulary.
    """
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    tiktoken = list(path.glob("*.tiktoken"))
    if not tiktoken and not any((path / name).is_file() for name in VOCABULARIES):
        raise SourceError(f"{path} has no tokenizer: copy tokenizer.json and tokenizer_config.json of the model there")
    return sorted([*files, *tiktoken, *path.glob("additional_chat_templates/*.jinja")])


def check_config(path: Path) -> None:
    """Check that folder ``path`` has a config.json of a dense model that needs no code from the checkpoint.

    Raises:
        SourceError: no or broken config.json, remote code, quantised weights, an adapter, a model type that
            transformers does not know, or special tokens outside of the vocabulary.
    """
    config = read_json(path / "config.json")
    _refuse_remote_code(path, config)
    if PLAN_KEY in config:
        raise SourceError(f"{path} already has a plan: compile the dense checkpoint it came from")
    if config.get("quantization_config"):
        quantised = config["quantization_config"]
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise SourceError(
            f"{path} is quantised ({method}), sparsec compiles dense weights: name the model it was made from"
        )
    if (path / "adapter_config.json").is_file():
        raise SourceError(f"{path} holds an adapter: merge it into its base model (merge_and_unload) and name that")
    if config.get("transformers_weights"):
        raise SourceError(
            f"{path}/config.json names its own weight file: rename that to model.safetensors "
            "and drop the key transformers_weights"
        )
    _check_special_ids(path)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        SourceError: the file is missing, unreadable, or no JSON object.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(
            f"{file.parent} has no {file.name}: name a folder that holds a Hugging Face checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file} is no readable JSON ({error}): copy or download that file again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{file} holds no JSON object: copy or download that file again")
    return data


def load_config(path: Path) -> Any:
    """Transformers' configuration of the checkpoint in folder ``path``.

    Raises:
        SourceError: transformers cannot read it.
    """
    from transformers import AutoConfig

    with transformers_call(
        f"transformers cannot read {path / 'config.json'}",
        "update transformers, or name a checkpoint of a supported family",
    ):
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def vocabulary_size(path: Path) -> int | None:
    """Rows of the embedding that config.json promises; None where the model's configuration does not say."""
    size: int | None = getattr(load_config(path).get_text_config(), "vocab_size", None)
    return size


def read_license(path: Path) -> str | None:
    """The license that the model card (README.md) in folder ``path`` declares, or None."""
    card = _card(path)
    name = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return str(name) if name else None


def read_languages(path: Path) -> tuple[str, ...]:
    """The languages that the model card in folder ``path`` declares."""
    found = _card(path).get("language") or ()
    return (found,) if isinstance(found, str) else tuple(each for each in found if isinstance(each, str))


def _card(path: Path) -> dict[str, Any]:
    """A model card's front matter; a broken one says nothing, and nothing else depends on it."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _refuse_remote_code(path: Path, config: dict[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = str(config.get("model_type"))
    if config.get("auto_map") and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SourceError(
            f"{path} brings its own code for {model_type!r}, and remote code is never run: "
            "name a model that transformers has a class for"
        )
    # An implementation named owner/name is a compiled kernel that transformers would fetch from the Hub.
    if re.search(r'"_?(attn|experts)_implementation(_internal)?": "[^"]*/', json.dumps(config)):
        raise SourceError(
            f"{path}/config.json asks for a kernel from the Hub, and remote code is never run: "
            "drop the key attn_implementation (or experts_implementation)"
        )


def _check_special_ids(path: Path) -> None:
    size = vocabulary_size(path)
    files = [path / "config.json", path / "generation_config.json"]
    for file in files:
        if size is None or not file.is_file():
            continue
        data = read_json(file)
        for key in SPECIAL_IDS:
            value = data.get(key)
            ids = value if isinstance(value, list) else [value]
            beyond = [i for i in ids if isinstance(i, int) and i >= size]
            if beyond:
                raise SourceError(
                    f"{key} {beyond[0]} in {file} is outside of the vocabulary of {size}: "
                    "take config and weights of the same model"
                )
