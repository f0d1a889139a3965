"""An artifact under EleutherAI's lm-evaluation-harness, as the model ``sparsec``; docs/lm-eval.md.

    python -m sparsec.plugins.lm_eval --model_args pretrained=out/demo --tasks niah_single_1

lm-eval's own Hugging Face model would score continuations in one forward call, all rows prefill rows: retrieval heads
would be dense and the selector would never run. Here the plan runs as it is deployed. The context is prefill rows and
the continuation decode rows (``loglikelihood``); of a text's windows a stated share is prompt, the rest decode rows
(``loglikelihood_rolling``); and answers are generated (``generate_until``). All else is lm-eval's Hugging Face model.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import find_executable_batch_size
from tqdm import tqdm

import sparsec
from sparsec.errors import SparsecError, UsageError
from sparsec.layout import read_plan
from sparsec.plugins.continuations import Window, scored_logits
from sparsec.plugins.load import load
from sparsec.plugins.runtime import uninstall

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
except ImportError as error:
    missing = UsageError(f"lm-eval is not there ({error}): pip install 'sparsec[lm-eval]'")
    if __name__ == "__main__":
        raise SystemExit(f"sparsec: {missing}") from None
    raise missing from error

NAME = "sparsec"
Request = tuple[Any, list[int], list[int]]  # cache key, context ids, continuation ids

# What HFLM loads in ways that know no plan, and the value that asks for nothing.
UNSUPPORTED: dict[str, Any] = {
    "peft": None,
    "delta": None,
    "autogptq": False,
    "gptqmodel": False,
    "gguf_file": None,
    "tp_plan": None,
    "subfolder": "",
    "max_memory_per_gpu": None,
    "max_cpu_memory": None,
}
PASSED_ON = (
    "tokenizer", "truncation", "max_length", "softmax_dtype", "mixed_precision_dtype", "batch_size", "max_batch_size",
    "trust_remote_code", "use_fast_tokenizer", "add_bos_token", "prefix_token_id", "parallelize", "think_end_token",
    "enable_thinking", "chat_template_args", "backend", "revision", "logits_cache", "offload_folder",
)  # fmt: skip

log = logging.getLogger(__name__)


@register_model(NAME)
class SparsecLM(HFLM):
    """lm-eval's ``sparsec`` model.

    Args:
        pretrained: an artifact's folder, or a model on which a plan is installed.
        device: ``cpu``, ``cuda`` or ``cuda:<n>``; None is a GPU where there is one. ``parallelize=True`` spreads the
            model over all devices.
        dtype: as for :func:`sparsec.load`.
        dense: take the plan off: the dense baseline in the same harness.
        prompt_share: share of each window of ``loglikelihood_rolling`` that is prompt, from 0 up to but not 1.
        options: HFLM's, those excepted that load other weights.

    Raises:
        UsageError: an option that cannot be, or that HFLM would load without the plan.
        ArtifactError, PlanError: as :func:`sparsec.load`.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = "auto",
        dense: bool = False,
        prompt_share: float = 0.5,
        **options: Any,
    ) -> None:
        for name, value in options.items():
            if name not in PASSED_ON and (name not in UNSUPPORTED or value != UNSUPPORTED[name]):
                raise UsageError(f"an artifact is loaded as it was compiled, {name}={value!r} cannot be: drop it")
        if not isinstance(prompt_share, int | float) or not 0 <= prompt_share < 1:
            raise UsageError(f"prompt_share is {prompt_share!r}: give a number from 0 up to but not 1")
        if options.get("backend", "default") == "seq2seq":
            raise UsageError("an artifact is a decoder: drop backend=seq2seq")
        self.dense = bool(dense)
        self.prompt_share = float(prompt_share)
        self._share = 0.0  # of the windows being scored
        if isinstance(pretrained, str | Path):
            pretrained = str(pretrained)
            read_plan(Path(pretrained))  # before lm-eval asks the Hub for a folder that is none
        elif getattr(pretrained, "sparsec_plan", None) is None:
            raise UsageError("this model runs no plan: pass an artifact's folder, or a model that sparsec.load gave")
        elif self.dense:
            uninstall(pretrained)
        self._plan_digest = ""
        options["backend"] = "causal"
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, device=place, dtype=dtype, **options)
        plan = getattr(self.model, "sparsec_plan", None)
        self._plan_digest = plan.digest if plan is not None else ""

    def _create_model(self, pretrained: str, *, dtype: Any = "auto", parallelize: Any = False, **_: Any) -> None:
        """Through :func:`sparsec.load`, which never gives a model without its plan."""
        name = str(dtype or "auto").removeprefix("torch.")
        self._model = load(pretrained, device="auto" if parallelize else str(self.device), dtype=name).model
        if self.dense:
            uninstall(self._model)

    def get_model_info(self) -> dict[str, Any]:
        """What ran, for lm-eval's result file. No Hub is asked about a folder's name."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_revision": "",
            "model_sha": "",
            "sparsec_version": sparsec.__version__,
            "sparsec_plan": self._plan_digest or "none: dense",
            "sparsec_rolling_prompt_share": self.prompt_share,
        }

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in lm-eval's disjoint windows, every token scored once.

        The first ``prompt_share`` of a window's tokens, and in any case those that an earlier window scored, are
        prefill rows; the others are decode rows.
        """
        self._share = self.prompt_share
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._share = 0.0
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would have written it."""
        # Continuations of one context stand together, so that a batch reads it once; the longest come first, so that
        # a batch that does not fit into memory shows at once.
        longest: dict[tuple[int, ...], int] = {}
        for _key, context, continuation in requests:
            longest[tuple(context)] = max(longest.get(tuple(context), 0), len(context) + len(continuation))

        def order(request: Request) -> Any:
            context = tuple(request[1])
            return -longest[context], context, -len(request[2]), tuple(request[2])

        ordered = Collator(list(requests), sort_fn=order)
        auto = self.batch_size == "auto"
        if auto and not override_bs:
            self.batch_sizes: dict[int, int] = {}
        batches = ordered.get_batched(
            n=override_bs or (0 if auto else self.batch_size),
            batch_fn=self._batch_scheduler if auto and not override_bs and requests else None,
        )
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        found = []
        for batch in batches:
            windows = [self._window(context, continuation) for _key, context, continuation in batch]
            for (key, _context, continuation), logits in zip(batch, self._logits(windows), strict=True):
                logs = torch.log_softmax(logits, -1, dtype=self.softmax_dtype)
                tokens = torch.tensor(continuation, device=logs.device)
                chosen = logs.gather(-1, tokens[:, None])[:, 0].double()
                answer = float(chosen.sum()), bool((logs.argmax(-1) == tokens).all())
                found.append(answer)
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
                bar.update(1)
        bar.close()
        return list(ordered.get_original(found))

    def _window(self, context: Sequence[int], continuation: Sequence[int]) -> Window:
        """The context's last tokens that fit, and the continuation."""
        if not context or not continuation:
            raise ValueError("a request needs a context and a continuation of one token or more")
        if len(continuation) > self.max_length:
            raise UsageError(
                f"a continuation of {len(continuation)} tokens is longer than the model reads ({self.max_length}): "
                "leave the task out or raise max_length"
            )
        whole = (*context, *continuation)
        if len(whole) > self.max_length + 1:
            log.warning("%d tokens cut from the left of a context", len(whole) - self.max_length - 1)
            whole = whole[-(self.max_length + 1) :]
        prompt = max(len(whole) - len(continuation), int(self._share * len(whole)))
        return Window(whole, min(prompt, len(whole) - 1), len(continuation))

    def _logits(self, windows: Sequence[Window]) -> list[torch.Tensor]:
        precision = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            return scored_logits(self.model, windows)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """The largest batch of windows like the longest one that fits into memory."""
        longest = self._window(*(requests[pos][1:] if requests else ([0], [0] * self.max_length)))

        @find_executable_batch_size(starting_batch_size=self.max_batch_size)
        def fitting(batch_size: int) -> int:
            # Different first tokens: equal prompts would be read once.
            rows = [(number % self.vocab_size, *longest.tokens[1:]) for number in range(batch_size)]
            self._logits([Window(row, longest.prompt, longest.scored) for row in rows])
            return batch_size

        size: int = fitting()
        if self.world_size > 1:
            size = int(self.all_gather(torch.tensor([size], device=self.device)).min())
        return size


def main() -> int:
    """lm-eval's command line with this model; other models keep to lm-eval's own command."""
    from lm_eval.__main__ import cli_evaluate

    words = sys.argv[1:]
    try:
        if words and words[0] not in ("ls", "validate", "-h", "--help"):
            for word, value in zip(words, [*words[1:], ""], strict=True):
                name, _, joined = word.partition("=")
                if name in ("--model", "-M") and (joined or value) != NAME:
                    raise UsageError(f"only --model {NAME} runs here: use lm-eval's own command for other models")
            # Behind all others, so that it also wins over a --config file.
            sys.argv += ["--model", NAME]
        cli_evaluate()
    except SparsecError as error:
        print(f"sparsec: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
