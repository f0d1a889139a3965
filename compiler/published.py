"""The recipe of an artifact, on the Hub or in a folder: what compiles it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparsec.compiler.fetch import HUB_ID
from sparsec.compiler.quiet import one_line
from sparsec.compiler.recipe import Recipe
from sparsec.errors import ArtifactError, UsageError
from sparsec.export.manifest import manifest_data
from sparsec.layout import MANIFEST
from sparsec.plan import first_error

SCHEME = "hub://"


@dataclass(frozen=True)
class Published:
    """What a manifest says about how its artifact was made."""

    recipe: dict[str, Any]
    source: str
    revision: str | None
    device: str
    dtype: str


def published(spec: str, *, endpoint: str | None = None) -> Published:
    """Of ``hub://organisation/name``, with ``@revision`` behind it, or of a folder. Only the manifest is read.

    endpoint: of the Hub; None is the client's own, HF_ENDPOINT.

    Raises:
        UsageError: neither of these.
        ArtifactError: it is not there, not readable, or no artifact of ours.
    """
    if spec.startswith(SCHEME):
        name, _, revision = spec.removeprefix(SCHEME).partition("@")
        if not HUB_ID.fullmatch(name):
            raise UsageError(f"{spec} is no name on the Hub: write {SCHEME}organisation/name, maybe with @revision")
        made = manifest_data(_manifest(spec, name, revision or None, endpoint).parent)
    else:
        made = manifest_data(Path(spec).expanduser())
    try:
        recipe = Recipe.model_validate(made["recipe"])
    except ValidationError as error:
        raise ArtifactError(f"{spec} has a recipe that this sparsec does not read ({first_error(error)})") from None
    source = made["source"]
    return Published(recipe.model_dump(mode="json"), source["spec"], source["revision"], made["device"], made["dtype"])


def _manifest(spec: str, name: str, revision: str | None, endpoint: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from sparsec.plugins.quiet import silenced

    try:
        with silenced():
            return Path(hf_hub_download(name, MANIFEST, revision=revision, endpoint=endpoint))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        reason = f"there is no {spec} that you may read: check the spelling, or run hf auth login if it is private"
    except LocalEntryNotFoundError:
        reason = f"{spec} is not in the Hub cache and the Hub does not answer: check the network and try again"
    except EntryNotFoundError:
        reason = f"{spec} has no {MANIFEST}: it is no artifact of sparsec compile"
    except Exception as error:  # of the HTTP or transfer library underneath, which differ between versions
        reason = f"{spec} could not be read ({one_line(error)}): try again"
    raise ArtifactError(reason)
