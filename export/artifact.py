"""Writes an artifact aside and puts it in place: whole, or not at all.

config.json, generation_config.json, tokenizer files   the model's own; config.json gains "sparsec_config"
model*.safetensors                                      the base weights: unchanged files where no pass trained them
sparsec.safetensors                                     what the plan added; model.safetensors.index.json without it
manifest.json                                           sha256 of every other file, and how it was made
golden.json                                             what the artifact does on fixed prompts
measurements.json, report.html, README.md               what was measured
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsec.errors import ArtifactError
from sparsec.export import dsa
from sparsec.export.aside import filling, locked, sync, sync_folder
from sparsec.export.manifest import as_written, sealed
from sparsec.export.tokenizer import FILE as TOKENIZER
from sparsec.export.tokenizer import OTHER_FILES, text_of
from sparsec.layout import CONFIG, MANIFEST, MEASUREMENTS, PLAN_KEY, TENSORS, is_artifact, read_json, sha256
from sparsec.plan import Plan
from sparsec.plugins.auto import write_tensors

SETTINGS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
SPARE = 64 << 20  # bytes left for reports and file-system overhead


@contextmanager
def writing(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends without an error.

    An artifact of ours under that name is replaced, another folder only with ``force``, and then it is kept as
    ``<out>.before-sparsec``.

    Raises:
        ArtifactError: the name is taken, the folder cannot be written, or the disk is full.
    """
    check_free(out, force=force)
    out = out.resolve()
    with filling(out.parent, out.name) as aside:
        yield aside
        put(aside, out)


def put(aside: Path, out: Path) -> None:
    """Push ``aside`` to the disk and rename it to ``out``; an artifact there is replaced, anything else kept."""
    out = out.resolve()
    sync(aside)
    replaced = _replaced(out)
    with locked(out.parent):
        _put_back(out)
        if replaced.exists():
            shutil.rmtree(replaced)
        try:
            if out.exists() and any(out.iterdir()):  # an empty folder gives way by itself
                out.rename(replaced if is_artifact(out) else _kept_name(out))
            aside.rename(out)
        finally:
            _put_back(out)
        sync_folder(out.parent)
        if replaced.exists():
            shutil.rmtree(replaced)


def recover(out: Path) -> None:
    """Put an artifact back that a writer had moved away when it was stopped between its two renames."""
    out = out.resolve()
    if out.parent.is_dir():
        with locked(out.parent):
            _put_back(out)


def check_free(out: Path, *, force: bool) -> None:
    """The name can be used.

    Raises:
        ArtifactError: it is a file, or a folder that sparsec did not write and force is not given, or nothing can be
            written there.
    """
    out = out.resolve()
    parent = _existing(out.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"nothing can be written in {parent}: choose another output folder")
    with locked(parent):  # another writer may just be renaming
        if out.exists() and not out.is_dir():
            raise ArtifactError(f"{out} is a file: choose another output folder")
        if out.exists() and any(out.iterdir()) and not is_artifact(out) and not force:
            raise ArtifactError(
                f"{out} exists and is no artifact of ours: choose another name, or --force moves it aside"
            )


def check_room(folder: Path, needed: int) -> None:
    """The disk holds ``needed`` bytes more.

    Raises:
        ArtifactError: it does not.
    """
    folder = _existing(folder.absolute())
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise ArtifactError(
            f"the artifact needs {(needed + SPARE) >> 20} MiB, the disk with {folder} has {free >> 20} MiB free: "
            "make room, or choose another output folder"
        )


def model_files(source: Path, weights: Sequence[Path]) -> list[Path]:
    """What an artifact takes over unchanged from a checkpoint's folder, sorted: weights, tokenizer, small settings.

    config.json is not among them, the plan goes there.
    """
    names = {file.name for file in weights}
    own = {CONFIG, MANIFEST, MEASUREMENTS, TENSORS}
    small = [file for file in source.iterdir() if file.suffix in SETTINGS and file.name not in own]
    small += source.glob("additional_chat_templates/*.jinja")
    kept = [file for file in source.iterdir() if file.name in names] + small
    return sorted(file for file in kept if file.is_file())


def write_model(
    aside: Path,
    source: Path,
    weights: Sequence[Path],
    plan: Plan,
    tensors: Mapping[str, Tensor],
    trained: Mapping[str, Tensor] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> None:
    """The model's files with the plan: all that the runtime needs.

    Args:
        aside: the folder to fill.
        source: the dense checkpoint's folder.
        weights: its safetensors files.
        plan: goes into config.json.
        tensors: the plan's, by artifact name.
        trained: base weights that passes changed, by name; they are stored in the dtype that the file has them in.
        tokenizer: another content of tokenizer.json.

    Raises:
        ArtifactError: a trained weight has no place in the files.
    """
    left = dict(trained or {})
    untied = _untied(left, weights) if plan.frozen is not None else {}
    for file in model_files(source, weights):
        if tokenizer is not None and file.name in OTHER_FILES:
            continue
        place = aside / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        stored = _stored_names(file) if file.suffix == ".safetensors" else set()
        gone = dsa.left_out(plan, stored)
        names = (stored & left.keys()) - gone
        if names or gone:
            new = {name: left.pop(name) for name, home in untied.items() if home == file.name}
            _rewrite(file, place, {name: left.pop(name) for name in names}, gone, new)
        elif file.name == INDEX:
            _rewrite_index(file, place, plan, untied)
        else:
            shutil.copyfile(file, place)
    if left:
        raise ArtifactError(
            f"the trained weight {min(left)} is not in the files of {source}: save the checkpoint again with "
            "save_pretrained of transformers and compile that"
        )
    settings = dsa.settings(plan, read_json(source / CONFIG))
    if plan.frozen is not None:
        settings |= {"vocab_size": plan.frozen.rows, "tie_word_embeddings": False}
        _suppress(aside / GENERATION, range(plan.frozen.base, plan.frozen.rows))
    if tokenizer is not None:
        (aside / TOKENIZER).write_text(text_of(tokenizer), encoding="utf-8")
    write_json(aside / CONFIG, {**settings, PLAN_KEY: plan.to_json()})
    if tensors:
        write_tensors(aside / TENSORS, tensors)
        _index(aside)


def _index(aside: Path) -> None:
    """An index of the weights where there is one file of them: vLLM loads every safetensors file that none names."""
    if (aside / SINGLE).is_file() and not (aside / INDEX).exists():
        names = sorted(_stored_names(aside / SINGLE))
        write_json(aside / INDEX, {"metadata": {}, "weight_map": dict.fromkeys(names, SINGLE)})


def _stored_names(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as stored:
        return set(stored.keys())


def _suppress(file: Path, tokens: Sequence[int]) -> None:
    """Transformers is told beside the weights that these tokens are never written."""
    settings = read_json(file) if file.is_file() else {}
    write_json(file, {**settings, "suppress_tokens": [*(settings.get("suppress_tokens") or []), *tokens]})


def _untied(left: Mapping[str, Tensor], weights: Sequence[Path]) -> dict[str, str]:
    """Weights that no file has, and the file each goes to: an output layer that was the embedding, beside that."""
    homes = {name: file.name for file in weights for name in _stored_names(file)}
    near = next((homes[name] for name in sorted(left) if name in homes), None)
    return {} if near is None else {name: near for name in left if name not in homes}


def _rewrite(file: Path, place: Path, changed: Mapping[str, Tensor], gone: set[str], new: Mapping[str, Tensor]) -> None:
    """A weights file with some tensors replaced, others left out, and others new in it."""
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys() if name not in gone}  # noqa: SIM118
        metadata = stored.metadata()
    for name, weight in changed.items():
        tensors[name] = weight.to(tensors[name].dtype).contiguous()
    for name, weight in new.items():
        tensors[name] = weight.to(tensors[next(iter(changed))].dtype).contiguous()
    save_file(tensors, place, metadata=metadata)


def _rewrite_index(file: Path, place: Path, plan: Plan, new: Mapping[str, str]) -> None:
    """The index of shards without the tensors that are left out, and with those that are new."""
    index = read_json(file)
    gone = dsa.left_out(plan, index["weight_map"])
    if not gone and not new:
        shutil.copyfile(file, place)
        return
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if name not in gone} | dict(new)
    index["metadata"] = {}  # its sizes were of the whole
    write_json(place, index)


def write_manifest(aside: Path, made: Mapping[str, Any]) -> None:
    """manifest.json over all files there are: write it last.

    Args:
        aside: the folder.
        made: how the artifact was made (source, recipe, calibration, versions).
    """
    files = {file.relative_to(aside).as_posix(): sha256(file) for file in sorted(aside.rglob("*")) if file.is_file()}
    write_json(aside / MANIFEST, sealed({**made, "files": files}))


def write_json(path: Path, data: Any) -> None:
    """Readable, stable JSON."""
    path.write_text(as_written(data), encoding="utf-8")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _put_back(out: Path) -> None:
    if not out.exists() and _replaced(out).exists():
        _replaced(out).rename(out)


def _kept_name(out: Path) -> Path:
    number, kept = 1, out.with_name(f"{out.name}.before-sparsec")
    while kept.exists():
        number += 1
        kept = out.with_name(f"{out.name}.before-sparsec-{number}")
    return kept
