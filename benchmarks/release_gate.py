"""What the release gate catches, and what it takes: `python benchmarks/release_gate.py out/demo`, about ten minutes.

Times of `sparsec verify`, with and without --quick; 200 random single-byte corruptions; and artifacts that were changed
by someone who knew about the hashes: an indexer's rows permuted, a head's class flipped, a layer's sharing changed.
Writes benchmarks/results/gate-demo.json. Wall-clock is of this machine, whatever else ran on it: `load` says how much;
`cpu` are the seconds that the command itself used, of all its threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsec.compiler.versions import versions
from sparsec.export.artifact import write_json, write_manifest
from sparsec.export.integrity import check
from sparsec.layout import CONFIG, MANIFEST, PLAN_KEY, TENSORS, read_json, read_plan

FLIPS = 200
RESULT = Path(__file__).resolve().parent / "results" / "gate-demo.json"
Change = Callable[[Path], str]


def verified(artifact: Path, *more: str) -> dict[str, Any]:
    """One run of the command."""
    load, before, began = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    line = [str(Path(sys.executable).with_name("sparsec")), "verify", str(artifact), "--json", *more]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr)
    checks = json.loads(done.stdout)["checks"]
    return {
        "status": done.returncode,
        "seconds": round(wall, 1),
        "cpu": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "load": round(load, 1),
        "checks": {kind: sum(each["status"] == kind for each in checks) for kind in ("pass", "FAIL", "not run here")},
        "failed": [f"{each['group']}: {each['name']}" for each in checks if each["status"] == "FAIL"],
        "said": next((each["said"] for each in checks if each["status"] == "FAIL" and each["name"] != "plan"), None),
    }


def corruptions(artifact: Path, count: int) -> dict[str, int]:
    """One byte of one file at a time, half of them weighted by size."""
    rng = random.Random(0)
    files = sorted(file for file in artifact.rglob("*") if file.is_file())
    sizes = [file.stat().st_size for file in files]
    picked = [*rng.choices(files, weights=sizes, k=count // 2), *rng.choices(files, k=count - count // 2)]
    caught = 0
    for file in picked:
        place = rng.randrange(file.stat().st_size)
        with file.open("r+b") as stored:
            stored.seek(place)
            (byte,) = stored.read(1)
            stored.seek(place)
            stored.write(bytes([byte ^ rng.randrange(1, 256)]))
            stored.flush()
            caught += any(not finding.good for finding in check(artifact))
            stored.seek(place)
            stored.write(bytes([byte]))
    if any(not finding.good for finding in check(artifact)):
        raise SystemExit(f"{artifact} was not put back: copy it again")
    return {"flipped": len(picked), "caught": caught}


def permuted(artifact: Path) -> str:
    """The rows of one head's key projection, by one place."""
    tensors = load_file(artifact / TENSORS)
    name = next(name for name in sorted(tensors) if "k_proj" in name)
    tensors[name][0] = tensors[name][0].roll(1, 0)
    save_file(tensors, artifact / TENSORS, metadata={"format": "pt"})
    return f"{name}, head 0: rows rolled by one"


def flipped(artifact: Path) -> str:
    """One local head of a layer without an index becomes a retrieval head."""
    plan = read_plan(artifact)
    layer = next(i for i, each in enumerate(plan.layers) if each.index == "none" and each.local)
    head = plan.layers[layer].local[-1]
    _replan(artifact, lambda layers: layers[layer]["heads"].__setitem__(head, 1))
    return f"layer {layer}, head {head}: local to retrieval"


def unkept(artifact: Path) -> str:
    """One retrieval head of a layer with an index of its own becomes local, its indexer goes."""
    plan = read_plan(artifact)
    layer = next(i for i, each in enumerate(plan.layers) if each.index == "full" and len(each.retrieval) > 1)
    head, tensors = plan.layers[layer].retrieval[0], load_file(artifact / TENSORS)
    for name in [name for name in tensors if f"layers.{layer}." in name]:
        tensors[name] = tensors[name][1:].contiguous()
    save_file(tensors, artifact / TENSORS, metadata={"format": "pt"})
    _replan(artifact, lambda layers: layers[layer]["heads"].__setitem__(head, 0))
    return f"layer {layer}, head {head}: retrieval to local"


def shared(artifact: Path) -> str:
    """One layer with an index of its own reads another's."""
    plan = read_plan(artifact)
    layer = [i for i in plan.indexed() if plan.layers[i].index == "full"][-1]
    kept = {name: tensor for name, tensor in load_file(artifact / TENSORS).items() if f"layers.{layer}." not in name}
    save_file(kept, artifact / TENSORS, metadata={"format": "pt"})
    _replan(artifact, lambda layers: layers[layer].update(index="shared"))
    return f"layer {layer}: an index of its own to that of layer {read_plan(artifact).index_source(layer)}"


CHANGES: dict[str, Change] = {
    "an indexer's rows permuted": permuted,
    "a local head made a retrieval head": flipped,
    "a retrieval head made local": unkept,
    "a layer's sharing changed": shared,
}


def changed(artifact: Path, change: Change) -> dict[str, Any]:
    """A copy, changed and hashed again as if it had been compiled so."""
    what = change(artifact)
    made = read_json(artifact / MANIFEST)
    (artifact / MANIFEST).unlink()
    write_manifest(artifact, {key: value for key, value in made.items() if key not in ("files", "digest")})
    whole = all(finding.good for finding in check(artifact))
    return {"what": what, "hashes hold": whole, **verified(artifact, "--quick")}


def copied(artifact: Path, place: Path) -> Path:
    """With the base weights as another name of the same file: nothing here writes into them."""

    def copy(source: str, target: str) -> None:
        if Path(source).name.startswith("model") and source.endswith(".safetensors"):
            os.link(source, target)
        else:
            shutil.copyfile(source, target)

    return Path(shutil.copytree(artifact, place, copy_function=copy))


def _replan(artifact: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    config = read_json(artifact / CONFIG)
    change(config[PLAN_KEY]["layers"])
    write_json(artifact / CONFIG, config)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What the release gate catches, and what it takes.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    parser.add_argument("--flips", type=int, default=FLIPS)
    asked = parser.parse_args()
    result: dict[str, Any] = {"plan": read_plan(asked.artifact).digest}
    result["quick"] = verified(asked.artifact, "--quick")
    result["whole"] = verified(asked.artifact)
    with tempfile.TemporaryDirectory(dir=asked.artifact.absolute().parent) as scratch:
        result["changed"] = {
            name: changed(copied(asked.artifact, Path(scratch) / str(number)), change)
            for number, (name, change) in enumerate(CHANGES.items())
        }
        result["corruptions"] = corruptions(
            Path(shutil.copytree(asked.artifact, Path(scratch) / "flipped")), asked.flips
        )
    result |= {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "command": shlex.join(["python", *sys.argv]),
    }
    asked.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
