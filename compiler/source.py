"""Opens what the user named as a dense checkpoint: the demo, a GGUF file, a folder or a model on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparsec.compiler.checkpoint import check_config, read_languages, read_license, tokenizer_files, vocabulary_size
from sparsec.compiler.fetch import HUB_ID, fetch
from sparsec.compiler.filehash import combined_digest, hash_files
from sparsec.compiler.gguf import demo_file, unpack
from sparsec.compiler.quiet import transformers_call
from sparsec.compiler.weights import check_headers, check_loaded, check_values, weight_files
from sparsec.errors import SourceError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Source", "load_model", "load_tokenizer", "open_source", "weight_files"]

DEMO = "demo"
DEMO_BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Source:
    """A dense checkpoint on this machine, checked as far as its small files and the weights' headers tell."""

    spec: str
    """What the user named."""
    kind: Literal["demo", "gguf", "local", "hub"]
    path: Path
    """Folder with config.json, tokenizer files and safetensors. Never written to."""
    revision: str | None
    """The Hub's commit hash; None for other kinds."""
    digest: str
    """sha256 in hex over names and contents of config, tokenizer and weights; the same on every machine."""
    license: str | None
    """As the model card or the GGUF file declares it."""
    base_model: str | None
    """Hub id of the model, where it is known."""
    language: tuple[str, ...] = ()
    """As the model card declares them."""


def open_source(
    spec: str,
    *,
    revision: str | None = None,
    cache_dir: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> Source:
    """Open ``demo``, a ``.gguf`` file, a local folder, or a Hub id ``organisation/name``.

    Args:
        spec: what to open; a local folder wins over a Hub id of the same spelling.
        revision: branch, tag or commit of a Hub model; None is its main branch.
        cache_dir: where unpacked GGUF files and file hashes are kept. Hub models stay in the Hub's own cache.
        progress: gets a line when something starts that may take a while.

    Raises:
        UsageError: a revision for something that is not on the Hub.
        SourceError: it cannot be found, read or trusted; the message says what to do.
    """
    cache_dir = cache_dir.expanduser().absolute()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"the cache folder cannot be made ({error}): name another one") from None
    named = Path(spec).expanduser()
    is_gguf = spec == DEMO or named.suffix.lower() == ".gguf"
    is_hub = not is_gguf and not named.exists() and HUB_ID.fullmatch(spec) is not None
    if revision is not None and not is_hub:
        raise UsageError(f"only models on the Hub have a revision, and {spec} is none (or a folder here): leave it out")

    kind: Literal["demo", "gguf", "local", "hub"]
    commit = base_model = None
    if is_gguf:
        kind, base_model = ("demo", DEMO_BASE_MODEL) if spec == DEMO else ("gguf", None)
        path = _unpacked(demo_file() if spec == DEMO else named.absolute(), cache_dir, progress)
    elif is_hub:
        kind, base_model = "hub", spec
        path, commit = fetch(spec, revision, progress)
    else:
        kind, path = "local", _folder(named)
    check_config(path)
    check_headers(path)

    files = [*weight_files(path), *tokenizer_files(path), path / "config.json"]
    if (path / "generation_config.json").is_file():
        files.append(path / "generation_config.json")
    try:
        hashes = hash_files(files, cache_dir, progress)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error}): copy or download it again") from None
    digest = combined_digest({file.relative_to(path).as_posix(): sha for file, sha in hashes.items()})
    return Source(spec, kind, path, commit, digest, read_license(path), base_model, read_languages(path))


def load_model(source: Source, *, device: str = "cpu", dtype: str = "auto") -> PreTrainedModel:
    """The dense model of ``source`` in evaluation mode, all parameters without gradient.

    Args:
        source: from :func:`open_source`.
        device: ``cpu``, ``cuda``, ``cuda:<n>``, or ``auto``: spread over all GPUs and the CPU's memory.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: as config.json declares, else as stored.

    Raises:
        UsageError: an unknown device or dtype, or a GPU that is not there.
        SourceError: weights that are not finite, missing, of another shape, or too large for the device.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparsec.plugins.device import check_dtype, device_map

    check_dtype(dtype)
    place = device_map(device)
    with transformers_call(
        f"transformers cannot load {source.path}",
        "check that it fits into this machine's memory, update transformers, or name another checkpoint",
    ):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
        check_values(weight_files(source.path), config.dtype if dtype == "auto" else getattr(torch, dtype))
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                source.path,
                config=config,
                dtype=dtype,
                device_map=place,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                # Reported by check_loaded in one line.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise SourceError(
                f"{source.spec} does not fit into the memory of {device}: use dtype bfloat16, or device auto"
            ) from None
    check_loaded(info, source.path)
    model.eval()
    model.requires_grad_(False)
    return model


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of ``source``.

    Raises:
        SourceError: transformers cannot read it, or it has token ids beyond the model's embedding.
    """
    from transformers import AutoTokenizer

    with transformers_call(
        f"transformers cannot read the tokenizer in {source.path}",
        "copy the tokenizer files of the model again",
    ):
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
        last = max(tokenizer.get_vocab().values(), default=-1)
    size = vocabulary_size(source.path)
    if last < 0:
        raise SourceError(f"the tokenizer in {source.path} has no tokens: copy the tokenizer files of the model again")
    if size is not None and last >= size:
        raise SourceError(
            f"the tokenizer in {source.path} has token ids up to {last}, the embedding has {size} rows: "
            "use the tokenizer that belongs to the model"
        )
    return tokenizer


def _unpacked(file: Path, cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """The folder that GGUF ``file`` was unpacked to, checked."""
    if not file.is_file():
        raise SourceError(f"there is no file {file}: check the spelling")
    try:
        sha256 = hash_files([file], cache_dir, progress)[file]
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error}): check its permissions") from None
    path = unpack(file, sha256, cache_dir, progress)
    try:
        check_headers(path)
        tokenizer_files(path)
    except SourceError as error:
        raise SourceError(f"the unpacked copy is damaged ({error}): delete {path} and open it again") from None
    return path


def _folder(named: Path) -> Path:
    if named.is_dir():
        return named.absolute()
    if named.exists():
        raise SourceError(f"{named} is a file: name the folder that holds it, or a .gguf file")
    raise SourceError(f"there is no folder {named}: check the spelling (a model on the Hub is organisation/name)")
