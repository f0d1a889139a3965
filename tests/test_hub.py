"""Publishing: one commit or none, what broke off goes on, nothing secret is said; and a published recipe repeats."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Failure, Hub

from sparsec.compiler.published import published as published_recipe
from sparsec.errors import ArtifactError, HubError, UsageError
from sparsec.export.artifact import write_manifest
from sparsec.export.hub import TRIES, Push, planned, publish
from sparsec.layout import MANIFEST, TENSORS, read_json

NAME = "team/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub of our own, which the client in this process talks to."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with Hub() as hub:
        yield hub


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


def push(hub: Hub, artifact: Path, waits: list[float] | None = None, **more: Any) -> dict[str, Any]:
    sleep = (waits if waits is not None else []).append
    return publish(Push(artifact, more.pop("repo", NAME), endpoint=hub.endpoint, token=TOKEN, sleep=sleep, **more))


def on_disk(artifact: Path) -> dict[str, bytes]:
    return {file.relative_to(artifact).as_posix(): file.read_bytes() for file in artifact.rglob("*") if file.is_file()}


def published(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    return {name: data for name, data in hub.files(NAME, branch).items() if name != ".gitattributes"}


def test_all_files_come_in_one_commit(hub: Hub, artifact: Path) -> None:
    done = push(hub, artifact, private=True)
    assert published(hub) == on_disk(artifact)
    assert hub.repos[NAME].private
    assert hub.count("/commit/") == 1
    assert done["url"].endswith(done["commit"])
    assert {len(data) for data in hub.large.values()} >= {(artifact / TENSORS).stat().st_size}


def test_a_second_push_sends_what_is_new_and_drops_what_went(hub: Hub, artifact: Path) -> None:
    push(hub, artifact)
    hub.repos[NAME].commits[hub.repos[NAME].branches["main"]]["NOTES.md"] = b"somebody's"
    hub.log.clear()
    push(hub, artifact)
    assert hub.count("/commit/") == hub.count("PUT") == 0
    made = read_json(artifact / MANIFEST)
    (artifact / "chat_template.jinja").unlink()
    (artifact / MANIFEST).unlink()
    write_manifest(artifact, {key: value for key, value in made.items() if key not in ("files", "digest")})
    push(hub, artifact)
    assert published(hub) == {**on_disk(artifact), "NOTES.md": b"somebody's"}
    assert hub.count("PUT") == 0


def test_a_branch_and_a_pull_request(hub: Hub, artifact: Path) -> None:
    push(hub, artifact, revision="v2")
    assert published(hub) == {}
    assert published(hub, "v2") == on_disk(artifact)
    done = push(hub, artifact, create_pr=True)
    assert published(hub) == {}
    assert done["pull_request"].endswith("/discussions/1")
    with pytest.raises(UsageError, match="a pull request is against main"):
        push(hub, artifact, create_pr=True, revision="v2")


def test_an_upload_that_breaks_goes_on(hub: Hub, artifact: Path) -> None:
    hub.failures = [Failure("POST /team/model.git", 400), Failure("PUT /lfs-storage", 400, after=1)]
    with pytest.raises(HubError, match="run again, what was uploaded is kept"):
        push(hub, artifact)
    with pytest.raises(HubError):
        push(hub, artifact)
    assert published(hub) == {}
    sent = len(hub.large)
    assert sent == 1
    hub.log.clear()
    push(hub, artifact)
    assert published(hub) == on_disk(artifact)
    assert hub.count("PUT /lfs-storage") == len(hub.large) - sent


@pytest.mark.parametrize(
    "failure",
    [
        Failure("POST /api/repos/create", 503),
        Failure("/commit/", 429, {"Retry-After": "7"}),
        Failure("/commit/", 502),
        Failure("/commit/", 0),
        Failure("GET /api/models", 0),
    ],
    ids=lambda failure: f"{failure.word} {failure.status}",
)
def test_what_passes_is_tried_again(hub: Hub, artifact: Path, failure: Failure) -> None:
    waits: list[float] = []
    hub.failures = [failure]
    push(hub, artifact, waits)
    assert published(hub) == on_disk(artifact)
    # What the client repeats by itself we do not see.
    assert waits == ([7.0] if failure.headers else [1.0] if "GET" not in failure.word else [])


@pytest.mark.parametrize(
    ("failure", "repo", "words"),
    [
        (Failure("/commit/", 429, times=99), NAME, "the Hub's rate limit is reached: wait and run again"),
        (Failure("/commit/", 412), NAME, "the branch has moved meanwhile: run again"),
        (Failure("POST /api/repos/create", 401), NAME, "log in with hf auth login, or set HF_TOKEN"),
        (Failure("nothing"), "closed/model", "use a token that may write there"),
    ],
)
def test_what_is_refused_is_a_line_without_the_token(
    hub: Hub, artifact: Path, failure: Failure, repo: str, words: str
) -> None:
    hub.failures = [failure]
    waits: list[float] = []
    with pytest.raises(HubError) as caught:
        push(hub, artifact, waits, repo=repo)
    assert words in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(waits) == (TRIES - 1 if failure.status == 429 else 0)
    assert NAME not in hub.repos or published(hub) == {}


def test_what_is_damaged_or_badly_named_is_refused_and_nothing_is_sent(hub: Hub, artifact: Path) -> None:
    for name in ("model", "a/b/c", "../x/y", "team/"):
        with pytest.raises(UsageError, match="is no name on the Hub"):
            push(hub, artifact, repo=name)
    data = bytearray((artifact / TENSORS).read_bytes())
    data[-1] ^= 1
    (artifact / TENSORS).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"not pushed, .* is not what manifest.json says"):
        push(hub, artifact)
    assert hub.log == []


def test_a_dry_run_lists_files_and_sizes(cli: Any, artifact: Path) -> None:
    plan = planned(Push(artifact, NAME))
    assert {file["name"]: file["bytes"] for file in plan["files"]} == {n: len(d) for n, d in on_disk(artifact).items()}
    done = cli("push", artifact, NAME, "--dry-run")
    assert done.status == 0
    assert "sparsec.safetensors" in done.out
    assert "nothing was sent" in done.out


def test_a_published_recipe_repeats(
    hub: Hub, cli: Any, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    from_recipe = partial(published_recipe, endpoint=hub.endpoint)
    push(hub, artifact, revision="v1")
    made, local = from_recipe(f"hub://{NAME}@v1"), from_recipe(str(artifact))
    assert made == local
    assert made.source == read_json(artifact / MANIFEST)["source"]["spec"]
    with pytest.raises(ArtifactError, match="there is no hub://team/nothing that you may read"):
        from_recipe("hub://team/nothing")
    with pytest.raises(ArtifactError, match="it is no artifact of sparsec compile"):
        from_recipe(f"hub://{NAME}")
    with pytest.raises(UsageError, match="is no name on the Hub"):
        from_recipe("hub://../etc")
    again = cli("compile", "--from-recipe", artifact, "-o", tmp_path / "again")
    assert again.status == 0, again.err
    assert on_disk(tmp_path / "again") == on_disk(artifact)
