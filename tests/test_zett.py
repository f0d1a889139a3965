"""ZeTT's hypernetworks: opened where they fit, refused in one line where they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from sparsec.calibrate.zett import ZettNetwork, open_zett
from sparsec.errors import SourceError
from sparsec.plugins.byte_level import ByteLevel

SMALL = {
    "model_type": "zett_hypernetwork",
    "hn_model_type": "roberta",
    "n_embd": 32,
    "hn_hidden_size": 64,
    "hn_intermediate_size": 96,
    "hn_n_layers": 2,
    "hn_num_attention_heads": 2,
    "hn_surface_maxlen": 7,
    "hn_n_extra_tokens": 5,
    "hn_embed_using_source_embeddings": True,
    "hn_rescale_embeddings": True,
    "hn_single_head": False,
    "hn_predict_bias": True,
    "separate_out_embeddings": True,
    "original_vocab_size": 272,
    "pad_token_id": 0,
}


@pytest.fixture
def checkpoint(tiny_deep: Path, tmp_path: Path) -> Callable[..., Path]:
    """``checkpoint(**changes)``: a folder with a small random hypernetwork for the small model."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "zett"
        folder.mkdir(exist_ok=True)
        config = {**SMALL, **changes}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text((tiny_deep / "tokenizer.json").read_text())
        torch.manual_seed(0)
        save_file(ZettNetwork({**SMALL, "n_embd": config["n_embd"]}).state_dict(), folder / "model.safetensors")
        return folder

    return make


def opened(folder: Path | str, tiny_deep: Path, tied: bool = False) -> Any:
    return open_zett(str(folder), ByteLevel.of(AutoTokenizer.from_pretrained(tiny_deep)), 32, 272, tied)


def test_a_hypernetwork_reads_pieces_and_gives_rows(checkpoint: Callable[..., Path], tiny_deep: Path) -> None:
    found = opened(checkpoint(), tiny_deep)
    torch.manual_seed(1)
    table, head = torch.randn(272, 32), torch.randn(272, 32)
    rows = found.rows(["ab", "abc", "ab", "abcdefgh", "abcdefgx"], table, head, False)
    assert rows.shape == (5, 32)
    assert torch.equal(rows[0], rows[2])
    assert not torch.allclose(rows[0], rows[1])
    assert torch.equal(rows[3], rows[4])  # the first seven pieces are looked at
    # Padding changes nothing, and both tables are read.
    assert torch.allclose(found.rows(["ab"], table, head, False), rows[:1], atol=1e-5)
    assert not torch.allclose(found.rows(["ab"], table, head + 1, False)[0], rows[0])
    scaled = found.network.scaler
    scaled.w.mul_(0)
    assert torch.allclose(found.rows(["ab"], table, head, False)[0], scaled.b[0])


def test_checkpoints_hold_the_authors_names() -> None:
    names = set(ZettNetwork(SMALL).state_dict())
    assert {"in_scaler.w", "scaler.b", "out_scaler.w", "fallback_embeddings.weight", "bias_projection.weight"} <= names
    assert {"input_projection.0.weight", "input_projection.1.dense2.bias", "output_projection.0.ln.weight"} <= names
    assert {"output_projection_out.1.bias", "model.encoder.layer.1.attention.self.query.weight"} <= names


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_embd": 64}, "is for embeddings of 272 x 64, untied, this model has 272 x 32, untied"),
        ({"original_vocab_size": 32000}, "is for embeddings of 32000 x 32"),
        ({"separate_out_embeddings": False}, "tied, this model has"),
        ({"hn_embed_lang_id": True}, "needs a language"),
        ({"hn_model_type": "t5"}, "no hypernetwork of ZeTT"),
        ({"model_type": "llama"}, "is a llama, no hypernetwork"),
        ({"hn_embed_using_source_embeddings": False}, "does not read the base model's embeddings"),
        ({"hn_n_layers": 3}, "cannot be opened"),
    ],
)
def test_another_models_hypernetwork_is_refused(
    changes: dict[str, Any], says: str, checkpoint: Callable[..., Path], tiny_deep: Path
) -> None:
    with pytest.raises(SourceError, match=says) as caught:
        opened(checkpoint(**changes), tiny_deep)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused(checkpoint: Callable[..., Path], tiny_deep: Path) -> None:
    folder = checkpoint()
    description = json.loads((folder / "tokenizer.json").read_text())
    words = description["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (folder / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(SourceError, match="is for another tokenizer"):
        opened(folder, tiny_deep)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "pytorch_model.bin"])
def test_pickles_and_flax_are_refused(name: str, checkpoint: Callable[..., Path], tiny_deep: Path) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(SourceError, match=f"has {name}, no model.safetensors: convert it to safetensors"):
        opened(folder, tiny_deep)


def test_what_is_not_there_is_said_to_be_not_there(tiny_deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match="there is no hypernetwork nobody/nothing"):
        opened("nobody/nothing", tiny_deep)


def test_the_pass_takes_it(checkpoint: Callable[..., Path], cli: Any, tmp_path: Path, make_checkpoint: Any) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    untied = make_checkpoint(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=False))
    chosen = ["--set=dynamic-tokenization.merges=50", "--set=dynamic-tokenization.prediction=zett"]
    gate = ["--set=gate.max_loss=9", "--set=gate.context=256", "--set=gate.rows=64"]
    call = ["compile", str(untied), "--passes", "dynamic-tokenization", *chosen, *gate, "-o", str(tmp_path / "out")]
    result = cli(*call)
    assert result.status == 2
    assert "go together" in result.err
    result = cli(*call, f"--set=dynamic-tokenization.zett={checkpoint()}")
    assert result.status == 0, result.err
    made = json.loads((tmp_path / "out" / "measurements.json").read_text())["passes"][0]["measured"]
    assert made["prediction"] == "zett"
