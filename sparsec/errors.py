"""The errors that sparsec raises on purpose; each carries the exit status of the command line.

    SparsecError            1   something failed: one line says what and what to do
    ├── UsageError          2   the call cannot mean anything: unknown pass, unknown option, bad recipe
    ├── SourceError         1   the checkpoint cannot be opened
    ├── CalibrationError    1   the calibration text cannot be used
    ├── PlanError           1   a plan that contradicts itself, its model or its tensors
    ├── TrainingError       1   a training run that cannot go on
    ├── ArtifactError       1   a folder that is no artifact, or is damaged
    ├── HubError            1   the Hub refused, or did not answer
    └── GateError           3   the artifact is worse than the gate allows

Messages are one line and end with the way out. The CLI prints ``sparsec: <message>`` and no traceback.
"""

from __future__ import annotations


class SparsecError(Exception):
    """Base of all expected failures."""

    exit_code = 1


class UsageError(SparsecError):
    """The command, an option or a recipe is wrong."""

    exit_code = 2


class SourceError(SparsecError):
    """A source checkpoint is missing, damaged, unsupported or unsafe."""


class CalibrationError(SparsecError):
    """Calibration text is missing, unreadable or too little."""


class PlanError(SparsecError):
    """A plan contradicts itself, its model or its tensors."""


class TrainingError(SparsecError):
    """A training run ran out of memory, or lacks a package."""


class ArtifactError(SparsecError):
    """A folder is not an artifact, or a damaged one."""


class HubError(SparsecError):
    """The Hub refused something, or did not answer."""


class GateError(SparsecError):
    """A quality gate failed: the artifact was judged and found worse than allowed."""

    exit_code = 3
