"""The README's table of passes, from compiles to JSON: python benchmarks/passes_table.py [--gpus 0,1]

Runs the commands below on all GPUs that are named, each command's lengths and systems as parts of their own; parts are
kept, so the whole commands at the end only put them together. What is timed has its GPU to itself. A run that was
stopped goes on; an artifact that is there is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

RESULTS = "benchmarks/results"
COMPILE = "compile demo --calibration texts/train --device cuda --tier hours"
ON = "--text texts/eval --device cuda --dtype bfloat16 --kernels auto"
PASSES = f"--tasks kv,multikey,passkey --prompts 100 --windows 16 --batch-size 50 {ON}"
MULTI = f"--tasks multivalue,multiquery --prompts 100 --windows 0 --batch-size 50 {ON}"
DECODE = f"--windows 0 --prompts 0 --decode-tokens 1024 --decode-prompts 64 --batch-size 64 {ON}"
ALL, SHORT = ("2048", "4096", "8000"), ("2048", "4096")
PAIR = "--systems dense,artifact"
TIMED = "bench out/distilled --contexts 2048,4096,8000 --text texts/eval --device cuda --dtype bfloat16"
STAGES = f"{RESULTS}/gates-demo.json"


@dataclass(frozen=True)
class Job:
    """A call of sparsec, run when those before it are done. ``alone``: nothing else on its GPU."""

    name: str
    call: str
    after: tuple[str, ...] = ()
    alone: bool = False
    makes: Path | None = None  # an artifact

    @property
    def done(self) -> bool:
        """Nothing is left to do."""
        return self.makes is not None and self.makes.exists()


def jobs(scratch: Path) -> list[Job]:
    """Everything, in the order in which it starts where there is one GPU."""

    def compiled(name: str, passes: str, *after: str) -> Job:
        out = Path("out") / name
        return Job(name, f"{COMPILE} --passes {passes} -o {out} --json", after, alone=True, makes=out)

    def part(name: str, of: str, how: str, length: str, *after: str) -> Job:
        return Job(name, f"eval {of} --lengths {length} {how} -o {scratch / name}.json", after)

    found = [
        compiled("rtpurbo", "rtpurbo"),
        compiled("razor", "razor"),
        compiled("distilled", "rtpurbo,distill", "rtpurbo"),
    ]
    # The longest first, so that nothing waits for one of them at the end.
    found += [part(f"passes-{n}", "out/rtpurbo out/razor", PASSES, n, "rtpurbo", "razor") for n in reversed(ALL)]
    found += [part(f"decode-{n}", f"out/distilled {PAIR}", DECODE, n, "distilled") for n in reversed(SHORT)]
    for n in reversed(ALL):
        found.append(part(f"trained-{n}", f"out/distilled {PAIR}", PASSES, n, "distilled", f"passes-{n}"))
        found.append(part(f"multi-{n}", f"out/distilled {PAIR}", MULTI, n, "distilled"))
    whole = (
        ("distill-demo", "out/rtpurbo out/razor out/distilled", PASSES, ALL, ("passes", "trained")),
        ("multi-demo", f"out/distilled {PAIR}", MULTI, ALL, ("multi",)),
        ("long-decode-demo", f"out/distilled {PAIR}", DECODE, SHORT, ("decode",)),
    )
    for name, of, how, lengths, parts in whole:
        call = f"eval {of} --lengths {','.join(lengths)} {how} -o {RESULTS}/{name}.json"
        found.append(Job(name, call, tuple(f"{each}-{n}" for each in parts for n in lengths)))
    everything = tuple(job.name for job in found)
    return [*found, Job("bench-demo", f"{TIMED} -o {RESULTS}/bench-demo.json", everything, alone=True)]


@dataclass
class Runs:
    """What runs where."""

    gpus: list[str]
    each: int  # jobs a GPU
    sparsec: str  # the command
    running: dict[str, tuple[Job, str, subprocess.Popen[bytes]]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: str | None = None

    def place(self, job: Job) -> str | None:
        """A GPU that has room, the emptiest."""
        on = {gpu: [other for other, at, _ in self.running.values() if at == gpu] for gpu in self.gpus}
        free = [
            gpu
            for gpu in self.gpus
            if not (job.alone and on[gpu]) and len(on[gpu]) < self.each and not any(other.alone for other in on[gpu])
        ]
        return min(free, key=lambda gpu: len(on[gpu]), default=None)

    def start(self, job: Job, gpu: str, log: Path) -> None:
        """Run it in the background."""
        print(f"{time.strftime('%X')} GPU {gpu}: sparsec {job.call}", flush=True)
        with open(log, "wb") as said, open(log.with_suffix(".out"), "wb") as out:
            started = subprocess.Popen(
                [self.sparsec, *job.call.split()],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
                stdout=out,
                stderr=said,
            )
        self.running[job.name] = (job, gpu, started)

    def collect(self, logs: Path) -> list[str]:
        """The names of those that ended well."""
        ended = []
        for name, (_, _, process) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[name]
            if process.returncode:
                self.failed = f"{name} failed:\n{(logs / name).read_text(errors='replace')[-2000:]}"
            else:
                self.done.add(name)
                ended.append(name)
        return ended

    def end(self) -> None:
        """Nothing runs on when something failed."""
        for _, _, process in self.running.values():
            process.terminate()


def write_stages(scratch: Path, gpu: str) -> None:
    """What both stages of training measured and how long they took, where this run compiled them."""
    told = [scratch / f"{name}.out" for name in ("rtpurbo", "distilled")]
    if not all(file.exists() for file in told):
        print(f"{STAGES} stays as it is: the artifacts were there already")
        return
    first, second = (json.loads(file.read_text())["seconds"] for file in told)
    stages = {"rtpurbo": round(first["rtpurbo"]), "distill": round(second["distill"])}
    if not all(stages.values()):
        print(f"{STAGES} stays as it is: a stage was stored already")
        return
    artifact = Path("out/distilled")
    measured = {
        one["name"]: one["measured"] for one in json.loads((artifact / "measurements.json").read_text())["passes"]
    }
    manifest = json.loads((artifact / "manifest.json").read_text())
    found = {name: measured["rtpurbo"][name] for name in ("kept_heads", "gates", "causal_check", "rank_stability")}
    written = {
        "command": f"sparsec {COMPILE} --passes rtpurbo,distill -o out/distilled",
        "note": "stage 1 and 2 one after the other, the first one stored by a compile of rtpurbo alone",
        "device": subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"],  # here it would hold memory
            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip(),
        "versions": manifest["versions"],
        "seed": manifest["recipe"]["seed"],
        "seconds_by_stage": stages,
        **found,
        "distill": {name: value for name, value in measured["distill"].items() if name != "losses"},
    }
    Path(STAGES).write_text(json.dumps(written, indent=1) + "\n")


def main() -> None:
    """Start what can start until all is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", default="0", help="numbers of those to use")
    parser.add_argument("--each", type=int, default=1, help="evaluations on a GPU at once, three in 80 GB")
    asked = parser.parse_args()
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        beside = shutil.which("sparsec", path=Path(sys.executable).parent) or shutil.which("sparsec")
        if beside is None:
            sys.exit("sparsec is not installed: pip install '.[demo,train]'")
        runs, waiting = Runs(asked.gpus.split(","), asked.each, beside), jobs(scratch)
        runs.done = {job.name for job in waiting if job.done}
        for name in sorted(runs.done):
            print(f"out/{name} is there: not compiled again (delete it where code or text have changed)")
        waiting = [job for job in waiting if not job.done]
        try:
            while waiting or runs.running:
                for job in list(waiting):
                    if runs.done.issuperset(job.after) and (gpu := runs.place(job)) is not None:
                        waiting.remove(job)
                        runs.start(job, gpu, scratch / job.name)
                time.sleep(1)
                if "distilled" in runs.collect(scratch):
                    write_stages(scratch, runs.gpus[0])
                if runs.failed is not None:
                    sys.exit(runs.failed)
        finally:
            runs.end()


if __name__ == "__main__":
    main()
