"""A Hub on loopback: what the real `huggingface_hub` client needs to publish, list and download, and faults on purpose.

It speaks plain LFS (clients take `HF_HUB_DISABLE_XET=1`), keeps everything in memory, and checks what it is sent: sizes,
sha256, the parts of a multipart upload, and the token on every request to a repository.
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
"""May do everything in the namespace `user`."""

READ_TOKEN = "hf_" + "r" * 34
"""Of the same user, and may only read."""

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin")
PART = 1 << 20
"""Files above are uploaded in parts of this many bytes."""


@dataclass
class Fault:
    """
    What goes wrong, and when.

    Args:
        method, path: requests concerned; the path is a regular expression, searched for.
        what: a status to answer with; `cut` to send half of a file and hang up; `garble` to send other bytes, as many.
        times: how often.
        headers: of the answer.
    """

    method: str
    path: str
    what: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """
    The server, on a port of its own, in a thread.

    Attributes:
        endpoint: for `HF_ENDPOINT`.
        repos: by kind (`model`, `dataset`) and name.
        faults: what is to go wrong next.
        requests: what was asked: method and path.
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

    def fail(self, method: str, path: str, what: int | str, times: int = 1, **headers: str) -> None:
        """Let the next requests go wrong, see [`Fault`]; underscores in the names of headers become hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(method, path, what, times, named))

    def reset(self) -> None:
        """Nothing goes wrong any more; nothing was asked yet."""
        self.faults.clear()
        self.requests.clear()

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for one in self.faults:
                if one.times > 0 and one.method == method and re.search(one.path, path):
                    one.times -= 1
                    return one
        return None


class _Refused(Exception):  # noqa: N818 (an answer, not an error of the server's)
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
        self.fault = self.hub.fault(self.command, self.url.path)
        try:
            if self.fault is not None and isinstance(self.fault.what, int):
                raise _Refused(self.fault.what, "on purpose")
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
        """Who asks; `None` for nobody in particular."""
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
            if method == self.command and (found := re.fullmatch(pattern, self.url.path)):
                return getattr(self, name)(**found.groupdict())
        raise _Refused(404, f"The server of the tests knows no {self.command} {self.url.path}")

    def validate_yaml(self) -> Any:
        """As far as the client library knows the rules: its strict reading of the metadata."""
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
        private = bool(self.sent.get("private")) or self.sent.get("visibility") == "private"
        repo = self.hub.repos[kind, name] = Repo(kind, name, private)
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
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
        shown = [one for one in folders if recursive or "/" not in one.removeprefix(prefix)]
        if prefix and not entries and not shown:
            raise _Refused(404, f"{folder} does not exist", "EntryNotFound")
        return self._json(
            [*entries, *({"type": "directory", "oid": "0" * 40, "size": 0, "path": one} for one in shown)]
        )

    def paths_info(self, kind: str, name: str, revision: str) -> Any:
        repo = self._repo(kind, name)
        files = repo.commits[self._at(repo, revision)]
        found = []
        for path in self.sent["paths"]:
            if path in files:
                found.append(files[path].entry(path))
            elif any(one.startswith(f"{path}/") for one in files):
                found.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        return self._json(found)

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
        for one in self.sent["objects"]:
            oid, size, put = one["oid"], one["size"], f"{self.hub.endpoint}/lfs/{one['oid']}"
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
        if self.fault is not None and self.fault.what == "garble":
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
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif one["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.uploaded[value["oid"]], True)
            elif one["key"] == "deletedFile":
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
        headers = {**commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(blob.content))}
        return lambda: self._file(blob.content, headers)

    def _file(self, content: bytes, headers: dict[str, str]) -> None:
        status, whole = 200, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or whole - 1), whole - 1)
            if first >= whole:
                self._send(416, b"", {"Content-Range": f"bytes */{whole}"})
                return
            content = content[first : last + 1]
            status, headers = 206, {**headers, "Content-Range": f"bytes {first}-{last}/{whole}"}
        what = None if self.fault is None else self.fault.what
        if what == "garble":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if what != "cut":
            self._send(status, content, headers)
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if status == 200:  # what is left is cut off at once
            self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.close_connection = True


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
