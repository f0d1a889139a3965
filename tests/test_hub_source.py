"""Models of the Hub: out of its cache without a network, and pinned where there is one."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from opening import Opened, edit, tiny_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN_MANY = """
import json, sys
from pathlib import Path
from sparsec.compiler.source import open_source
from sparsec.errors import SourceError
for spec, revision in json.loads(sys.argv[2]):
    try:
        source = open_source(spec, revision=revision, cache_dir=Path(sys.argv[1]))
        print(json.dumps([source.kind, source.revision, source.base_model, source.digest, str(source.path)]))
    except SourceError as error:
        print(json.dumps(str(error)))
"""


def open_in_new_process(home: Path, specs: list[tuple[str, str | None]], **environment: str) -> list[Any]:
    """Each spec's source or error. The Hub's client reads its settings once: each needs a new process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", OPEN_MANY, str(home / "cache"), json.dumps(specs)],
        env={**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def lay_out_hub_cache(checkpoint: Path, home: Path, repo: str, leave_out: tuple[str, ...] = ()) -> Path:
    """The checkpoint in the Hub's cache as a download leaves it there."""
    model = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        if file.name not in leave_out:
            shutil.copy(file, model / "blobs" / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_offline_the_hub_cache_is_enough(tiny_llama: Path, tmp_path: Path, opened: Opened) -> None:
    snapshot = lay_out_hub_cache(tiny_llama, tmp_path, "org/cached")
    lay_out_hub_cache(tiny_llama, tmp_path, "org/partial", leave_out=("model.safetensors",))
    by_name, by_commit, absent, partial, branch = open_in_new_process(
        tmp_path,
        [
            ("org/cached", None),
            ("org/cached", COMMIT),
            ("org/absent", None),
            ("org/partial", None),
            ("org/cached", "dev"),
        ],
        HF_HUB_OFFLINE="1",
    )
    assert by_name == ["hub", COMMIT, "org/cached", opened(tiny_llama).digest, str(snapshot)]
    assert by_commit == by_name
    assert "HF_HUB_OFFLINE is set" in absent
    assert "only partly in the Hub cache" in partial
    assert "HF_HUB_OFFLINE is set" in branch


def test_without_a_network_the_hub_is_said_not_to_answer(tmp_path: Path) -> None:
    (message,) = open_in_new_process(tmp_path, [("org/model", None)], HF_ENDPOINT="http://127.0.0.1:9")
    assert "check the network" in message


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: models, a gated one, and answers for what does not exist."""

    models: ClassVar[dict[str, Path]] = {}
    fetched: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        api, parts = self.path.startswith("/api/"), self.path.partition("?")[0].strip("/").split("/")
        owner, name, verb, revision, *rest = parts[2:] if api else parts
        repo = f"{owner}/{name}"
        folder = self.models.get(repo)
        if folder is None:
            self.answer(401, error="RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.answer(404, error="RevisionNotFound")
        elif api and verb == "revision":
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode())
        elif api and verb == "tree":
            files = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in sorted(folder.iterdir())
            ]
            self.answer(200, json.dumps(files).encode())
        elif repo == "org/gated":
            self.answer(403, error="GatedRepo")
        else:
            if self.command == "GET":
                self.fetched.append(f"{repo}/{rest[0]}")
            self.answer(200, (folder / rest[0]).read_bytes(), tag=rest[0])

    def answer(self, status: int, body: bytes = b"{}", error: str = "", tag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
        if tag:
            self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.models, Hub.fetched = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_online_a_hub_model_is_pinned_and_only_what_it_needs_is_downloaded(
    make_checkpoint: Callable[..., Path], tiny_llama: Path, tmp_path: Path, hub: str, opened: Opened
) -> None:
    sharded = make_checkpoint(tiny_config(), max_shard_size="40KB")
    (sharded / "consolidated.safetensors").write_bytes(b"the same weights again")
    (sharded / "pytorch_model.bin").write_bytes(b"the same weights pickled")
    remote = Path(shutil.copytree(tiny_llama, tmp_path / "remote"))
    edit(remote / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})
    pickled = Path(shutil.copytree(tiny_llama, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    Hub.models = {"org/sharded": sharded, "org/gated": tiny_llama, "org/remote": remote, "org/pickled": pickled}
    good, again, gated, missing, revision, code, pickle = open_in_new_process(
        tmp_path,
        [
            ("org/sharded", None),
            ("org/sharded", COMMIT),
            ("org/gated", None),
            ("org/missing", None),
            ("org/sharded", "v9"),
            ("org/remote", None),
            ("org/pickled", None),
        ],
        HF_ENDPOINT=hub,
    )
    assert good[:4] == ["hub", COMMIT, "org/sharded", opened(sharded).digest]
    assert again == good
    assert not {"org/sharded/consolidated.safetensors", "org/sharded/pytorch_model.bin"} & set(Hub.fetched)
    assert "is gated" in gated
    assert "no model of that name" in missing
    assert "no revision 'v9'" in revision
    assert "remote code is never run" in code
    assert "org/remote/model.safetensors" not in Hub.fetched
    assert "pickled weights are never opened" in pickle
