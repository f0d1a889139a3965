"""Artifacts under lm-evaluation-harness: scores by decode semantics, and a task that ships with it.

Of lm-eval's own tasks, RULER's synthetic ones run without a download; niah_single_1 is used here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from sparsec.calibrate.decode import decode_rows
from sparsec.compiler.pipeline import Job, compile_model
from sparsec.compiler.recipe import make_recipe
from sparsec.errors import ArtifactError, SparsecError, UsageError
from sparsec.plan import Plan
from sparsec.plugins.families import shape_of
from sparsec.plugins.load import load
from sparsec.plugins.runtime import install, rows_as, tensor_names

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'sparsec[lm-eval]'"
)

PAIRS = [
    ("The quick brown fox jumps over the lazy dog, and then it runs away.", " It sleeps under the old oak tree."),
    ("The quick brown fox jumps over the lazy dog, and then it runs away.", " No"),
    ("Once upon a time there was a very small language model", " that read bytes."),
    ("", "An empty context has one token."),
    ("Once upon a time there was a very small language model", "s"),  # one token: a prefill row predicts it
]
TEXT = "Local heads see a window. Retrieval heads see everything, and in decode they choose what they read of it. " * 3


@pytest.fixture(scope="module")
def make_artifact(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``make_artifact(window=..., top_p=...)``: a random model's folder with a plan, and the dense folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=2048,
    )  # fmt: skip
    random = AutoModelForCausalLM.from_pretrained(make_checkpoint(config))
    with torch.no_grad():
        for name, weight in random.named_parameters():
            if "_proj" in name and "self_attn" in name:
                weight.mul_(10)
    dense = tmp_path_factory.mktemp("dense")
    random.save_pretrained(dense)
    AutoTokenizer.from_pretrained(random.name_or_path).save_pretrained(dense)

    def make(window: int = 12, top_p: float = 0.5) -> tuple[Path, Path]:
        model = AutoModelForCausalLM.from_pretrained(dense)
        index = [{"heads": heads, "index": "full"} for heads in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 1))]
        plan = Plan.dense(shape_of(model.config), "test").edit(
            layers=index,
            window={"size": window, "sinks": 1},
            selector={
                "rank": 8, "rope": "pre", "top_p": top_p, "granularity": "token", "block": 4, "sinks": 1, "recent": 2,
            },
        )  # fmt: skip
        generator = torch.Generator().manual_seed(2)
        install(model, plan, {n: torch.randn(size, generator=generator) for n, size in tensor_names(plan).items()})
        folder = tmp_path_factory.mktemp("artifact")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
        return folder, dense

    return make


@pytest.fixture(scope="module")
def artifact(make_artifact: Any) -> Path:
    """A folder whose plan is far from dense."""
    folder: Path = make_artifact()[0]
    return folder


def lm(folder: Any, **options: Any) -> Any:
    from sparsec.plugins.lm_eval import SparsecLM

    return SparsecLM(folder if not isinstance(folder, Path) else str(folder), device="cpu", **options)


def stock(folder: Path, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", **options)


def asked(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each if isinstance(each, tuple) else (each,), n) for n, each in enumerate(arguments)]


def loglikelihoods(model: Any, pairs: list[tuple[str, str]] = PAIRS) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = model.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    return found


def encoded(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    first = tokenizer.encode(context) or [tokenizer.bos_token_id]
    return first, tokenizer.encode(continuation)


def close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


# Scores ----------------------------------------------------------------------------------------------------------


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_a_score_is_the_prompts_last_row_and_then_decode_rows(artifact: Path, batch_size: Any) -> None:
    found = loglikelihoods(lm(artifact, batch_size=batch_size, max_batch_size=8, max_length=256))
    model, tokenizer = load(artifact)
    for (context, continuation), (score, _) in zip(PAIRS, found, strict=True):
        first, rest = encoded(tokenizer, context, continuation)
        tokens = torch.tensor(first + rest)
        with rows_as("prefill"):
            last = model(tokens[None, : len(first)], use_cache=False).logits[0, -1].log_softmax(-1)
        decoded = decode_rows(model, tokens, len(first))[0] if len(rest) > 1 else torch.zeros(1)
        assert score == pytest.approx(float(last[rest[0]]) - float(decoded.double().sum()), abs=2e-3)


@needs_lm_eval
def test_one_prefill_pass_would_score_otherwise(artifact: Path) -> None:
    found = loglikelihoods(lm(artifact))
    model, tokenizer = load(artifact)
    for number, ((context, continuation), (score, _)) in enumerate(zip(PAIRS, found, strict=True)):
        first, rest = encoded(tokenizer, context, continuation)
        logits = model(torch.tensor([first + rest]), use_cache=False).logits[0, len(first) - 1 : -1]
        prefill = float(logits.log_softmax(-1).gather(-1, torch.tensor(rest)[:, None]).sum())
        assert (abs(score - prefill) > 1e-2) is (len(rest) > 1), number


@needs_lm_eval
def test_greedy_says_whether_generating_would_have_written_it(artifact: Path) -> None:
    model, tokenizer = load(artifact)
    prompt = tokenizer(PAIRS[2][0], return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=9, do_sample=False, eos_token_id=-1)[0, prompt.input_ids.shape[1] :]
    wrapper = lm(artifact)
    written = (("", ""), prompt.input_ids[0].tolist(), new.tolist())
    other = (("", ""), prompt.input_ids[0].tolist(), [*new.tolist()[:-1], int(new[-1]) ^ 1])
    found = wrapper._loglikelihood_tokens([written, other], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


@needs_lm_eval
def test_a_long_context_loses_its_beginning(artifact: Path) -> None:
    wrapper = lm(artifact, max_length=64)
    whole = loglikelihoods(wrapper, [(TEXT, " chosen")])
    close(whole, loglikelihoods(wrapper, [(TEXT[-(65 - len(" chosen")) :], " chosen")]))
    with pytest.raises(UsageError, match="longer than the model reads"):
        loglikelihoods(wrapper, [("a", TEXT)])


def rolling(model: Any, texts: list[str]) -> list[float]:
    found: list[float] = model.loglikelihood_rolling(asked("loglikelihood_rolling", list(texts)), disable_tqdm=True)
    return found


@needs_lm_eval
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_rolling_takes_a_share_of_each_window_as_prompt(artifact: Path, share: float) -> None:
    length = 128
    found = rolling(lm(artifact, max_length=length, prompt_share=share, batch_size=2), [TEXT, TEXT[7:90]])
    model, tokenizer = load(artifact)
    for score, text in zip(found, [TEXT, TEXT[7:90]], strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        total = 0.0
        for start in range(0, len(ids) - 1, length):
            # The last window reaches back as far as it can, and scores only what no window has scored.
            stop = min(start + length + 1, len(ids))
            window, seen = ids[max(0, stop - length - 1) : stop], start - max(0, stop - length - 1) + 1
            prompt = max(seen, int(share * len(window)))
            tokens = torch.tensor(window)
            with rows_as("prefill"):
                logits = model(tokens[None, :prompt], use_cache=False).logits[0]
            inside = logits.log_softmax(-1).gather(-1, tokens[1 : prompt + 1, None])[seen - 1 :].sum()
            decoded = decode_rows(model, tokens, prompt)[0].double().sum() if len(window) - prompt > 1 else 0.0
            total += float(inside) - float(decoded)
        assert score == pytest.approx(total, abs=5e-3)


# Against lm-eval's own model -------------------------------------------------------------------------------------


@needs_lm_eval
@pytest.mark.parametrize("how", ["a plan that keeps everything", "dense=True"])
def test_where_nothing_is_sparse_it_equals_lm_evals_own_model(make_artifact: Any, how: str) -> None:
    folder, dense = make_artifact() if how == "dense=True" else make_artifact(window=2048, top_p=1.0)
    options = {"batch_size": 2, "max_length": 160}
    ours, theirs = lm(folder, dense=how == "dense=True", **options), stock(dense, **options)
    close(loglikelihoods(ours), loglikelihoods(theirs))
    assert rolling(ours, [TEXT]) == pytest.approx(rolling(theirs, [TEXT]), abs=5e-3)
    until = [(context, {"until": ["\n"], "max_gen_toks": 12}) for context, _ in PAIRS if context]
    answers = [
        each.generate_until(asked("generate_until", until), disable_tqdm=True) for each in (ours, theirs, lm(folder))
    ]
    assert answers[0] == answers[1]
    assert (answers[0] == answers[2]) is (how != "dense=True")


@needs_lm_eval
def test_generation_runs_the_plan_on_padded_batches(artifact: Path) -> None:
    until = [(context, {"until": [], "max_gen_toks": 12}) for context, _ in PAIRS if context]
    found = lm(artifact, batch_size=3).generate_until(asked("generate_until", until), disable_tqdm=True)
    model, tokenizer = load(artifact)
    for (context, _), answer in zip(until, found, strict=True):
        prompt = tokenizer(context, return_tensors="pt")
        new = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True)


@needs_lm_eval
def test_chat_templates_are_applied_as_lm_eval_applies_them(artifact: Path) -> None:
    history = [{"role": "user", "content": "Hello"}]
    wrapper = lm(artifact)
    assert wrapper.apply_chat_template(history) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert wrapper.chat_template(True) == wrapper.tokenizer.chat_template


# What is refused, what is told -----------------------------------------------------------------------------------


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(SparsecError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@needs_lm_eval
def test_what_would_not_run_the_plan_is_refused(make_artifact: Any, tmp_path: Path) -> None:
    folder, dense = make_artifact()
    assert "compile it first" in refusal(lambda: lm(dense))
    assert "is no folder" in refusal(lambda: lm("org/name-that-is-no-folder"))
    assert "runs no plan" in refusal(lambda: lm(AutoModelForCausalLM.from_pretrained(dense)))
    for option in ({"peft": str(tmp_path)}, {"load_in_8bit": True}, {"gguf_file": "a.gguf"}, {"promptshare": 0.1}):
        assert "as it was compiled" in refusal(lambda option=option: lm(folder, **option))  # type: ignore[misc]
    assert "prompt_share" in refusal(lambda: lm(folder, prompt_share=1.0))
    assert "decoder" in refusal(lambda: lm(folder, backend="seq2seq"))
    (folder / "sparsec.safetensors").unlink()
    with pytest.raises(ArtifactError, match="copy the whole artifact"):
        lm(folder)


@needs_lm_eval
def test_a_result_file_says_what_ran(artifact: Path) -> None:
    told = lm(artifact).get_model_info()
    assert told["sparsec_plan"] == load(artifact).model.sparsec_plan.digest
    assert lm(artifact, dense=True).get_model_info()["sparsec_plan"] == "none: dense"
    json.dumps(told)


def run(*arguments: str | Path, code: str = "", folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True, exist_ok=True)  # there: nothing to download
    what = ["-c", code] if code else ["-m", "sparsec.plugins.lm_eval"]
    return subprocess.run(
        [sys.executable, "-P", *what, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NLTK_DATA": str(folder / "nltk")},
    )


def test_without_lm_eval_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    code = """
import runpy, sys
sys.modules["lm_eval"] = None
runpy.run_module("sparsec.plugins.lm_eval", run_name="__main__")
"""
    done = run(code=code, folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("pip install 'sparsec[lm-eval]'")


@needs_lm_eval
def test_the_command_runs_no_other_model(tmp_path: Path) -> None:
    done = run("--model", "hf", "--model_args", "pretrained=x", "--tasks", "niah_single_1", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("sparsec: only --model sparsec runs here")


# A task that ships with lm-eval ----------------------------------------------------------------------------------


def niah(folder: Path, artifact: Path, length: int, limit: int) -> list[dict[str, Any]]:
    """The samples that the command logged."""
    pytest.importorskip("wonderwords", reason="RULER's tasks need it: pip install 'sparsec[lm-eval]'")
    done = run(
        *("--model_args", f"pretrained={artifact}", "--tasks", "niah_single_1", "--limit", str(limit)),
        *("--device", "cpu", "--batch_size", "2", "--log_samples", "--output_path", folder / "results"),
        *("--metadata", json.dumps({"max_seq_lengths": [length], "pretrained": str(artifact)})),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|niah_single_1|" in done.stdout
    (results,) = (folder / "results").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["sparsec_plan"] == load(artifact).model.sparsec_plan.digest
    (samples,) = (folder / "results").rglob("samples_niah_single_1_*.jsonl")
    found: list[dict[str, Any]] = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(found) == limit
    return found


def same_answers(artifact: Path, samples: list[dict[str, Any]]) -> None:
    model, tokenizer = load(artifact)
    for sample in samples:
        prompt = tokenizer(sample["arguments"]["gen_args_0"]["arg_0"], return_tensors="pt")
        new: Tensor = model.generate(**prompt, max_new_tokens=128, do_sample=False)[0, prompt.input_ids.shape[1] :]
        # lm-eval stops at the end-of-text token and takes it off.
        assert sample["resps"][0][0].strip() == tokenizer.decode(new, skip_special_tokens=True).strip()


@needs_lm_eval
def test_a_task_that_ships_with_lm_eval_runs_the_plan(artifact: Path, tmp_path: Path) -> None:
    same_answers(artifact, niah(tmp_path, artifact, 1024, 2))


@needs_lm_eval
@pytest.mark.slow
def test_the_real_model_finds_the_needle(demo_source: Any, cache_dir: Path, tmp_path: Path) -> None:
    small = {"context": 768, "rows": 128, "windows": 2}
    recipe = {
        "passes": {"rtpurbo": {**small, "window": 128, "documents": 4, "needle_words": 16, "steps": 120}},
        "gate": {"context": 768, "max_loss": 0.1, "min_recall": 0.7},
    }
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "sources").symlink_to((cache_dir / "sources").absolute())
    out = tmp_path / "out"
    compile_model(Job("demo", out, make_recipe(recipe), cache))
    samples = niah(tmp_path, out, 768, 4)
    assert sum(sample["768"] for sample in samples) >= 2
    same_answers(out, samples)
