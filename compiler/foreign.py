"""Recognises other engines' files: what ``sparsec inspect`` says where there is no artifact of ours."""

from __future__ import annotations

from pathlib import Path

from sparsec.errors import ArtifactError
from sparsec.export.dialects import DIALECTS
from sparsec.export.dialects.files import read_files
from sparsec.export.dialects.foreign import Foreign
from sparsec.layout import CONFIG, PLAN_KEY


def foreign(path: Path) -> list[Foreign]:
    """Every dialect that the files speak; nothing where they are an artifact of ours, or cannot be read.

    Raises:
        ArtifactError: a dialect is recognised, and damaged.
    """
    try:
        files = read_files(path)
    except ArtifactError:
        return []
    config = files.get(CONFIG)
    if isinstance(config, dict) and PLAN_KEY in config:
        return []
    return [each.decode(files, None) for each in DIALECTS.values() if each.recognise(files)]
