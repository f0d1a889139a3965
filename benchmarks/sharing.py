"""Patterns of sharing at equal keep, trained or not, on text that no search read: the demo model's indexers.

    sparsec compile demo --passes rtpurbo --calibration texts/train -o out/split
    sparsec compile demo --passes rtpurbo --set rtpurbo.per_layer=1 --calibration texts/train -o out/every
    python benchmarks/sharing.py out/every out/split --texts texts/eval/*.txt --device cuda --jobs 8

Writes benchmarks/results/sharing-demo.json. Searched, one-shot, uniform and overlap-ranked patterns against no sharing
(a set a layer): bits per byte with standard errors over windows, needles, and the true attention mass that sets find.
Searches read 1, 3 and 9 windows, to see how much text they need; the last one's patterns are also trained and asked for
needles, and ``lazy`` stands beside it. Held-out text is that of ``--texts`` and of what the artifacts were compiled on.

Jobs run side by side, since a small model leaves a GPU idle. Finished ones are kept in ``--parts``: with ``--minutes``
no job begins after so long, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from sharing_figures import line_of, rows_of, searches_of
from sharing_jobs import Job, Judge, Search, Setting, begin, run, unshared
from transformers import AutoTokenizer

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.tasks import Prompt, prompts
from sparsec.compiler.explain import artifact_data
from sparsec.compiler.stages import code_digest, fingerprint
from sparsec.compiler.versions import versions
from sparsec.layout import TENSORS

RESULT = Path(__file__).resolve().parent / "results" / "sharing-demo.json"
QUICK = {
    "length": 1024, "search_rows": 16, "rows": 32, "windows": 1, "prompts": 1, "tasks": "kv", "amounts": "1",
    "keeps": "0.9", "steps": 12, "fit_windows": 1, "dtype": "float32", "batch_size": 1,
}  # fmt: skip


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Patterns of sharing at equal keep, on held-out text.")
    parser.add_argument("artifacts", nargs="+", type=Path, help="what rtpurbo alone made")
    parser.add_argument("--texts", nargs="+", default=[], help="held-out text, each split on its own")
    parser.add_argument("--calibration", help="where the text that they were compiled on is now, if not where it was")
    parser.add_argument("--amounts", default="1,3,9", help="windows of searches; one named twice reads other text")
    parser.add_argument("--keeps", default="0.25,0.5", help="shares of the indexers")
    parser.add_argument("--length", type=int, default=4096, help="tokens of all windows and prompts")
    parser.add_argument("--search-rows", type=int, default=128, help="decode rows of a search window")
    parser.add_argument("--windows", type=int, default=4, help="held-out windows of each text")
    parser.add_argument("--rows", type=int, default=512, help="decode rows of each")
    parser.add_argument("--tasks", default="kv,multikey,passkey")
    parser.add_argument("--prompts", type=int, default=20, help="of each task and text")
    parser.add_argument("--steps", type=int, default=240, help="of training")
    parser.add_argument("--fit-windows", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of generated answers; all else is float32")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--parts", type=Path, default=Path("sharing-parts"))
    parser.add_argument("--quick", action="store_true", help="the smallest of everything, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    if asked.quick:
        vars(asked).update(QUICK)
    return asked


def setting_of(asked: argparse.Namespace) -> tuple[Setting, dict[str, Any]]:
    """What jobs need, and what is said about the text."""
    read: dict[str, Calibration] = {}

    def calibration(spec: str, seed: int = 0) -> Calibration:
        if spec not in read:
            read[spec] = Calibration(read_corpus(spec), AutoTokenizer.from_pretrained(asked.artifacts[0]), seed=seed)
        return read[spec]

    names = {path: path.resolve().name for path in asked.artifacts}
    recipes = {path: artifact_data(path)["manifest"]["recipe"] for path in asked.artifacts}
    own = {}
    for path, made in recipes.items():
        own[names[path]] = calibration(asked.calibration or made["calibration"], made["seed"])
    held = [*(calibration(spec) for spec in asked.texts), *dict.fromkeys(own.values())]
    windows, asked_of = [], dict[str, list[Prompt]]()
    for each in held:
        windows.append(each.windows("heldout", asked.length, asked.windows))
        for task in asked.tasks.split(","):
            asked_of.setdefault(task, []).extend(prompts(task, each, length=asked.length, count=asked.prompts, seed=0))
    setting = Setting(
        artifacts={names[path]: path for path in asked.artifacts},
        calibrations=own,
        windows=torch.cat(windows),
        prompts=asked_of,
        length=asked.length,
        search_rows=asked.search_rows,
        rows=min(asked.rows, asked.length // 2),
        keeps=tuple(map(float, asked.keeps.split(","))),
        steps=asked.steps,
        fit_windows=asked.fit_windows,
        batch_size=asked.batch_size,
        device=asked.device,
        dtype=asked.dtype,
    )
    texts = [
        {
            "spec": Path(each.corpus.spec).name,
            "digest": each.digest,
            "documents": [text.name for text in each.texts("heldout")],
        }
        for each in held
    ]
    return setting, {"texts": texts, "segments": len(setting.windows), "recipes": list(recipes.values())}


def first_jobs(setting: Setting, amounts: list[int]) -> list[Job]:
    """What nothing else has to be found for, the longest first."""
    jobs: list[Job] = []
    for at, amount in enumerate(amounts):
        for name in setting.artifacts:
            jobs.append(Search(name, amount, amounts[:at].count(amount), "exact"))
            jobs += [Search(name, amount, 0, "lazy")] if at == 0 else []
    for name in setting.artifacts:
        jobs += [Judge(name, None, False, True), Judge(name, unshared(setting, name), False, True)]
    return jobs


def follow(job: Job, found: Mapping[str, Any], amount: int) -> Iterator[Job]:
    """What a finished search gives to judge: of the main one all, of others patterns of the first keep, untrained."""
    if not isinstance(job, Search):
        return
    whole = (job.windows, job.seed) == (amount, 0)
    for number, ways in enumerate(found["patterns"].values()):
        for way, pattern in ways.items():
            if whole and (job.order == "exact" or way == "searched"):
                yield from (Judge(job.artifact, pattern, trained, True) for trained in (False, True))
            elif not whole and number == 0 and way != "uniform":
                yield Judge(job.artifact, pattern, False, False)


@dataclass
class Runner:
    """Runs jobs in processes; a part that is there already is read instead."""

    setting: Setting
    parts: Path
    same: Mapping[str, Any]  # what all results depend on
    made: Mapping[str, str]  # by artifact: its tensors' digest
    processes: int
    until: float  # on the monotonic clock; no job begins later
    done: dict[Job, dict[str, Any]] = field(default_factory=dict)
    left: list[Job] = field(default_factory=list)  # there was no time for them

    def run(self, jobs: list[Job], amount: int) -> None:
        """These, and what follows from the searches among them."""
        self.parts.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        given = (pickle.dumps(self.setting), context.Value("i", 0))
        seen, running = set(jobs), dict[Future[dict[str, Any]], Job]()
        with ProcessPoolExecutor(self.processes, context, initializer=begin, initargs=given) as pool:
            while jobs or running:
                while jobs and len(running) < self.processes:
                    job = jobs.pop(0)
                    if self._part(job).is_file():
                        self.done[job] = json.loads(self._part(job).read_text(encoding="utf-8"))
                        jobs += [new for new in follow(job, self.done[job], amount) if new not in seen]
                        seen.update(jobs)
                    elif time.monotonic() < self.until:
                        running[pool.submit(run, job, self._part(job).with_suffix(".search"))] = job
                    else:
                        self.left.append(job)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    if not self._finish(job, future):
                        continue
                    jobs += [new for new in follow(job, self.done[job], amount) if new not in seen]
                    seen.update(jobs)

    def _finish(self, job: Job, future: Future[dict[str, Any]]) -> bool:
        """Keep the result; of a job that failed, say why, and let the others go on."""
        try:
            found = future.result()
        except Exception as error:
            print(f"failed: {job}: {error!r}", flush=True)
            self.left.append(job)
            if isinstance(error, BrokenProcessPool):
                self.until = 0.0
            return False
        self.done[job] = found
        aside = self._part(job).with_suffix(".aside")
        aside.write_text(json.dumps(found), encoding="utf-8")
        aside.rename(self._part(job))
        print(f"{len(self.done)} done: {job}, {found['seconds']:.0f} s", flush=True)
        return True

    def _part(self, job: Job) -> Path:
        made = self.made[job.artifact]
        key = fingerprint(kind=type(job).__name__, job=asdict(job), made=made, **self.same)
        return self.parts / f"{key}.json"


def main() -> None:
    """Run all jobs, or as many as the time allows, and write what was found."""
    asked = options()
    began = time.monotonic()
    setting, about = setting_of(asked)
    print(f"{about['segments']} held-out windows after {time.monotonic() - began:.0f} s", flush=True)
    aside = ("artifacts", "texts", "calibration", "jobs", "minutes", "parts", "out", "quick")
    given = {name: value for name, value in vars(asked).items() if name not in aside}
    made = {name: artifact_data(path)["manifest"]["files"][TENSORS] for name, path in setting.artifacts.items()}
    same = {**given, "held": [text["digest"] for text in about["texts"]], "code": code_digest()}
    runner = Runner(setting, asked.parts, same, made, asked.jobs, began + 60 * asked.minutes)
    amounts = sorted(map(int, asked.amounts.split(",")), reverse=True)
    runner.run(first_jobs(setting, amounts), amounts[0])
    result = {
        "command": f"python benchmarks/sharing.py {shlex.join(sys.argv[1:])}",
        "device": next((found["device"] for found in runner.done.values()), None),
        "options": given,
        **about,
        "searches": searches_of(runner.done),
        "rows": rows_of(runner.done),
        "left": [asdict(job) for job in runner.left],
        "seconds": round(time.monotonic() - began, 1),
        "versions": versions(),
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rows"]:
        print(line_of(row))
    if runner.left:
        print(f"{len(runner.left)} jobs are left: the same command goes on with them")


if __name__ == "__main__":
    main()
