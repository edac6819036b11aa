"""A hub small enough for a test: the answers of the real one that the client's calls need.

Regular files only: what is large goes another way, and no patch is.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]
TOKEN = "hf_test"


@dataclass
class Repository:
    """history: its commits, the last being the main branch. gated: nobody may read it."""

    history: list[Files]
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    def files(self, commit: str) -> Files:
        return self.history[int(commit, 16)]

    def commit(self, number: int) -> str:
        return f"{number:040x}"

    @property
    def head(self) -> str:
        return self.commit(len(self.history) - 1)

    def resolve(self, revision: str) -> str:
        if revision == "main":
            return self.head
        if revision not in map(self.commit, range(len(self.history))):
            raise Refusal(404, "RevisionNotFound")
        return revision


@cache
def blob_id(data: bytes) -> str:
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """A running one. asked: the requests so far, "GET /path". fetched: files whose bytes were."""

    repositories: dict[str, Repository]
    asked: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    url: str = ""


class Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.+))?", path):
                answer = self._api(self._repository(found[1]), found[1], found[2] or "", body)
                self._answer(200, json.dumps(answer).encode())
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(self._repository(found[1]), found[2], found[3])
            else:
                raise Refusal(404, "")
        except Refusal as refusal:
            self._answer(refusal.status, b"{}", {"X-Error-Code": refusal.code})

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None:
            raise Refusal(401, "RepoNotFound")
        return repository

    def _api(self, repository: Repository, name: str, call: str, body: bytes) -> Any:
        verb, _, revision = call.partition("/")
        if verb in ("", "revision"):
            commit = repository.resolve(revision or "main")
            return {"id": name, "sha": commit, "private": False, "siblings": [], "tags": []}
        if repository.gated:
            raise Refusal(403, "GatedRepo")
        if verb == "tree":
            files = repository.files(repository.resolve(revision.rstrip("/")))
            return [
                {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
                for path, data in files.items()
            ]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(403, "")
        if verb == "auth-check":
            return {}
        if verb == "preupload":
            asked = json.loads(body)["files"]
            return {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in asked
                ]
            }
        assert verb == "commit"
        return self._commit(repository, name, [json.loads(line) for line in body.splitlines()])

    def _commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> Any:
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.head):
            raise Refusal(412, "")
        files = dict(repository.history[-1])
        for line in lines[1:]:
            assert line["key"] == "file"
            files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        repository.history.append(files)
        repository.messages.append(header["summary"])
        head = repository.head
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{head}", "commitOid": head}

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        commit = repository.resolve(revision)
        if repository.gated:
            raise Refusal(403, "GatedRepo")
        data = repository.files(commit).get(path)
        if data is None:
            raise Refusal(404, "EntryNotFound")
        if self.command == "GET":
            self.hub.fetched.append(path)
        self._answer(200, data, {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": commit})

    def _answer(self, status: int, data: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """A hub with these repositories, on this machine alone, until the block is over."""
    hub = Hub(repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
