"""A server on this machine that speaks the part of the Hub's API that a push needs, in memory, with faults on order.

    with FakeHub() as hub: hub.fail("commit", 500, times=1); ...; hub.repos["ann/toy"].files

Checks what the Hub checks: the token, that the repository is there and may be written, sizes and hashes of large files,
the parent of a commit, that a card's metadata is YAML. Large files (`lfs_above` bytes) go through LFS, as on the Hub.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz12345678"
READ_TOKEN = "hf_" + "readonlyabcdefghijklmnopqrstuvwx12"
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
CUT, SLOW, WRONG_BYTES, LOST = "cut", "slow", "wrong bytes", "the answer is lost"


@dataclass
class Blob:
    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def listed(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)  # (id, path -> blob), the newest last

    def commit(self, files: dict[str, Blob]) -> str:
        names = repr([(path, blob.oid) for path, blob in sorted(files.items())])
        sha = hashlib.sha1(f"{len(self.commits)}{names}".encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, Blob]:
        return {path: blob for path, blob in self.commits[-1][1].items() if path != ".gitattributes"}

    def at(self, revision: str) -> dict[str, Blob] | None:
        found = [files for sha, files in self.commits if sha.startswith(revision)]
        return self.commits[-1][1] if revision == "main" else found[0] if found else None


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class FakeHub:
    """User ann, who may write to her own name and to the organisation `zoo`."""

    def __init__(self, lfs_above: int = 10_000):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # LFS objects that were sent
        self.calls: list[str] = []
        self.faults: dict[str, list] = {}  # endpoint -> what happens at its next calls
        self.lfs_above = lfs_above
        self.user = "ann"
        self.on_commit = lambda: None  # something else that happens just before a commit arrives

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else an answer waits 40 ms for an acknowledgement
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None: ...

            def answer(self) -> None:
                hub._answer(self)

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, endpoint: str, fault, times: int = 1) -> None:
        """At the next calls: a status code, CUT, SLOW, WRONG_BYTES (of what is stored), LOST (done, never answered)."""
        self.faults.setdefault(endpoint, []).extend([fault] * times)

    def count(self) -> Counter:
        return Counter(self.calls)

    def fill(self, repo_id: str, files: dict[str, bytes], private: bool = True) -> Repo:
        """A repository that somebody made before."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit({".gitattributes": Blob(GITATTRIBUTES)} | {path: Blob(content) for path, content in files.items()})
        return repo

    # one request

    def _answer(self, http: BaseHTTPRequestHandler) -> None:
        body = self._body(http)
        path, method = unquote(urlsplit(http.path).path), http.command
        endpoint, call = self._route(method, path)
        self.calls.append(endpoint)
        fault = self.faults.get(endpoint, [])
        fault = fault.pop(0) if fault else None
        if fault == SLOW:
            time.sleep(1.0)
        if fault == CUT:
            http.close_connection = True
            http.connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            if isinstance(fault, int):
                raise Refused(fault, message="a fault on order")
            status, headers, content = call(http, body, fault)
        except Refused as refused:
            status, headers = refused.status, {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            content = json.dumps({"error": refused.message}).encode()
        with contextlib.suppress(OSError):  # a client that did not wait
            http.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                http.send_header(name, value)
            http.end_headers()
            if method != "HEAD":
                http.wfile.write(content)

    def _body(self, http: BaseHTTPRequestHandler) -> bytes:
        if http.headers.get("Transfer-Encoding") != "chunked":
            return http.rfile.read(int(http.headers.get("Content-Length") or 0))
        parts = []
        while size := int(http.rfile.readline(), 16):
            parts.append(http.rfile.read(size))
            http.rfile.readline()
        http.rfile.readline()
        return b"".join(parts)

    def _route(self, method: str, path: str):
        table = [
            ("GET", r"/api/whoami-v2", "whoami", self._whoami),
            ("POST", r"/api/validate-yaml", "validate", self._validate),
            ("POST", r"/api/repos/create", "create", self._create),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", "tree", self._tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", "paths", self._paths),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs", self._batch),
            ("PUT", r"/lfs/(\w+)", "put", self._put),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit", self._commit),
            ("PUT", r"/api/models/([^/]+/[^/]+)/settings", "settings", self._settings),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info", self._info),
            ("(?:GET|HEAD)", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve", self._resolve),
        ]
        for wanted, pattern, name, call in table:
            if re.fullmatch(wanted, method) and (found := re.fullmatch(pattern, path)):
                return name, lambda http, body, fault, f=found, c=call: c(http, body, fault, *f.groups())

        def unknown(*args):
            raise Refused(404, "EntryNotFound", path)

        return "unknown", unknown

    def _role(self, http) -> str | None:
        return {f"Bearer {TOKEN}": "write", f"Bearer {READ_TOKEN}": "read"}.get(http.headers.get("Authorization"))

    def _repo(self, http, repo_id: str, writes: bool = False) -> Repo:
        role, repo = self._role(http), self.repos.get(repo_id)
        if repo is None or (repo.private and role is None):
            raise Refused(401 if role is None else 404, "RepoNotFound", "Repository not found")
        if writes and (role != "write" or repo_id.split("/")[0] not in (self.user, "zoo")):
            raise Refused(403, message="Forbidden")
        return repo

    def _json(self, value, status: int = 200):
        return status, {"Content-Type": "application/json"}, json.dumps(value).encode()

    # the endpoints

    def _whoami(self, http, body, fault):
        if (role := self._role(http)) is None:
            raise Refused(401, message="Invalid user token")
        return self._json({"name": self.user, "orgs": [{"name": "zoo"}], "auth": {"accessToken": {"role": role}}})

    def _validate(self, http, body, fault):
        content = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---", content, flags=re.S)
        try:
            data = yaml.safe_load(found[1]) if found else None
            wrong = None if isinstance(data, dict) else "no metadata"
        except yaml.YAMLError:
            wrong = "no YAML"
        if not wrong and fault == WRONG_BYTES:
            wrong = '"license" must be one of those we know'
        if wrong:
            return self._json({"errors": [{"message": wrong}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def _create(self, http, body, fault):
        asked = json.loads(body)
        owner = asked.get("organization") or self.user
        if (role := self._role(http)) is None:
            raise Refused(401, message="Invalid user token")
        if role != "write" or owner not in (self.user, "zoo"):
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.repos:
            raise Refused(409, "RepoExists", "You already created this model repo")
        self.fill(repo_id, {}, asked.get("visibility") == "private" or asked.get("private") is True)
        return self._json({"url": f"{self.url}/{repo_id}", "name": repo_id})

    def _info(self, http, body, fault, repo_id, revision=None):
        repo = self._repo(http, repo_id)
        files = repo.at(revision or "main")
        if files is None:
            raise Refused(404, "RevisionNotFound")
        card = re.match(rb"---\n(.*?)\n---", files["README.md"].content, flags=re.S) if "README.md" in files else None
        data = yaml.safe_load(card[1]) if card else None
        sha = revision if revision and revision != "main" else repo.head
        return self._json(
            {
                "id": repo_id, "_id": "0", "sha": sha, "private": repo.private, "cardData": data, "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            }
        )  # fmt: skip

    def _tree(self, http, body, fault, repo_id, revision):
        files = self._repo(http, repo_id).at(revision)
        if files is None:
            raise Refused(404, "RevisionNotFound")
        folders = {path.rsplit("/", 1)[0] for path in files if "/" in path}
        listed = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders]
        return self._json(listed + [blob.listed(path) for path, blob in files.items()])

    def _paths(self, http, body, fault, repo_id, revision):
        files, asked = self._repo(http, repo_id).at(revision) or {}, parse_qs(body.decode())["paths"]
        return self._json([files[path].listed(path) for path in asked if path in files])

    def _preupload(self, http, body, fault, repo_id, revision):
        repo = self._repo(http, repo_id, writes=True)
        there = repo.at("main") or {}
        modes = []
        for file in json.loads(body)["files"]:
            blob = there.get(file["path"])
            oid = None if blob is None else blob.sha256 if blob.is_lfs else blob.oid
            mode = "lfs" if file["size"] > self.lfs_above else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": modes})

    def _batch(self, http, body, fault, repo_id):
        self._repo(http, repo_id, writes=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            action = {"actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}
            objects.append(wanted | ({} if wanted["oid"] in self.large else action))
        return self._json({"objects": objects, "transfer": "basic"})

    def _put(self, http, body, fault, oid):
        if fault == WRONG_BYTES:
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="hash mismatch")
        self.large[oid] = body
        return 200, {}, b""

    def _commit(self, http, body, fault, repo_id, revision):
        repo = self._repo(http, repo_id, writes=True)
        self.on_commit()
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != repo.head:
            raise Refused(412, message="the parent is not the head")
        files = dict(repo.commits[-1][1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Blob(content[:-1] + b"!" if fault == WRONG_BYTES else content)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    raise Refused(400, message="no such LFS object")
                files[value["path"]] = Blob(self.large[value["oid"]], is_lfs=True)
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        sha = repo.commit(files)
        if fault == LOST:
            http.close_connection = True
            http.connection.shutdown(socket.SHUT_RDWR)
        return self._json({"commitUrl": f"{self.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    def _settings(self, http, body, fault, repo_id):
        repo = self._repo(http, repo_id, writes=True)
        asked = json.loads(body)
        repo.private = asked.get("visibility") == "private" if "visibility" in asked else asked["private"]
        return self._json({})

    def _resolve(self, http, body, fault, repo_id, revision, path):
        repo = self._repo(http, repo_id)
        blob = (repo.at(revision) or {}).get(path)
        sha = repo.head if revision == "main" else revision
        if blob is None:
            raise Refused(404, "EntryNotFound")
        etag = blob.sha256 if blob.is_lfs else blob.oid
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}, blob.content


@contextlib.contextmanager
def running(**options) -> Iterator[FakeHub]:
    with FakeHub(**options) as hub:
        yield hub
