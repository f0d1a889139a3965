"""Publishes an artifact: one atomic commit on the Hub, after the artifact has shown that it is whole.

Large files go first (Xet, or LFS where that is missing), and are found again when a broken upload is repeated; the
commit names them all at once, so no reader ever sees half of an artifact. Files of an older artifact that this one
lacks are deleted in the same commit; what sparsec did not put there stays.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsec.errors import ArtifactError, HubError, UsageError
from sparsec.events import Event, Listener, silent
from sparsec.export import integrity
from sparsec.export.manifest import read_manifest
from sparsec.export.words import size
from sparsec.layout import MANIFEST

TRIES = 6
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that another try may not see
LARGE = 10 << 20  # bytes from which the Hub keeps a file as a large one
MAIN = "main"


@dataclass(frozen=True)
class Push:
    """What ``sparsec push`` was asked to do."""

    artifact: Path
    repo: str  # organisation/name
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None
    endpoint: str | None = None
    token: str | None = None  # None: the user's own login
    listen: Listener = silent
    sleep: Callable[[float], None] = time.sleep


def planned(push: Push) -> dict[str, Any]:
    """What would be uploaded, as JSON data; nothing is sent.

    Raises:
        ArtifactError: the artifact is damaged, or failed its gate.
        UsageError: no name of a repository.
    """
    _check(push)
    files = [
        {"name": file.relative_to(push.artifact).as_posix(), "bytes": file.stat().st_size, "large": _is_large(file)}
        for file in _files(push.artifact)
    ]
    return {
        "repo": push.repo,
        "revision": push.revision or MAIN,
        "private": push.private,
        "create_pr": push.create_pr,
        "files": files,
        "bytes": sum(int(str(file["bytes"])) for file in files),
    }


def planned_text(plan: dict[str, Any]) -> str:
    """The same in lines."""
    width = max(len(file["name"]) for file in plan["files"])
    lines = [
        f"{file['name']:<{width}}  {size(file['bytes']):>9}{'  large file' if file['large'] else ''}"
        for file in plan["files"]
    ]
    where = f"{plan['repo']}, {plan['revision']}{', as a pull request' if plan['create_pr'] else ''}"
    return "\n".join([*lines, "", f"{len(lines)} files, {size(plan['bytes'])}, to {where}; nothing was sent"])


def publish(push: Push) -> dict[str, Any]:
    """Upload and commit; ``url`` and ``commit`` of the result, ``pull_request`` where one was opened.

    Raises:
        ArtifactError: the artifact is damaged, or failed its gate.
        UsageError: no name of a repository.
        HubError: the Hub refused, or did not answer after several tries. What was uploaded is found again next time.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _check(push)
    api = HfApi(endpoint=push.endpoint, token=push.token)
    trying = _Trying(push)
    trying("create the repository", lambda: api.create_repo(push.repo, private=push.private or None, exist_ok=True))
    revision = push.revision or MAIN
    if revision != MAIN and not push.create_pr:
        trying("create the branch", lambda: api.create_branch(push.repo, branch=revision, exist_ok=True))
    base = revision if not push.create_pr else MAIN

    def commit() -> Any:
        # Made anew in every try: an operation remembers what of it was sent.
        there = set(api.list_repo_files(push.repo, revision=base))
        head = str(api.repo_info(push.repo, revision=base).sha)
        names = {file.relative_to(push.artifact).as_posix(): file for file in _files(push.artifact)}
        stale = sorted((_ours(api, push.repo, head) & there) - names.keys()) if head and MANIFEST in there else []
        additions = [CommitOperationAdd(name, str(file)) for name, file in names.items()]
        return api.create_commit(
            push.repo,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=push.message or f"{push.artifact.resolve().name}, compiled by sparsec",
            revision=base,
            create_pr=push.create_pr,
            parent_commit=head if there and not push.create_pr else None,
        )

    info = trying("upload and commit", commit)
    pull = getattr(info, "pr_url", None)
    return {"url": str(info.commit_url), "commit": str(info.oid), "pull_request": pull, "repo": push.repo}


class _Trying:
    """Runs requests again where that may help, and makes every failure a line that holds no token."""

    def __init__(self, push: Push) -> None:
        self.push = push

    def __call__(self, what: str, work: Callable[[], Any]) -> Any:
        from sparsec.plugins.quiet import silenced

        for number in range(1, TRIES + 1):
            self.push.listen(Event(what, 0, 1))
            try:
                with silenced(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what libraries say to each other
                    found = work()
            except Exception as error:  # of the HTTP or transfer library underneath, which differ between versions
                wait = _wait(error, number)
                if wait is None or number == TRIES:
                    raise HubError(self.line(what, error, number)) from None
                self.push.listen(Event(what, 0, 1, f"try {number} failed, again in {wait:.0f} s"))
                self.push.sleep(wait)
            else:
                self.push.listen(Event(what, 1, 1))
                return found
        raise AssertionError

    def line(self, what: str, error: BaseException, tries: int) -> str:
        """One line: what failed, why, what to do."""
        from huggingface_hub import get_token

        status = _status(error)
        way = {
            401: "log in with hf auth login, or set HF_TOKEN",
            403: "use a token that may write there",
            404: "check the name, and that your token may see it",
            409: "somebody else is writing there: run again",
            412: "the branch has moved meanwhile: run again",
            413: "the Hub's limit is reached: make room there",
            429: "the Hub's rate limit is reached: wait and run again, what was uploaded is kept",
        }.get(status or 0, "check the network and run again, what was uploaded is kept")
        said = " ".join(_root(error).split())[:240] or type(error).__name__
        for secret in {self.push.token, get_token()} - {None, ""}:
            said = said.replace(str(secret), "***")
        times = f", {tries} times" if tries > 1 else ""
        return f"{self.push.repo}: cannot {what}{times} ({said}): {way}"


def _check(push: Push) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(push.repo)
        good = push.repo.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise UsageError(f"{push.repo!r} is no name on the Hub: write organisation/name")
    if push.create_pr and push.revision not in (None, MAIN):
        raise UsageError("a pull request is against main: drop --revision or --create-pr")
    try:
        integrity.require(push.artifact)
    except ArtifactError as error:
        raise ArtifactError(f"not pushed, the artifact is not whole: {error}") from None


def _files(artifact: Path) -> list[Path]:
    """What the manifest names, and the manifest; integrity has seen that there is nothing else."""
    names = [*read_manifest(artifact).files, MANIFEST]
    return [artifact / name for name in sorted(names)]


def _is_large(file: Path) -> bool:
    return file.suffix == ".safetensors" or file.stat().st_size >= LARGE


def _ours(api: Any, repo: str, commit: str) -> set[str]:
    """Files that an older artifact of ours put there, by its manifest; none where it is not ours or not readable."""
    from sparsec.export.manifest import escapes

    try:
        made = json.loads(Path(api.hf_hub_download(repo, MANIFEST, revision=commit)).read_text(encoding="utf-8"))
        names = made["files"] if str(made["producer"]).startswith("sparsec ") else ()
        return {name for name in names if escapes(name) is None}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()


def _wait(error: BaseException, tries: int) -> float | None:
    """Seconds until another try makes sense; None where none does."""
    status = _status(error)
    if status is not None and status not in PASSING:
        return None
    if status is None and not any(_is_network(each) for each in _chain(error)):
        return None
    for each in _chain(error):
        headers = getattr(getattr(each, "response", None), "headers", {})
        asked = str(headers.get("retry-after", ""))
        if asked.isdigit():
            return min(float(asked), 300.0)
    return float(min(2 ** (tries - 1), 30))


def _status(error: BaseException) -> int | None:
    for each in _chain(error):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _is_network(error: BaseException) -> bool:
    """Connections that broke: of the operating system, or of whichever HTTP library the Hub's client uses."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library in ("httpx", "httpx2", "httpcore", "requests")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    seen: Sequence[int] = []
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen = [*seen, id(each)]
        yield each
        each = each.__cause__ or each.__context__


def _root(error: BaseException) -> str:
    """The first cause speaks best: the library wraps it in 'Error while uploading'."""
    return str(list(_chain(error))[-1]) if _status(error) is None else str(error)
