"""A Hub on this machine: enough of its HTTP protocol to create a repository, push it and download it again.

Blobs lie as files under their SHA-256; a commit maps paths to blobs. Written against huggingface_hub 2.4 with
HF_HUB_DISABLE_XET=1. A request is refused if its token does not suffice, or by order: `hub.fail["/commit/"] = 403`,
"drop" to close the connection without an answer, "half" to do so after half of an upload, "late" to do what is asked
and then close it. A list holds the orders of the next requests, None for none. `hub.before["/commit/"]` is called once,
before the request is carried out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WRITE_TOKEN, READ_TOKEN = "hf_" + "writeWRITE" * 4, "hf_" + "readREAD12" * 4
REPO, AT = r"/(?P<repo>[\w.-]+/[\w.-]+)", r"/(?P<revision>[^/]+)(?:/(?P<path>.+))?"
KIND = r"(?P<kind>models|datasets)"
Order = int | str | None


@dataclass(frozen=True)
class Blob:
    sha256: str
    size: int
    etag: str
    """Of a file under LFS its SHA-256, else git's SHA-1: by it the client sees what has not changed."""


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    @property
    def commits(self) -> list[Commit]:
        """The commits of main."""
        return self.branches["main"]


@dataclass
class Hub:
    """The server's address and what it holds."""

    folder: Path
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    fail: dict[str, Order | list[Order]] = field(default_factory=dict)
    before: dict[str, Callable[[], object]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes that were sent, by address."""

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Return path -> contents at the newest commit of a branch."""
        return {p: self.read(blob) for p, blob in self.repos[repo_id].branches[branch][-1].files.items()}

    def read(self, blob: Blob) -> bytes:
        return (self.folder / blob.sha256).read_bytes()

    def store(self, data: bytes, *, lfs: bool = False) -> Blob:
        sha256 = hashlib.sha256(data).hexdigest()
        (self.folder / sha256).write_bytes(data)
        return Blob(sha256, len(data), sha256 if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

    def commit(self, repo_id: str, message: str, files: dict[str, Blob], branch: str = "main") -> str:
        commits = self.repos[repo_id].branches[branch]
        oid = hashlib.sha1(f"{repo_id} {branch} {len(commits)} {message}".encode()).hexdigest()
        commits.append(Commit(oid, message, files))
        return oid

    def order(self, path: str) -> Order:
        """Return what a request to an address has to do, taking it from a list."""
        for part in [part for part in self.before if part in path]:
            self.before.pop(part)()
        for part, order in self.fail.items():
            if part in path:
                return (order.pop(0) if order else None) if isinstance(order, list) else order
        return None


def _key(kind: str | None, repo: str) -> str:
    """Return the name under which a repository is held: of a dataset, datasets/owner/name."""
    return f"datasets/{repo}" if kind in ("dataset", "datasets", "datasets/") else repo


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "-", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


@contextmanager
def hub_server(folder: Path) -> Iterator[Hub]:
    """Serve an empty Hub from a free port of this machine until the block ends."""
    (folder / "blobs").mkdir(parents=True)
    hub = Hub(folder / "blobs")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    # Headers and body are two packets: without this, the second waits 40 ms for the first to be acknowledged.
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, length = unquote(urlsplit(self.path).path), int(self.headers.get("Content-Length", 0))
        self.hub.requests.append(f"{self.command} {path}")
        order = self.hub.order(path)
        body = self.rfile.read(length // 2 if order == "half" else length)
        self.close_connection = order in ("drop", "half", "late")
        try:
            if isinstance(order, int):
                raise Refusal(order, "refused by order")
            if order is None:
                self._answer(*self._route(path, body))
            elif order == "late":
                self._route(path, body)
        except Refusal as no:
            headers = {"X-Error-Message": str(no), "X-Error-Code": no.code}
            self._answer({"error": str(no), **no.more}, headers, no.status)

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self, path: str, body: bytes) -> tuple[Any, dict[str, str]]:
        """Return the answer, as bytes or for JSON, and its headers."""
        for pattern, handle in self._routes():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return handle(body, **found.groupdict()), {}
        if found := re.fullmatch(rf"(?:/(?P<kind>datasets))?{REPO}/resolve{AT}", path):
            return self._resolve(**found.groupdict())
        raise Refusal(404, f"no such address: {path}")

    def _routes(self) -> tuple[tuple[str, Callable[..., Any]], ...]:
        return (
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", lambda _: {}),
            (rf"GET /api/{KIND}{REPO}(?:/revision{AT})?", self._info),
            (rf"GET /api/{KIND}{REPO}/tree{AT}", self._tree),
            (rf"POST /api/{KIND}{REPO}/branch/(?P<branch>[^/]+)", self._branch),
            (rf"POST /api/{KIND}{REPO}/preupload{AT}", self._preupload),
            (rf"POST /api/{KIND}{REPO}/commit{AT}", self._commit),
            (rf"POST /(?P<kind>datasets/)?{REPO[1:]}\.git/info/lfs/objects/batch", self._batch),
            (rf"POST /(?:datasets/)?{REPO[1:]}\.git/info/lfs/verify", lambda _, repo: {}),
            (r"PUT /lfs/(?P<oid>\w+)", self._upload),
        )

    def _create(self, body: bytes) -> Any:
        self._require(write=True)
        data = json.loads(body)
        owner, repo = data["organization"], f"{data['organization']}/{data['name']}"
        if owner != "me":
            raise Refusal(403, f"You don't have the rights to create a model under {owner}")
        repo = _key(data.get("type"), repo)
        if repo in self.hub.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.hub.url}/{repo}")
        self.hub.repos[repo] = Repo(data.get("visibility") == "private")
        attributes = self.hub.store(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.hub.commit(repo, "initial commit", {".gitattributes": attributes})
        return {"url": f"{self.hub.url}/{repo}"}

    def _info(self, _: bytes, kind: str, repo: str, revision: str | None, path: None) -> Any:
        repo = _key(kind, repo)
        commit, private = self._at(repo, revision or "main"), self.hub.repos[repo].private
        return {"id": repo, "sha": commit.oid, "private": private, "siblings": [{"rfilename": p} for p in commit.files]}

    def _tree(self, _: bytes, kind: str, repo: str, revision: str, path: str | None) -> Any:
        repo = _key(kind, repo)
        files = {p: b for p, b in self._at(repo, revision).files.items() if path is None or p.startswith(f"{path}/")}
        if not files:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        return [{"type": "file", "path": p, "size": blob.size, "oid": blob.etag} for p, blob in files.items()]

    def _branch(self, body: bytes, kind: str, repo: str, branch: str) -> Any:
        self._require(write=True)
        branches = self.hub.repos[_key(kind, repo)].branches
        if branch in branches:
            raise Refusal(409, f"the branch {branch} exists")
        branches[branch] = [*branches["main"]]
        return {}

    def _preupload(self, body: bytes, kind: str, repo: str, revision: str, path: None) -> Any:
        self._require(write=True)
        repo = _key(kind, repo)
        there = {p: blob.etag for p, blob in self._at(repo, revision).files.items()}
        paths = [file["path"] for file in json.loads(body)["files"]]
        files = [{"path": p, "oid": there.get(p), "shouldIgnore": False} for p in paths]
        for file in files:
            file["uploadMode"] = "lfs" if file["path"].endswith((".safetensors", ".parquet", ".png")) else "regular"
        return {"files": files}

    def _batch(self, body: bytes, kind: str | None, repo: str) -> Any:
        self._require(write=True)
        verify, objects = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}, json.loads(body)["objects"]
        for item in objects:
            if not (self.hub.folder / item["oid"]).exists():
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def _upload(self, body: bytes, oid: str) -> Any:
        if self.hub.store(body, lfs=True).sha256 != oid:
            raise Refusal(400, "the contents do not have the promised digest")
        return {}

    def _commit(self, body: bytes, kind: str, repo: str, revision: str, path: None) -> Any:
        self._require(write=True)
        repo = _key(kind, repo)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        before = self._at(repo, revision)
        if header["value"].get("parentCommit", before.oid) != before.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(before.files)
        for what, value in ((o["key"], o["value"]) for o in operations):
            if what == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif what == "lfsFile":
                files[value["path"]] = Blob(value["oid"], value["size"], value["oid"])
            else:
                del files[value["path"]]
        oid = self.hub.commit(repo, header["value"]["summary"], files, revision)
        return {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}

    def _resolve(self, kind: str | None, repo: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        repo = _key(kind, repo)
        commit = self._at(repo, revision)
        if path not in commit.files:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        blob = commit.files[path]
        return self.hub.read(blob), {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.oid}

    def _at(self, repo: str, revision: str) -> Commit:
        if repo not in self.hub.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if self.hub.repos[repo].private:
            self._require(write=False)
        branches = self.hub.repos[repo].branches
        if revision in branches:
            return branches[revision][-1]
        commits = (c for commits in branches.values() for c in commits if c.oid == revision)
        if commit := next(commits, None):
            return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _require(self, *, write: bool) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITE_TOKEN, READ_TOKEN):
            raise Refusal(401, "Invalid username or password.")
        if write and token != WRITE_TOKEN:
            raise Refusal(403, "Forbidden: this token only allows reading")

    def _answer(self, content: Any, headers: dict[str, str], status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if status == 200 and (part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            first, last = int(part[1]), min(int(part[2]), len(data) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data, status = data[first : last + 1], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent[self.path] = self.hub.sent.get(self.path, 0) + len(data)
            self.wfile.write(data)


def reach(hub: Hub, monkeypatch: Any) -> None:
    """Let this process talk to a Hub, with a cache of its own and without waits between its tries."""
    from huggingface_hub import constants

    values = {
        "ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(hub.folder.parent / "cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
