"""A Hub on 127.0.0.1: as much of its documented HTTP protocol as publishing and reading a model need.

Repositories are branches of commits, each a mapping of file names to contents, in memory. ``failures`` are given
instead of an answer to the first requests whose path holds a word: a status with headers, or a broken connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_thisisasecretthatnobodymayseeanywhere"


@dataclass
class Repo:
    """One repository."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by commit
    branches: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)


@dataclass
class Failure:
    """What happens instead of an answer, ``times`` times, to requests whose method and path hold ``word``."""

    word: str
    status: int = 0  # 0: the connection breaks
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    after: int = 0  # requests that are answered before


class Hub:
    """The server; use as a context."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.failures: list[Failure] = []
        self.log: list[str] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            def handle_one(self, method: str) -> None:
                hub.answer(self, method)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """A branch's files."""
        found = self.repos[repo]
        return found.commits[found.branches[branch]]

    def count(self, word: str) -> int:
        """Requests whose method and path hold a word."""
        return sum(word in line for line in self.log)

    def answer(self, request: _Handler, method: str) -> None:
        """One request."""
        url = urlsplit(request.path)
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        line = f"{method} {url.path}"
        with self.lock:
            self.log.append(line)
            for failure in self.failures:
                if failure.word in line and failure.times:
                    if failure.after:
                        failure.after -= 1
                        continue
                    failure.times -= 1
                    if not failure.status:
                        request.close_connection = True
                        request.connection.close()
                        return
                    request.give(
                        failure.status, {"error": f"no, {request.headers.get('authorization')}"}, failure.headers
                    )
                    return
        if "/lfs-storage/" not in line and request.headers.get("authorization") != f"Bearer {TOKEN}":
            request.give(401, {"error": "Invalid credentials"})
            return
        for pattern, work in ROUTES:
            found = re.fullmatch(pattern, line)
            if found:
                with self.lock:
                    work(self, request, body, parse_qs(url.query), *map(unquote, found.groups()))
                return
        request.give(404, {"error": f"no such thing: {line}"}, {"X-Error-Code": "EntryNotFound"})

    # Repositories

    def create(self, request: _Handler, body: bytes, query: Any) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        if name.startswith("closed/"):
            request.give(403, {"error": "You don't have the rights to create a model there"})
        elif name in self.repos:
            request.give(409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"})
        else:
            repo = self.repos[name] = Repo(asked.get("private") is True or asked.get("visibility") == "private")
            repo.branches["main"] = self.committed(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
            request.give(200, {"url": f"{self.endpoint}/{name}", "id": name})

    def info(self, request: _Handler, body: bytes, query: Any, name: str, revision: str = "main") -> None:
        found = self.at(request, name, revision)
        if found is not None:
            sha, files = found
            request.give(200, {
                "id": name, "modelId": name, "sha": sha, "private": self.repos[name].private, "tags": [],
                "siblings": [{"rfilename": file} for file in files],
            })  # fmt: skip

    def tree(self, request: _Handler, body: bytes, query: Any, name: str, revision: str) -> None:
        found = self.at(request, name, revision)
        if found is not None:
            files = found[1].items()
            request.give(200, [{"type": "file", "path": f, "size": len(d), "oid": git_oid(d)} for f, d in files])

    def branch(self, request: _Handler, body: bytes, query: Any, name: str, branch: str) -> None:
        repo = self.repos[name]
        if branch in repo.branches:
            request.give(409, {"error": "Reference already exists"})
            return
        repo.branches[branch] = repo.branches[json.loads(body or b"{}").get("startingPoint") or "main"]
        request.give(200, {})

    def refs(self, request: _Handler, body: bytes, query: Any, name: str) -> None:
        branches = self.repos[name].branches.items()
        request.give(200, {
            "branches": [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": sha} for b, sha in branches],
            "converts": [], "tags": [], "pullRequests": [],
        })  # fmt: skip

    # Uploads

    def yaml(self, request: _Handler, body: bytes, query: Any) -> None:
        request.give(200, {"errors": [], "warnings": []})

    def preupload(self, request: _Handler, body: bytes, query: Any, name: str, revision: str) -> None:
        found = self.at(request, name, revision)
        if found is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            known = found[1].get(file["path"])
            oid = None if known is None else hashlib.sha256(known).hexdigest() if large else git_oid(known)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        request.give(200, {"files": files})

    def batch(self, request: _Handler, body: bytes, query: Any, name: str) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.large:
                answer["actions"] = {
                    "upload": {"href": f"{self.endpoint}/lfs-storage/{each['oid']}", "header": {}},
                    "verify": {"href": f"{self.endpoint}/{name}.git/info/lfs/verify", "header": {}},
                }
            objects.append(answer)
        request.give(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def store(self, request: _Handler, body: bytes, query: Any, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            request.give(400, {"error": "another content"})
            return
        self.large[oid] = body
        request.give(200, {})

    def verified(self, request: _Handler, body: bytes, query: Any, name: str) -> None:
        request.give(200 if json.loads(body)["oid"] in self.large else 404, {})

    def commit(self, request: _Handler, body: bytes, query: Any, name: str, revision: str) -> None:
        repo, lines = self.repos[name], [json.loads(line) for line in body.splitlines()]
        parent = repo.branches[revision]
        asked = lines[0]["value"].get("parentCommit")
        if asked is not None and asked != parent:
            request.give(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(repo.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.committed(repo, files)
        answer = {"commitUrl": f"{self.endpoint}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None}
        if query.get("create_pr") == ["1"]:
            repo.pulls.append(sha)
            answer["pullRequestUrl"] = f"{self.endpoint}/{name}/discussions/{len(repo.pulls)}"
        else:
            repo.branches[revision] = sha
        request.give(200, answer)

    def resolve(self, request: _Handler, body: bytes, query: Any, name: str, revision: str, file: str) -> None:
        found = self.at(request, name, revision)
        if found is None:
            return
        sha, files = found
        if file not in files:
            request.give(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_oid(files[file])}"', "Accept-Ranges": "none"}
        request.raw(200, files[file], headers)

    def committed(self, repo: Repo, files: dict[str, bytes]) -> str:
        """Add a commit; its hash."""
        sha = hashlib.sha1(repr((len(repo.commits), sorted(files.items()))).encode()).hexdigest()
        repo.commits[sha] = files
        return sha

    def at(self, request: _Handler, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision; an answer is given where there is none."""
        if name not in self.repos:
            request.give(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        repo = self.repos[name]
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            request.give(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return sha, repo.commits[sha]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one(self, method: str) -> None:
        raise NotImplementedError

    def log_message(self, *_: object) -> None:
        """Nothing: the hub keeps its own log."""

    def give(
        self, status: int, data: Any, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        self.raw(status, json.dumps(data).encode(), {"Content-Type": kind, **(headers or {})})

    def raw(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_HEAD(self) -> None:
        self.handle_one("HEAD")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_PUT(self) -> None:
        self.handle_one("PUT")


def git_oid(data: bytes) -> str:
    """A blob's."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", Hub.create),
    (r"POST /api/validate-yaml", Hub.yaml),
    (rf"GET /api/models/{NAME}", Hub.info),
    (rf"GET /api/models/{NAME}/revision/([^/]+)", Hub.info),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Hub.tree),
    (rf"GET /api/models/{NAME}/refs", Hub.refs),
    (rf"POST /api/models/{NAME}/branch/([^/]+)", Hub.branch),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", Hub.preupload),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", Hub.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Hub.batch),
    (rf"POST /{NAME}\.git/info/lfs/verify", Hub.verified),
    (r"PUT /lfs-storage/(\w+)", Hub.store),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
]
