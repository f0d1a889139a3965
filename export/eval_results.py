"""``.eval_results/``: what the gate measured, in the Hub's format for results on a data set of the Hub.

It is written only where the calibration text is such a data set: the format names nothing else. The model card's
model-index carries the figures in every case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from sparsec.export.words import count

FOLDER = ".eval_results"
HUB_TEXT = re.compile(r"split (?P<split>\S+) of the Hub data set (?P<name>\S+) at (?P<commit>[0-9a-f]{40})")


def eval_results(measurements: Mapping[str, Any]) -> tuple[str, str] | None:
    """The file's name in the artifact and its text; None where the text is no data set of the Hub."""
    text, gate = measurements["calibration"], measurements["gate"]
    found = HUB_TEXT.match(text["made_of"])
    if found is None:
        return None
    measured = {name: gate[name]["bits_per_byte"] for name in ("artifact", "dense")}
    where = (
        f"held out of the split {found['split']}, {count(gate['windows'])} windows of {count(gate['context'])} tokens, "
        f"{count(gate['decode_rows'])} decode rows each; seed {measurements['seed']}, digest {text['digest']}"
    )
    entries = [
        {
            "dataset": {"id": found["name"], "task_id": "default", "revision": found["commit"]},
            "value": value,
            "notes": f"bits per byte, {name}: {where}",
        }
        for name, value in measured.items()
    ]
    return f"{FOLDER}/{found['name'].rpartition('/')[2]}.yaml", yaml.safe_dump(entries, sort_keys=False)
