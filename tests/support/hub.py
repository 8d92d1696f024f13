"""A stand-in for the Hub on this machine: repositories in memory, behind the HTTP calls of its API.

It speaks what ``huggingface_hub`` asks for to create, describe, list, download and commit to model
repositories, with large files sent beforehand (LFS).
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_test"
LARGE = ".safetensors"
"""How the names of files end that are sent beforehand."""


@dataclass
class Repository:
    """The files of each commit, the newest last."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit with these files in place of all before; returns its digest."""
        name = sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[name] = files
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit and its files; "main" is the newest."""
        if revision == "main" and self.commits:
            revision = list(self.commits)[-1]
        return (revision, self.commits[revision]) if revision in self.commits else None


class Hub(ThreadingHTTPServer):
    """Repositories, what was sent beforehand, and the calls so far."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.sent: dict[str, bytes] = {}
        self.calls: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables with which another process uses this Hub, and an empty cache."""
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
                "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int, kind: str) -> None:
        self.answer(code, {"error": kind}, X_Error_Code=kind)

    def do(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.server.calls.append(f"{self.command} {'/'.join(parts)}")
        may = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        match parts:
            case ["api", "repos", "create"] if not may:
                self.refuse(401, "Unauthorized")
            case ["api", "repos", "create"]:
                self.create(json.loads(body))
            case ["api", "validate-yaml"]:
                self.answer(200, {"errors": [], "warnings": []})
            case ["lfs", oid]:
                self.server.sent[oid] = body
                self.answer(200, {})
            case ["api", "models", owner, name, *rest]:
                self.of_repository(f"{owner}/{name}", rest, body, may)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self.batch(json.loads(body))
            case [owner, name, *rest]:
                self.of_repository(f"{owner}/{name}", rest, body, may)

    do_GET = do_HEAD = do_POST = do_PUT = do  # noqa: N815

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.server.address}/{name}"
        if name in self.server.repositories:
            self.answer(409, {"error": "exists", "url": url})
            return
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.server.repositories[name] = Repository(private)
        self.server.repositories[name].commit({".gitattributes": b""})
        self.answer(200, {"url": url})

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}}
            for one in wanted["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def of_repository(self, name: str, rest: list[str], body: bytes, may: bool) -> None:
        known = self.server.repositories.get(name)
        if known is None or (known.private and not may):
            self.refuse(404 if may else 401, "RepoNotFound")
            return
        match rest:
            case ["preupload", _]:
                files = json.loads(body)["files"]
                modes = [{"path": one["path"], "shouldIgnore": False, "oid": None,
                          "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular"}
                         for one in files]  # fmt: skip
                self.answer(200, {"files": modes})
                return
            case ["commit", _]:
                self.commit(name, known, body)
                return
        revision = rest[1] if len(rest) > 1 else "main"
        found = known.at(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound")
            return
        commit, content = found
        match rest:
            case ["tree", *_]:
                self.answer(200, [listed(path, data) for path, data in content.items()])
            case ["resolve", _, path] if path in content:
                etag = f'"{sha256(content[path]).hexdigest()}"'
                self.answer(200, content[path], ETag=etag, X_Repo_Commit=commit)
            case ["resolve", *_]:
                self.refuse(404, "EntryNotFound")
            case _:
                names = [{"rfilename": path} for path in content]
                self.answer(200, {"id": name, "sha": commit, "private": known.private,
                                  "siblings": names, "tags": []})  # fmt: skip

    def commit(self, name: str, known: Repository, body: bytes) -> None:
        content = dict(list(known.commits.values())[-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "file":
                    content[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    content[value["path"]] = self.server.sent[value["oid"]]
                case "deletedFile":
                    del content[value["path"]]
        commit = known.commit(content)
        url = f"{self.server.address}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})


def listed(path: str, data: bytes) -> dict[str, Any]:
    """A file of a repository as its listing describes it."""
    digest = sha256(data).hexdigest()
    entry = {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}
    large = {"lfs": {"oid": digest, "size": len(data), "pointerSize": 130}}
    return entry | (large if path.endswith(LARGE) else {})


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers on a port of this machine inside the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def use(hub: Hub | None, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Let ``huggingface_hub`` use ``hub`` in this process, or no network, and another cache."""
    from huggingface_hub import close_session, constants

    address = hub.address if hub else "http://127.0.0.1:9"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": hub is None,
        "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True,
    }.items():  # fmt: skip
        patch.setattr(constants, name, value)
    patch.setenv("HF_TOKEN", TOKEN)
    close_session()
