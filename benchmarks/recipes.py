"""Plans and recipes of distillation side by side on development text: how near each brings the model to the dense one.

    sparsec compile demo --calibration texts/train --device cuda --tier hours --passes rtpurbo -o out/rtpurbo
    python benchmarks/recipes.py out/rtpurbo --train texts/train --dev texts/dev --device cuda --steps 300 \\
        --recipe lr=5e-5 --recipe top_k=50 --recipe labels=0.3

A recipe is options of the pass ``distill``. Judged along what the dense model says: on the last rows of text windows,
on its own answers to needles, on its own greedy continuations. Divergence and other first choices are counted a token,
which tells recipes apart long before answers found do. Evaluation text is not read. Several processes may add to one
file.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.decode import LOGITS, decode_logits
from sparsec.calibrate.long_decode import continued
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import Haystack, prompts
from sparsec.calibrate.teacher import divergence
from sparsec.calibrate.trainable import cast_weights, copied_weights, put_weights
from sparsec.compiler.commands.options import cache_dir
from sparsec.compiler.draw import drawing
from sparsec.compiler.kept_tokens import kept_tokens
from sparsec.compiler.recipe import parse_setting
from sparsec.compiler.source import load_model, load_tokenizer, open_source
from sparsec.compiler.stages import fingerprint
from sparsec.compiler.systems import Compiled, open_artifacts
from sparsec.compiler.versions import versions
from sparsec.layout import TENSORS
from sparsec.passes.base import Program
from sparsec.passes.distill import Distill
from sparsec.plan import Plan
from sparsec.plugins.auto import read_tensors
from sparsec.plugins.device import device_name
from sparsec.plugins.load import load
from sparsec.plugins.runtime import applied, tensor_names

RESULT = Path(__file__).resolve().parent / "results" / "recipes-demo.json"
TASKS = ("kv", "multikey", "passkey")
KEY = ("artifact", "plan", "files", "recipe", "steps", "dtype", "asked")
AS_IT_IS = "as it is"  # the artifact's own weights
ANSWER, TEXT = 12, 256  # tokens that dense writes after a question, and after natural text


@dataclass(frozen=True)
class Exam:
    """Windows whose rows from ``prompt`` on are compared."""

    name: str
    tokens: Tensor  # int64 [windows, length]
    prompt: int


def main() -> None:
    """Train and judge each recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifacts", type=Path, nargs="+", help="whose plans are trained, from the source's weights")
    parser.add_argument("--source", default="demo")
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--recipe", action="append", default=[], help=f"name=value,... of distill's, or '{AS_IT_IS}'")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lengths", default="2048,4096,8000")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=50, help="a task and length")
    parser.add_argument("--texts", type=int, default=32, help="continued, a length")
    parser.add_argument("--bounds", action="store_true", help="also artifacts as they are, and dense in float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="that is judged in")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    source = open_source(asked.source, cache_dir=cache_dir())
    tokenizer = load_tokenizer(source)
    model = load_model(source, device=asked.device, dtype="float32")
    artifacts = open_artifacts(asked.artifacts)
    if artifacts[0].manifest["source"]["digest"] != source.digest:
        sys.exit(f"{artifacts[0].path} was compiled from another model than {source.spec}: name it with --source")
    keep = kept_tokens(cache_dir())
    train = Calibration(read_corpus(asked.train), tokenizer, keep=keep)
    dev = Calibration(read_corpus(asked.dev), tokenizer, shares=(0.05, 0.05, 0.9), keep=keep)  # nearly all
    dense = in_dtype(model, getattr(torch, asked.dtype))
    about = {
        "command": f"python benchmarks/recipes.py {shlex.join(sys.argv[1:])}",
        "asked": {name: getattr(asked, name) for name in ("lengths", "windows", "prompts", "texts")},
        "device": device_name(model.device),
        "dtype": asked.dtype,
        "versions": versions(),
    }
    with drawing() as listen, TemporaryDirectory() as scratch:
        exams = list(_exams(asked, dense, tokenizer, dev))
        if asked.bounds:
            _add(asked.output, about | {"recipe": "dense float32", **judged(exams, dense, model)})
        before = copied_weights(model)
        recipes = dict.fromkeys([*([AS_IT_IS] if asked.bounds else []), *asked.recipe])
        for artifact, recipe in product(artifacts, recipes):
            trained = {}
            if recipe == AS_IT_IS:
                own = load(artifact.path, device=asked.device, dtype=asked.dtype, kernels="reference").model
                found = judged(exams, dense, own)
            else:
                tensors = read_tensors(artifact.path / TENSORS) if tensor_names(artifact.plan) else {}
                pass_ = Distill.model_validate({"weights": "all", "steps": asked.steps} | _options(recipe))
                trained = _train(pass_, Program(model, artifact.plan, tensors, 0, listen), train, Path(scratch))
                with _sparse(model, dense.dtype, artifact.plan, tensors) as student:
                    found = judged(exams, dense, student)
                put_weights(model, before)
            made = {"artifact": artifact.path.name, "plan": artifact.plan.digest[:16], "files": _identity(artifact)}
            _add(asked.output, about | made | {"recipe": recipe} | trained | found)
            print(f"{artifact.path.name} {recipe}: {found['score']}", file=sys.stderr, flush=True)


def _exams(asked: argparse.Namespace, dense: Any, tokenizer: Any, dev: Calibration) -> Iterator[Exam]:
    """Text, questions with dense's answers, and text that dense went on with."""
    haystack = Haystack(dev)
    for length in map(int, asked.lengths.split(",")):
        count = min(asked.windows, dev.available("heldout", length))
        yield Exam(f"text {length}", dev.windows("heldout", length, count), length - min(512, length // 4))
        for task in TASKS:
            made = prompts(task, dev, length=length, count=asked.prompts, seed=0, haystack=haystack)
            starts = torch.stack([prompt.tokens for prompt in made])
            answers = continued(dense, tokenizer, starts, ANSWER, batch_size=50)
            yield Exam(f"{task} {length}", torch.cat([starts, answers], 1), length)
        if length <= 4096:
            starts = haystack.texts(length, asked.texts, 0)[:, : length - TEXT]
            text = continued(dense, tokenizer, starts, TEXT, batch_size=64)
            yield Exam(f"greedy {length}", torch.cat([starts, text], 1), length - TEXT)


@torch.no_grad()
def judged(exams: list[Exam], dense: Any, student: Any) -> dict[str, Any]:
    """By exam: KL a row in nats, share of rows with another first choice, share of windows with none."""
    measured = {}
    for exam in exams:
        rows = exam.tokens.shape[1] - exam.prompt
        kls, other = [], []
        for part in torch.split(exam.tokens, max(1, min(8, LOGITS // (rows * int(dense.config.vocab_size))))):
            true, found = (decode_logits(model, part, exam.prompt)[0][:, :-1].float() for model in (dense, student))
            kls.append(divergence(true, found).cpu())
            other.append((true.argmax(-1) != found.argmax(-1)).cpu())
        kl, flips = torch.cat(kls), torch.cat(other)
        measured[exam.name] = {
            "kl": round(float(kl.mean()), 6),
            "other": round(float(flips.double().mean()), 5),
            "same": round(float((~flips.any(1)).double().mean()), 3),
        }
    score = sum(math.log(max(one["kl"], 1e-9)) for one in measured.values()) / len(measured)
    return {"score": round(math.exp(score), 6), "exams": measured}


def _train(pass_: Distill, program: Program, text: Calibration, scratch: Path) -> dict[str, Any]:
    """Leave the trained weights in the model. What a teacher said is asked once for all recipes with its windows."""
    same = pass_.model_dump_json(exclude={"lr", "warmup", "labels", "rest", "checks", "weights", "lora_rank"})
    folder = scratch / hashlib.sha256(same.encode()).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / "state.safetensors").unlink(missing_ok=True)  # a training run's own
    kept = Program(program.model, program.plan, program.tensors, program.seed, program.listen, folder)
    began = time.monotonic()
    result = pass_.run(kept, text)
    put_weights(program.model, dict(result.weights))
    told = {name: result.measured[name] for name in ("checks", "kl_before", "kl_best", "best_step")}
    return {"steps": pass_.steps, "seconds": round(time.monotonic() - began, 1), **told}


def _identity(artifact: Compiled) -> str:
    """Tells artifacts of one plan apart: what was fitted and trained is in no plan."""
    return fingerprint(artifact=artifact.identity)[:16]


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A copy with weights of that dtype."""
    model = copy.deepcopy(model)
    cast_weights(model, dtype)
    return model


@contextmanager
def _sparse(model: Any, dtype: torch.dtype, plan: Plan, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    student = in_dtype(model, dtype)
    with applied(student, plan, tensors):
        yield student


def _options(recipe: str) -> dict[str, Any]:
    settings = (parse_setting(f"distill.{part}") for part in recipe.split(","))
    return {name: value for _, name, value in settings}


def _add(file: Path, row: dict[str, Any]) -> None:
    """Another row; the one of the same plan, recipe, steps and exams goes."""
    with open(file, "a+", encoding="utf-8") as shared:
        fcntl.flock(shared, fcntl.LOCK_EX)
        shared.seek(0)
        text = shared.read()
        kept = json.loads(text) if text else {"rows": []}
        rows = [one for one in kept["rows"] if any(one.get(name) != row.get(name) for name in KEY)]
        shared.truncate(0)
        shared.write(json.dumps(kept | {"rows": [*rows, row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
