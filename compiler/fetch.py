"""A model from the Hugging Face Hub, in the Hub's own cache, pinned to a commit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sparsec.compiler.checkpoint import TOKENIZER_FILES, check_config
from sparsec.compiler.quiet import one_line
from sparsec.compiler.weights import INDEX, SINGLE, read_index, weight_files
from sparsec.errors import SourceError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILES = ["*.json", "*.jinja", "*.tiktoken", "README.md", *TOKENIZER_FILES]


def fetch(repo: str, revision: str | None, progress: Callable[[str], None]) -> tuple[Path, str]:
    """Download what a dense checkpoint needs, or find it in the cache; (folder, commit hash).

    The small files come first, so that a model that is refused costs no download of its weights; of those
    only what the index names. The user's own login (``hf auth login`` or HF_TOKEN) opens private models.

    Raises:
        SourceError: no such model or revision, no access, offline and not cached, no network, or a checkpoint
            that is refused.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    path = _download(repo, revision, SMALL_FILES)
    commit = path.name
    check_config(path)
    # The index is among the small files. A repository may hold the same weights in other formats as well.
    shards = sorted(set(read_index(path).values())) or [SINGLE]
    if not all((path / name).is_file() for name in shards):
        progress(f"downloading {repo} at {commit[:12]} ({len(shards)} weight file{'s' * (len(shards) > 1)})")
        _download(repo, commit, shards)
    try:
        weight_files(path)
    except SourceError:
        if HF_HUB_OFFLINE:
            reason = f"{repo} is only partly in the Hub cache and HF_HUB_OFFLINE is set: unset it"
        elif (path / INDEX).is_file():
            reason = f"{repo} is only partly in the Hub cache: check the network and try again"
        else:
            reason = f"{repo} has no {SINGLE} (pickled weights are never opened): name a model that has it"
        raise SourceError(reason) from None
    return path, commit


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                # Said outright, because some versions of the client look up a commit's files even so.
                local_files_only=HF_HUB_OFFLINE,
            )
        )
    except GatedRepoError:
        reason = f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then run hf auth login"
    except RepositoryNotFoundError:
        reason = (
            f"there is no folder {repo}, and no model of that name on the Hub that you may read: "
            "check the spelling, or run hf auth login if it is private"
        )
    except RevisionNotFoundError:
        reason = f"{repo} has no revision {revision!r}: name a branch, a tag or a commit of it"
    except HFValidationError as error:
        reason = f"{repo} is no Hub id ({one_line(error)}): write it as organisation/name"
    except LocalEntryNotFoundError:
        if HF_HUB_OFFLINE:
            reason = f"{repo} is not in the Hub cache and HF_HUB_OFFLINE is set: unset it, or name a local folder"
        else:
            reason = f"{repo} is not in the Hub cache and the Hub does not answer: check the network and try again"
    except Exception as error:  # of the HTTP or transfer library underneath, which differ between versions
        reason = f"{repo} could not be downloaded ({one_line(error)}): try again"
    raise SourceError(reason)
