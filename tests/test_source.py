"""Opening checkpoints: what is opened, what is refused, and with which words."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opening import Opened, edit, logits, refusal, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from sparsec.compiler.filehash import hash_files
from sparsec.compiler.source import Source, load_model, load_tokenizer, open_source, weight_files
from sparsec.errors import UsageError

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


# A local folder


def test_a_folder_opens_as_the_model_that_was_saved(tiny_llama: Path, opened: Opened) -> None:
    source = opened(tiny_llama)
    model = load_model(source)
    assert (source.kind, source.revision, source.license) == ("local", None, None)
    assert source.path == tiny_llama
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny_llama)))


def test_text_survives_the_tokenizer(tiny_llama: Path, opened: Opened) -> None:
    tokenizer = load_tokenizer(opened(tiny_llama))
    text = "naïve  1\n2\t🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 2


def test_shards_are_listed_once_and_sorted(make_checkpoint: Callable[..., Path], opened: Opened) -> None:
    path = make_checkpoint(tiny_config(), max_shard_size="40KB")
    files = weight_files(path)
    assert len(files) > 1
    assert files == sorted(path.glob("model-*.safetensors"))
    whole = make_checkpoint(tiny_config())
    assert torch.equal(logits(load_model(opened(path))), logits(load_model(opened(whole))))


def test_tied_embeddings_stay_tied(make_checkpoint: Callable[..., Path], opened: Opened) -> None:
    model = load_model(opened(make_checkpoint(tiny_config(tie_word_embeddings=True))))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_weights_have_the_dtype_asked_for(tiny_llama: Path, opened: Opened, dtype: str, expected: torch.dtype) -> None:
    model = load_model(opened(tiny_llama), dtype=dtype, device="auto")
    assert {p.dtype for p in model.parameters()} == {expected}


def test_dtype_auto_is_what_the_checkpoint_declares(make_checkpoint: Callable[..., Path], opened: Opened) -> None:
    assert load_model(opened(make_checkpoint(tiny_config(dtype="bfloat16")))).dtype == torch.bfloat16


def test_the_users_folder_is_never_written(tiny_llama: Path, opened: Opened) -> None:
    def state() -> list[tuple[str, int, int]]:
        return sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in [tiny_llama, *tiny_llama.iterdir()])

    before = state()
    source = opened(tiny_llama)
    load_model(source)
    load_tokenizer(source)
    assert state() == before


def test_transformers_is_quiet_and_left_as_it_was(
    tiny_llama: Path, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    level = logging.get_verbosity()
    source = opened(tiny_llama)
    load_model(source)
    load_tokenizer(source)
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == level
    assert logging.is_progress_bar_enabled()


def test_the_model_card_gives_the_license(folder: Path, opened: Opened) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    assert opened(folder).license == "mit"
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\n---\n")
    assert opened(folder).license == "llama3"
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert opened(folder).license is None


# The digest


def test_the_digest_is_the_same_wherever_the_files_lie(tiny_llama: Path, folder: Path, opened: Opened) -> None:
    (folder / "README.md").write_text("Not part of the model.")
    assert opened(folder).digest == opened(tiny_llama).digest


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"],
)
def test_the_digest_changes_with_every_file_that_matters(folder: Path, opened: Opened, name: str) -> None:
    before = opened(folder).digest
    content = (folder / name).read_bytes()
    # White space in JSON, the last weight's lowest byte in safetensors: still a valid checkpoint.
    changed = content + b"\n" if name.endswith(".json") else content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]
    (folder / name).write_bytes(changed)
    assert opened(folder).digest != before


def test_a_hash_is_remembered_while_the_file_stays_the_same(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    os.utime(file, (time.time() - 60,) * 2)
    first = hash_files([file], tmp_path)[file]
    store = tmp_path / "hashes.json"
    store.write_text(store.read_text().replace(first, "remembered"))
    assert hash_files([file], tmp_path)[file] == "remembered"
    file.write_bytes(b"two")
    assert hash_files([file], tmp_path)[file] not in (first, "remembered")


def test_a_file_written_just_now_is_hashed_again(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    hash_files([file], tmp_path)
    assert not (tmp_path / "hashes.json").exists()


def test_a_damaged_hash_cache_is_rebuilt(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    os.utime(file, (time.time() - 60,) * 2)
    first = hash_files([file], tmp_path)[file]
    (tmp_path / "hashes.json").write_text("{")
    assert hash_files([file], tmp_path)[file] == first
    assert first in (tmp_path / "hashes.json").read_text()


# What is refused before loading


def drop(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def write(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_naming(shard: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        names = dict.fromkeys(
            load_file(folder / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"
        )
        index = {"weight_map": {**names, "lm_head.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def rewrite(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def config(**changes: Any) -> Damage:
    return lambda folder: edit(folder / "config.json", **changes)


REFUSED_FOLDERS: dict[str, tuple[Damage, str]] = {
    "no config": (drop("config.json"), "has no config.json"),
    "config is no JSON": (write("config.json", "{oops"), "no readable JSON"),
    "config is a list": (write("config.json", "[]"), "no JSON object"),
    "config is binary": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\0"),
        "no readable JSON",
    ),
    "no model type": (config(model_type=None), "transformers cannot read"),
    "model type is a list": (config(model_type=["llama"]), "transformers cannot read"),
    "config is nested without end": (write("config.json", "[" * 100_000), "no readable JSON"),
    "unheard-of model type": (config(model_type="unheard-of"), "update transformers"),
    "generation config is no JSON": (write("generation_config.json", "{"), "no readable JSON"),
    "no weights": (drop("model.safetensors"), "has no weights"),
    "pickles only": (pickles_only, "pickled weights (pytorch_model.bin)"),
    "shard missing": (
        index_naming("model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors, which is",
    ),
    "shard elsewhere": (index_naming("../secret.safetensors"), "no safetensors file beside it"),
    "index is no JSON": (
        lambda folder: [
            drop("model.safetensors")(folder),
            write("model.safetensors.index.json", "{")(folder),
        ],
        "no index of safetensors",
    ),
    "truncated": (rewrite(lambda data: data[:-100]), "is damaged"),
    "a tail too long": (rewrite(lambda data: data + b"\0" * 8), "is damaged"),
    "empty file": (rewrite(lambda data: b""), "is damaged"),
    "absurd header length": (rewrite(lambda data: (1 << 60).to_bytes(8, "little") + data[8:]), "is damaged"),
    "header beyond the file": (
        rewrite(lambda data: len(data).to_bytes(8, "little") + data[8:]),
        "is damaged",
    ),
    "garbage header": (rewrite(lambda data: data[:8] + b"\x07" * 64 + data[72:]), "is damaged"),
    "no tokenizer": (drop("tokenizer.json"), "has no tokenizer"),
    "special id too large": (config(eos_token_id=272), "eos_token_id 272"),
    "one of several special ids too large": (
        lambda folder: edit(folder / "generation_config.json", eos_token_id=[2, 9999]),
        "eos_token_id 9999",
    ),
    "remote code": (
        config(model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}),
        "remote code is never run",
    ),
    "kernel from the Hub": (config(attn_implementation="somebody/kernel"), "remote code is never run"),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised (gptq)"),
    "adapter": (write("adapter_config.json", "{}"), "merge it"),
    "weight file named in the config": (config(transformers_weights="other.safetensors"), "rename"),
}


@pytest.mark.parametrize("case", REFUSED_FOLDERS)
def test_a_folder_that_is_no_dense_checkpoint_is_refused(folder: Path, opened: Opened, case: str) -> None:
    damage, words = REFUSED_FOLDERS[case]
    damage(folder)
    assert words in refusal(lambda: opened(folder))


def test_a_shard_without_a_tensor_that_the_index_puts_there_is_refused(folder: Path, opened: Opened) -> None:
    index_naming("model-00002-of-00002.safetensors")(folder)
    save_file({"other": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    assert "lacks lm_head.weight" in refusal(lambda: opened(folder))


def test_code_in_the_folder_is_never_run(folder: Path, opened: Opened) -> None:
    trap = folder / "ran"
    code = f"from pathlib import Path\nPath({str(trap)!r}).touch()\n"
    for name in ("modeling_llama.py", "configuration_llama.py", "tokenization_evil.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_llama.C", "AutoModelForCausalLM": "modeling_llama.M"}
    edit(folder / "config.json", auto_map=auto_map)
    load_model(opened(folder))  # transformers has a class of its own
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]},
    )
    refusal(lambda: load_tokenizer(opened(folder)))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("./nowhere", "no folder"),
        ("gpt2", "organisation/name"),
        ("nowhere.gguf", "no file"),
        ("/a/b/c", "no folder"),
    ],
)
def test_what_is_not_there_is_said_to_be_missing(opened: Opened, spec: str, words: str) -> None:
    assert words in refusal(lambda: opened(spec))


def test_a_file_is_no_folder(folder: Path, opened: Opened) -> None:
    assert "is a file" in refusal(lambda: opened(folder / "model.safetensors"))


def test_a_revision_needs_a_hub_model(folder: Path, opened: Opened) -> None:
    assert "revision" in refusal(lambda: opened(folder, revision="main"), UsageError)


def test_a_cache_that_cannot_be_made_is_an_error(folder: Path) -> None:
    message = refusal(lambda: open_source(str(folder), cache_dir=folder / "config.json" / "cache"))
    assert "cache folder" in message


# What is refused on loading


def retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def poison(name: str, value: float) -> Damage:
    return retensor(lambda tensors: tensors[name].view(-1)[-1:].fill_(value))


NORM = "model.norm.weight"
REFUSED_WEIGHTS: dict[str, tuple[Damage, dict[str, str], str]] = {
    "NaN": (poison(NORM, float("nan")), {}, f"{NORM} in"),
    "infinity": (poison("lm_head.weight", float("-inf")), {}, "lm_head.weight in"),
    "too large for float16": (poison(NORM, 1e5), {"dtype": "float16"}, "overflows float16"),
    "missing": (
        retensor(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        {},
        "lacks model.layers.1.mlp",
    ),
    "untied head missing": (retensor(lambda t: t.pop("lm_head.weight")), {}, "lacks lm_head.weight"),
    "another shape": (config(intermediate_size=48), {}, "has shape"),
    "more layers than weights": (config(num_hidden_layers=3), {}, "and 6 more"),
    "vocabulary of another size": (config(vocab_size=300), {}, "shape [272, 32]"),
}


@pytest.mark.parametrize("case", REFUSED_WEIGHTS)
def test_weights_that_are_not_the_models_are_refused(folder: Path, opened: Opened, case: str) -> None:
    damage, options, words = REFUSED_WEIGHTS[case]
    damage(folder)
    source = opened(folder)
    assert words in refusal(lambda: load_model(source, **options))


def test_large_finite_weights_load_where_the_dtype_holds_them(folder: Path, opened: Opened) -> None:
    poison(NORM, 1e5)(folder)
    load_model(opened(folder), dtype="bfloat16")


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(folder: Path, opened: Opened) -> None:
    retensor(lambda t: t.update({n: t[n][:100].clone() for n in ("lm_head.weight", "model.embed_tokens.weight")}))(
        folder
    )
    edit(folder / "config.json", vocab_size=100)
    source = opened(folder)
    assert load_model(source).get_input_embeddings().num_embeddings == 100
    assert "token ids up to 258, the embedding has 100 rows" in refusal(lambda: load_tokenizer(source))


def test_a_tokenizer_that_cannot_be_read_is_refused(folder: Path, opened: Opened) -> None:
    (folder / "tokenizer.json").write_text("{}")
    refusal(lambda: load_tokenizer(opened(folder)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "cuda:x"}, "unknown device"),
        ({"device": "cuda:99"}, "device cuda:99"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"dtype": ""}, "unknown dtype"),
    ],
)
def test_a_device_or_dtype_that_cannot_be_is_a_usage_error(
    tiny_llama: Path, opened: Opened, options: dict[str, str], words: str
) -> None:
    source = opened(tiny_llama)
    assert words in refusal(lambda: load_model(source, **options), UsageError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_a_usage_error(tiny_llama: Path, opened: Opened) -> None:
    assert "use cpu" in refusal(lambda: load_model(opened(tiny_llama), device="cuda"), UsageError)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto"])
def test_the_model_goes_to_the_gpu(tiny_llama: Path, opened: Opened, device: str) -> None:
    model = load_model(opened(tiny_llama), device=device)
    assert {p.device for p in model.parameters()} == {torch.device("cuda:0")}


# The demo


@pytest.fixture(scope="module")
def demo_model(demo_source: Source) -> Any:
    return load_model(demo_source)


def test_the_demo_is_smollm2(demo_source: Source, demo_model: Any) -> None:
    assert (demo_source.spec, demo_source.kind, demo_source.license) == ("demo", "demo", "apache-2.0")
    assert demo_source.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    shape = demo_model.config
    assert (shape.num_hidden_layers, shape.num_attention_heads, shape.num_key_value_heads) == (30, 9, 3)
    assert (shape.max_position_embeddings, shape.rope_parameters["rope_theta"]) == (8192, 1e5)
    assert demo_model.dtype == torch.float32
    assert demo_model.lm_head.weight is demo_model.model.embed_tokens.weight


def test_the_demo_answers_and_stops(demo_source: Source, demo_model: Any) -> None:
    tokenizer = load_tokenizer(demo_source)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = demo_model.generate(**prompt, max_new_tokens=32, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
