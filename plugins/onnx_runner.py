"""Runs exported graphs with ONNX Runtime: prompts, decode steps, ``generate``. Needs neither PyTorch nor a tokenizer.

    model = OnnxModel("out/demo/onnx")
    for tokens in model.stream([[1, 2, 3]], max_new_tokens=20): ...

Stores are buffers of the runner's own. A decode step writes into them in place: each is bound as input and as output.
Stores of full KV heads have ``slots`` that grow; rings have a fixed size.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.errors import ArtifactError, UsageError

FOLDER = "onnx"
MANIFEST = "export.json"
SLOTS = 256  # stores grow by so many tokens
CHUNK = 512  # prompt rows a call
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxModel:
    """An exported model and the stores of the sequences that it is reading.

    Args:
        folder: ``<artifact>/onnx``.
        device: ``cpu`` or ``cuda``; None: CUDA where this ONNX Runtime has it.
        threads: of ONNX Runtime; 0: as it likes.

    Raises:
        UsageError: ONNX Runtime is missing, too old for the file, or has no such device.
        ArtifactError: no export, or a damaged one.
    """

    def __init__(self, folder: str | Path, *, device: str | None = None, threads: int = 0) -> None:
        self.folder = Path(folder)
        self.manifest = _manifest(self.folder)
        ort = _runtime()
        self.device = device or ("cuda" if PROVIDERS["cuda"] in ort.get_available_providers() else "cpu")
        if PROVIDERS.get(self.device) not in ort.get_available_providers():
            raise UsageError(f"ONNX Runtime has no device {self.device!r} here: use cpu, or install onnxruntime-gpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        providers = list(dict.fromkeys((PROVIDERS[self.device], PROVIDERS["cpu"])))
        self._ort, self._sessions = ort, {}
        for kind in ("prefill", "decode"):
            try:
                self._sessions[kind] = ort.InferenceSession(str(self.folder / f"{kind}.onnx"), options, providers)
            except Exception as error:  # ONNX Runtime has no base class for its errors
                reason = " ".join(str(error).split())[:240]
                raise ArtifactError(
                    f"ONNX Runtime {ort.__version__} cannot load {self.folder / kind}.onnx ({reason}): "
                    "update onnxruntime, or export again"
                ) from None
        self._inputs = {
            each.name: each for each in self._sessions["decode"].get_inputs() if each.name.startswith("past.")
        }
        self.lengths = np.zeros(0, np.int64)  # [batch] tokens stored
        self.slots = 0
        self._stores: dict[str, Any] = {}

    def reset(self, batch: int = 1) -> None:
        """Forget everything; so many sequences begin."""
        self.lengths, self.slots = np.zeros(batch, np.int64), 0
        self._stores = {name: self._empty(name, batch, 0) for name in self._inputs}

    @property
    def kv_bytes(self) -> int:
        """Bytes of all stores as allocated."""
        return sum(int(np.prod(store.shape())) * self._type(name)().itemsize for name, store in self._stores.items())

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Read more tokens of every sequence as prompt rows: logits behind each last one, [batch, vocabulary]."""
        if not self._stores:
            self.reset(len(prompts))
        logits: np.ndarray | None = None
        longest = max(map(len, prompts))
        for start in range(0, longest, CHUNK):
            parts = [list(prompt[start : start + CHUNK]) for prompt in prompts]
            added = np.array([len(part) for part in parts])
            rows = int(added.max())
            ids = np.array([part + [0] * (rows - len(part)) for part in parts])
            found = self._run("prefill", ids, added)
            logits = found if logits is None else np.where(added[:, None] > 0, found, logits)
        assert logits is not None
        return logits

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """One decode row of every sequence: float32 logits, [batch, vocabulary]."""
        return self._run("decode", np.array(tokens)[:, None], np.ones(len(tokens), np.int64))

    def stream(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Collection[int] | None = None
    ) -> Iterator[list[int | None]]:
        """Greedy tokens as they come, one of every sequence; None behind its end.

        Args:
            prompts: token ids; what is stored is forgotten first.
            stop: tokens that end a sequence; None: the model's own.
        """
        ends = set(self.manifest["eos"] if stop is None else stop)
        never = [token for first, behind in self.manifest.get("suppress", ()) for token in range(first, behind)]
        self.reset(len(prompts))
        logits = self.prefill(prompts)
        open_ = np.ones(len(prompts), bool)
        for count in range(max_new_tokens):
            if never:  # as generation_config.json says, merged tokens among them
                logits = logits.copy()
                logits[:, never] = -np.inf
            tokens = logits.argmax(-1)
            yield [int(token) if there else None for token, there in zip(tokens, open_, strict=True)]
            open_ &= ~np.isin(tokens, list(ends))
            if not open_.any() or count == max_new_tokens - 1:
                return
            logits = self.step(tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Collection[int] | None = None
    ) -> list[list[int]]:
        """:meth:`stream` to its end: the new tokens of every sequence, the one that ended it included."""
        found: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens=max_new_tokens, stop=stop):
            for own, token in zip(found, tokens, strict=True):
                if token is not None:
                    own.append(token)
        return found

    def _run(self, kind: str, ids: np.ndarray, added: np.ndarray) -> np.ndarray:
        self._reserve(int(self.lengths.max(initial=0)) + ids.shape[1])
        session = self._sessions[kind]
        binding = session.io_binding()
        feeds = {"input_ids": ids.astype(np.int64), "lengths": self.lengths, "added": added.astype(np.int64)}
        taken = {each.name for each in session.get_inputs()}
        for name, value in feeds.items():
            if name in taken:
                binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        after = {}
        for name, store in self._stores.items():
            # A prompt's attention reads a ring as it was, so what becomes of the ring goes elsewhere; index keys
            # are chosen slot by slot, not written over.
            aside = kind == "prefill" and (".local_" in name or name.endswith(".index_keys"))
            after[name] = self._empty(name, len(ids), self.slots) if aside else store
            binding.bind_ortvalue_input(name, store)
            binding.bind_ortvalue_output(name.replace("past.", "present."), after[name])
        session.run_with_iobinding(binding)
        self._stores = after
        self.lengths = self.lengths + added
        logits: np.ndarray = binding.get_outputs()[0].numpy()
        return logits.astype(np.float32, copy=False)

    def _type(self, name: str) -> Any:
        return TYPES[self._inputs[name].type]

    def _empty(self, name: str, batch: int, slots: int) -> Any:
        shape = [{"batch": batch, "slots": slots}.get(size, size) for size in self._inputs[name].shape]
        return self._value(np.zeros(shape, self._type(name)))

    def _value(self, array: np.ndarray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def _reserve(self, needed: int) -> None:
        """Room for so many tokens a sequence."""
        if needed <= self.slots:
            return
        before, self.slots = self.slots, -(-needed // SLOTS) * SLOTS
        for name, store in self._stores.items():
            if "slots" not in self._inputs[name].shape:
                continue
            grown = np.zeros((*store.shape()[:2], self.slots, store.shape()[3]), self._type(name))
            grown[:, :, :before] = store.numpy()
            self._stores[name] = self._value(grown)


def _manifest(folder: Path) -> dict[str, Any]:
    """What the exporter wrote beside the graphs.

    Raises:
        ArtifactError: there is none.
    """
    try:
        made: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ArtifactError(f"{folder} holds no ONNX export: sparsec export {folder.parent} --to onnx") from None
    return made


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError("ONNX Runtime is not installed: pip install 'sparsec[onnx]'") from None
    return onnxruntime
