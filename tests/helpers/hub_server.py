"""A Hub on loopback: what the real `huggingface_hub` needs to publish, list and download, and faults on demand.

It speaks plain LFS (clients set `HF_HUB_DISABLE_XET=1`), keeps everything in memory, and checks what it receives: sizes,
sha256, the parts of a multipart upload, and the token of every request to a repository.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import DatasetCard, ModelCard, SpaceCard
from yaml import YAMLError

from .hub_storage import Blob, Repo

TOKEN = "hf_" + "t" * 34
"""May write in the namespace `user`."""

READ_TOKEN = "hf_" + "r" * 34
"""A token of the same user that may only read."""

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin")
PART = 1 << 20
"""Larger files are uploaded in parts of this many bytes."""


@dataclass
class Fault:
    """
    A request that fails.

    Args:
        method, path: of the request; the path is a regular expression to search for.
        effect: the status of the answer, or `garble` for an upload that arrives with other bytes.
        times: how many requests fail.
        headers: of the answer.
    """

    method: str
    path: str
    effect: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """
    The server, in a thread.

    Attributes:
        endpoint: its URL, for `HF_ENDPOINT`.
        repos: by type (`model`, `dataset`) and name.
        faults: the next requests that fail.
        requests: method and path of each request.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploaded: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reset(self) -> None:
        """Forget everything."""
        for store in (self.repos, self.uploaded, self.parts, self.faults, self.requests):
            store.clear()

    def fail(self, *fault: Any, **options: Any) -> None:
        """Let the next requests fail; takes the arguments of [`Fault`]."""
        self.faults.append(Fault(*fault, **options))

    def add_repo(self, kind: str, name: str, private: bool = False) -> Repo:
        """Create a repository."""
        repo = self.repos[kind, name] = Repo(kind, name, private)
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return repo

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault of a request, if it has one."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Refused(Exception):  # noqa: N818 (an answer, not a failure of the server)
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self) -> None:
        self.url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.hub.requests.append((self.command, self.url.path))
        self.fault = self.hub.take_fault(self.command, self.url.path)
        try:
            if self.fault is not None and isinstance(self.fault.effect, int):
                raise _Refused(self.fault.effect, "a fault of the test")
            with self.hub.lock:
                answer = self._route()
            answer()
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message} | (self.fault.headers if self.fault else {})
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> Any:
        return lambda: self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @property
    def sent(self) -> Any:
        return json.loads(self.body)

    def _user(self, write: bool = False) -> str | None:
        """The user of the request's token; `None` without a token."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in (TOKEN, READ_TOKEN):
            raise _Refused(401, "Invalid credentials in Authorization header")
        if write and not given:
            raise _Refused(401, "Invalid username or password.")
        if write and given == READ_TOKEN:
            raise _Refused(403, "Forbidden: the token has no write access")
        return "user" if given else None

    def _repo(self, kind: str, name: str, write: bool = False) -> Repo:
        user = self._user(write)
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and user is None):
            raise _Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _at(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(unquote(revision), unquote(revision))
        if sha not in repo.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def _route(self) -> Any:
        for method, pattern, name in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, self.url.path)):
                return getattr(self, name)(**match.groupdict())
        raise _Refused(404, f"The server of the tests knows no {self.command} {self.url.path}")

    def validate_yaml(self) -> Any:
        """Check metadata as strictly as the client library does."""
        card = {"model": ModelCard, "dataset": DatasetCard, "space": SpaceCard}[self.sent.get("repoType", "model")]
        try:
            card(self.sent["content"], ignore_metadata_errors=False)
        except (ValueError, YAMLError) as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def create(self) -> Any:
        user = self._user(write=True)
        kind, owner = self.sent.get("type") or "model", self.sent.get("organization") or user
        name = f"{owner}/{self.sent['name']}"
        if owner != user:
            raise _Refused(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        url = {"url": f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"}
        if (kind, name) in self.hub.repos:
            return self._json({"error": "You already created this repo", **url}, 409)
        self.hub.add_repo(kind, name, bool(self.sent.get("private")) or self.sent.get("visibility") == "private")
        return self._json(url)

    def branch(self, kind: str, name: str, branch: str) -> Any:
        repo = self._repo(kind, name, write=True)
        if unquote(branch) in repo.branches:
            raise _Refused(409, "Reference already exists")
        repo.branches[unquote(branch)] = repo.branches["main"]
        return self._json({})

    def info(self, kind: str, name: str, revision: str | None = None) -> Any:
        repo = self._repo(kind, name)
        sha = self._at(repo, revision or "main")
        files = [{"rfilename": path} for path in repo.commits[sha]]
        facts = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": files, "tags": []}
        return self._json({**facts, "cardData": {}, "downloads": 0, "likes": 0, "gated": False, "disabled": False})

    def tree(self, kind: str, name: str, revision: str, folder: str | None = None) -> Any:
        repo = self._repo(kind, name)
        files = repo.commits[self._at(repo, revision)]
        prefix = f"{unquote(folder)}/" if folder else ""
        recursive = parse_qs(self.url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, blob in files.items():
            if path.startswith(prefix):
                below = path.removeprefix(prefix).split("/")
                folders |= {prefix + "/".join(below[: depth + 1]) for depth in range(len(below) - 1)}
                if recursive or len(below) == 1:
                    entries.append(blob.entry(path))
        shown = [path for path in folders if recursive or "/" not in path.removeprefix(prefix)]
        if prefix and not entries and not shown:
            raise _Refused(404, f"{folder} does not exist", "EntryNotFound")
        return self._json([*entries, *map(_folder_entry, shown)])

    def paths_info(self, kind: str, name: str, revision: str) -> Any:
        repo = self._repo(kind, name)
        files = repo.commits[self._at(repo, revision)]
        entries = []
        for path in self.sent["paths"]:
            if path in files:
                entries.append(files[path].entry(path))
            elif any(other.startswith(f"{path}/") for other in files):
                entries.append(_folder_entry(path))
        return self._json(entries)

    def preupload(self, kind: str, name: str, revision: str) -> Any:
        repo = self._repo(kind, name, write=True)
        self._at(repo, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in self.sent["files"]
        ]
        return self._json({"files": files})

    def lfs_batch(self, name: str, kind: str = "model") -> Any:
        self._repo("dataset" if kind else "model", name, write=True)
        objects = []
        for requested in self.sent["objects"]:
            oid, size = requested["oid"], requested["size"]
            put = f"{self.hub.endpoint}/lfs/{oid}"
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.uploaded:
                upload: dict[str, Any] = {"href": put}
                if size > PART:
                    numbers = range(1, -(-size // PART) + 1)
                    upload["header"] = {"chunk_size": str(PART), **{str(n): f"{put}/{n}" for n in numbers}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{put}/verify"}}
            objects.append(answer)
        return self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> Any:
        self._keep(oid, self.body)
        return lambda: self._send(200, b"")

    def lfs_part(self, oid: str, number: str) -> Any:
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        etag = hashlib.md5(self.body).hexdigest()
        return lambda: self._send(200, b"", {"ETag": f'"{etag}"'})

    def lfs_complete(self, oid: str) -> Any:
        parts = self.hub.parts.pop(oid)
        for part in self.sent["parts"]:
            if part["etag"].strip('"') != hashlib.md5(parts[part["partNumber"]]).hexdigest():
                raise _Refused(422, f"Part {part['partNumber']} has another ETag")
        self._keep(oid, b"".join(parts[number] for number in sorted(parts)))
        return self._json({})

    def _keep(self, oid: str, content: bytes) -> None:
        if self.fault is not None and self.fault.effect == "garble":
            content = content[:-1] + b"?"
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(422, "The uploaded object does not have the sha256 that was announced")
        self.hub.uploaded[oid] = content

    def lfs_verify(self, oid: str) -> Any:
        self._user(write=True)
        if oid not in self.hub.uploaded or len(self.hub.uploaded[oid]) != self.sent["size"]:
            raise _Refused(404, "Object was not uploaded")
        return self._json({})

    def commit(self, kind: str, name: str, revision: str) -> Any:
        repo = self._repo(kind, name, write=True)
        branch = unquote(revision)
        files = dict(repo.commits[self._at(repo, branch)])
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                files[value["path"]] = Blob(self.hub.uploaded[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files)
        return self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}"})

    def resolve(self, name: str, revision: str, path: str, kind: str | None = None) -> Any:
        repo = self._repo("dataset" if kind else "model", name)
        sha = self._at(repo, revision)
        commit = {"X-Repo-Commit": sha}
        blob = repo.commits[sha].get(unquote(path))
        if blob is None:
            headers = {**commit, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return lambda: self._send(404, b"Entry not found", headers)
        etag = blob.sha256 if blob.lfs else blob.git_sha1
        headers = {**commit, "ETag": f'"{etag}"'}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(blob.content))}
        return lambda: self._send(200, blob.content, headers)


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}


_NAME = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|dataset)s/{_NAME}"
_ROUTES = [
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/repos/create", "create"),
    ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/(?P<kind>datasets/)?{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", "lfs_part"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_complete"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET", _API, "info"),
    ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("GET", rf"/(?P<kind>datasets/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("HEAD", rf"/(?P<kind>datasets/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
