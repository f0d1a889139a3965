"""Can a dense model read beyond its trained length with scaled rotary embeddings? Needles, by kind of scaling.

    python benchmarks/rope_scaling.py demo --text texts/eval -o benchmarks/results/rope-scaling-demo.json

Selectors are worth measuring at a length only if the dense model still finds what is asked for there. Each kind is
Transformers' own, without training: ``default`` (none), ``yarn`` and ``dynamic`` (NTK).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.evaluate import DENSE, Suite, System, evaluate
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.commands.options import cache_dir
from sparsec.compiler.draw import drawing
from sparsec.compiler.source import Source, load_model, load_tokenizer, open_source
from sparsec.compiler.versions import versions
from sparsec.plugins.device import device_name


@contextmanager
def scaled(source: Source, kind: str, factor: float) -> Iterator[Source]:
    """The same checkpoint with other rotary embeddings, its weights linked."""
    with TemporaryDirectory() as folder:
        for file in source.path.iterdir():
            (Path(folder) / file.name).symlink_to(file)
        config = json.loads((source.path / "config.json").read_text())
        trained = config["max_position_embeddings"]
        rope = config.setdefault("rope_parameters", {"rope_theta": config.get("rope_theta", 10000.0)})
        if kind != "default":
            rope |= {"rope_type": kind, "factor": factor}
        if kind != "dynamic":  # which reads the trained length here, and goes beyond it by itself
            rope |= {"original_max_position_embeddings": trained} if kind != "default" else {}
            config["max_position_embeddings"] = int(trained * factor)
        (Path(folder) / "config.json").unlink()
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield replace(source, path=Path(folder))


def main() -> None:
    """Ask the same questions of each kind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", nargs="?", default="demo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--lengths", default="8000,16000")
    parser.add_argument("--kinds", default="default,yarn,dynamic")
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--tasks", default="kv,passkey")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--windows", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    source = open_source(asked.source, cache_dir=cache_dir())
    calibration = Calibration(read_corpus(asked.text), load_tokenizer(source))
    suite = Suite(
        lengths=tuple(map(int, asked.lengths.split(","))),
        tasks=tuple(asked.tasks.split(",")),
        prompts_each=asked.prompts,
        windows_each=asked.windows,
        batch_size=asked.batch_size,
    )
    rows: list[dict[str, Any]] = []
    with drawing() as listen:
        for kind in asked.kinds.split(","):
            with scaled(source, kind, asked.factor) as opened:
                model = load_model(opened, device=asked.device, dtype=asked.dtype)

                @contextmanager
                def open_it(model: Any = model) -> Iterator[Any]:
                    yield model

                found = evaluate([System(DENSE, open_it)], calibration, suite, listen=listen)
            rows += [{"rope": kind, **cell} for cell in found["cells"]]
            result = {
                "command": f"python benchmarks/rope_scaling.py {shlex.join(sys.argv[1:])}",
                "factor": asked.factor,
                "prompts": asked.prompts,
                "rows": rows,
                "text": calibration.describe()["made_of"],
                "device": device_name(model.device),
                "dtype": str(model.dtype).removeprefix("torch."),
                "versions": versions(),
            }
            asked.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
