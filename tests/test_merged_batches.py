"""Merged tokens of a batch of its own: what a call merges, keeps, saves and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsec
from sparsec.calibrate.decode import decode_logits
from sparsec.plugins.vocabulary import read


@pytest.fixture(scope="module")
def dynamic(cli: Any, tiny_deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model compiled to merge each batch, by a hypernetwork, with windows on top."""
    out = tmp_path_factory.mktemp("dynamic") / "out"
    options = {"mode": "dynamic", "merges": 200, "imitation_steps": 4, "steps": 2, "windows": 8, "context": 64}
    chosen = [f"--set=dynamic-tokenization.{name}={value}" for name, value in options.items()]
    gate = ["--set=window.window=64", "--set=gate.max_loss=9", "--set=gate.context=256", "--set=gate.rows=64"]
    result = cli("compile", str(tiny_deep), "--passes", "window,dynamic-tokenization", *chosen, *gate, "-o", str(out))
    assert result.status == 0, result.err
    return out


def test_merging_by_the_batch_keeps_the_base_model_for_others(dynamic: Path, tiny_deep: Path) -> None:
    config, before = (json.loads((each / "config.json").read_text()) for each in (dynamic, tiny_deep))
    assert config["vocab_size"] == before["vocab_size"]
    assert (dynamic / "tokenizer.json").read_text() == (tiny_deep / "tokenizer.json").read_text()
    from transformers import LlamaForCausalLM

    ids = torch.arange(3, 60)[None]
    stock, base = (LlamaForCausalLM.from_pretrained(each) for each in (dynamic, tiny_deep))
    assert torch.equal(stock(ids).logits, base(ids).logits)
    page = (dynamic / "report.html").read_text(encoding="utf-8")
    assert "by sparsec.load alone" in page


def test_a_batch_is_merged_by_itself(dynamic: Path) -> None:
    model, tokenizer = sparsec.load(dynamic)
    own = model.sparsec_plan.vocabulary
    assert (own.mode, own.prediction) == ("dynamic", "hypernetwork")
    here, there = (
        tokenizer(text * 3, return_tensors="pt")["input_ids"][:, :80]
        for text in ("the value of the function is the same, ", "never had another sailor seen so calm a sea, ")
    )
    alone, mask = read(model, here)
    assert alone.shape[1] < here.shape[1]
    assert mask.all()
    assert int(alone.max()) >= own.base
    rows = model.get_input_embeddings().weight[own.base :].clone()
    assert (rows[: int(alone.max()) - own.base + 1].abs().sum(-1) > 0).all()
    both, mask = read(model, torch.cat([here, there]))
    assert both.shape[0] == 2
    assert not torch.equal(model.get_input_embeddings().weight[own.base :], rows)  # the rows are this batch's now
    # What the merges make of a prompt is its text, piece by piece.
    again, _ = read(model, here)
    assert torch.equal(again, alone)
    out = model.generate(again, max_new_tokens=20, do_sample=True, temperature=5.0)
    assert (out[:, again.shape[1] :] < own.base).all()


def test_the_cache_holds_what_was_read_when_the_next_batch_comes(dynamic: Path) -> None:
    model, tokenizer = sparsec.load(dynamic)
    ids = tokenizer("the value of the function is the same, " * 3, return_tensors="pt")["input_ids"][:, :80]
    whole, size = decode_logits(model, ids, 60)
    read(model, ids.flip(-1))
    again, _ = decode_logits(model, ids, 60)
    assert torch.equal(whole, again)
    assert size > 0


def test_merging_by_the_batch_survives_saving(dynamic: Path, tmp_path: Path) -> None:
    model, tokenizer = sparsec.load(dynamic)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    other, _ = sparsec.load(tmp_path / "again")
    ids = tokenizer("the value of the function is the same, " * 3, return_tensors="pt")["input_ids"]
    assert torch.equal(read(model, ids)[0], read(other, ids)[0])
    assert torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_heuristics_that_need_a_table_are_refused_in_a_batch(cli: Any, tiny_deep: Path, tmp_path: Path) -> None:
    chosen = ["--set=dynamic-tokenization.mode=dynamic", "--set=dynamic-tokenization.prediction=hybrid"]
    result = cli("compile", str(tiny_deep), "--passes", "dynamic-tokenization", *chosen, "-o", str(tmp_path / "out"))
    assert result.status == 2
    assert "take mean or hypernetwork" in result.err
    assert not (tmp_path / "out").exists()


def test_eval_and_generate_merge_by_the_batch(dynamic: Path, cli: Any, tmp_path: Path) -> None:
    result = cli("generate", str(dynamic), "the value of the function is the same, " * 4, "--json", "--raw")
    assert result.status == 0, result.err
    _, tokenizer = sparsec.load(dynamic)
    plain = tokenizer("the value of the function is the same, " * 4)["input_ids"]
    assert json.loads(result.out)["prompt_tokens"] < len(plain)
    few = ["--lengths", "256", "--prompts", "0", "--windows", "1", "--systems", "dense,artifact"]
    result = cli("eval", str(dynamic), *few, "-o", str(tmp_path / "eval.json"))
    assert result.status == 0, result.err
    dense, own = json.loads((tmp_path / "eval.json").read_text())["cells"]
    assert dense["bytes"] == own["bytes"]
    assert own["kv_bytes"] < dense["kv_bytes"]
    assert dense["bits_per_byte"] != own["bits_per_byte"]


def test_merging_by_the_batch_is_not_exported(dynamic: Path, cli: Any) -> None:
    result = cli("export", str(dynamic), "--to", "onnx")
    assert result.status == 1
    assert "merged by the batch cannot be exported" in result.err
