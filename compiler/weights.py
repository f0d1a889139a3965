"""The safetensors files of a checkpoint: which they are, and whether they are whole and hold real numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import SourceError

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Elements looked at in one go: bounds the check's scratch memory to about 200 MiB.
CHUNK = 1 << 24


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that the checkpoint in folder ``path`` uses, each once, sorted by name.

    Raises:
        SourceError: there are none, only pickles, or the index is damaged or names a file that is missing.
    """
    single, index = path / SINGLE, path / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        if single.is_symlink() or index.is_symlink():
            raise SourceError(f"{single.name} in {path} is a broken link: download the checkpoint again")
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise SourceError(
                f"{path} holds only pickled weights ({pickles[0]}), and unpickling can run any code: "
                "if you trust them, convert them with from_pretrained and save_pretrained of transformers"
            )
        raise SourceError(f"{path} has no weights: it needs {SINGLE}, or {INDEX} and its shards")
    files = [path / name for name in sorted(set(read_index(path).values()))]
    for file in files:
        if not file.is_file():
            raise SourceError(
                f"{INDEX} names {file.name}, which is missing in {path}: copy or download that file again"
            )
    return files


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard's file name, from the index of folder ``path``; empty for an unsharded checkpoint.

    Raises:
        SourceError: the index is no index, or names files outside the folder.
    """
    index = path / INDEX
    if (path / SINGLE).is_file() or not index.is_file():
        return {}
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(shard) for tensor, shard in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        names = {}
    if not names:
        raise SourceError(f"{index} is no index of safetensors shards: download that file again")
    for shard in names.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise SourceError(f"{index} names {shard!r}, which is no safetensors file beside it: do not use it")
    return names


def check_headers(path: Path) -> None:
    """Check that every weight file in ``path`` is whole: a sane header, and as many bytes as it promises.

    Raises:
        SourceError: a file is truncated or no safetensors file, or lacks a tensor that the index puts there.
    """
    from safetensors import SafetensorError, safe_open

    index = read_index(path)
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = set(tensors.keys())
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise SourceError(f"{file} is damaged ({reason}): copy or download that file again") from None
        if not names:
            raise SourceError(f"{file} holds no tensors: copy or download that file again")
        lost = sorted(tensor for tensor, shard in index.items() if shard == file.name and tensor not in names)
        if lost:
            raise SourceError(f"{file} lacks {lost[0]}, which {INDEX} puts there: download both files again")


def check_values(files: Sequence[Path], dtype: torch.dtype | None = None) -> None:
    """Check that all weights are finite, and stay finite in ``dtype`` if it is float16; one tensor at a time.

    Raises:
        SourceError: names the first tensor with NaN or infinity, or the first that float16 cannot hold.
    """
    import torch
    from safetensors import safe_open

    limit = torch.finfo(torch.float16).max if dtype is torch.float16 else None
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in list(tensors.keys()):
                tensor = tensors.get_tensor(name)
                if not tensor.is_floating_point():
                    continue
                for part in tensor.reshape(-1).split(CHUNK):
                    if not torch.isfinite(part).all():
                        raise SourceError(
                            f"{name} in {file} holds NaN or infinity: download the file again, "
                            "or name a checkpoint from before its training diverged"
                        )
                    if limit is not None and part.numel() and part.abs().max() > limit:
                        raise SourceError(f"{name} in {file} overflows float16: use dtype bfloat16 or float32")


def check_loaded(info: dict[str, Any], source: Path) -> None:
    """Check transformers' loading report (``output_loading_info``): every tensor came from ``source``.

    Raises:
        SourceError: tensors are missing or have another shape than the config asks for; names the first.
    """
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise SourceError(
            f"{name} in {source} has shape {list(found)}, its config asks for {list(wanted)}: "
            "take config and weights of the same model"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise SourceError(
            f"{source} lacks {', '.join(missing[:3])}{more}, which the model needs: "
            "take config and weights of the same model"
        )
