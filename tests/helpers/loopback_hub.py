"""A small Hugging Face Hub on this machine, which `huggingface_hub` itself talks to.

Repositories, commits and large files are in memory. It counts what is sent, and can go down in the
middle of a file.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
CHUNK = 1 << 12
SIGNATURE = "X-Amz-Signature=0123456789abcdef"


@dataclass
class Account:
    """Who a token belongs to, and what it may do."""

    name: str
    role: str = "write"
    organisations: tuple[str, ...] = ()

    def may_write(self, repo_id: str) -> bool:
        return self.role == "write" and repo_id.split("/")[0] in (self.name, *self.organisations)


@dataclass
class Repository:
    """Commits, oldest first: each the whole tree, path → content, or (SHA-256, size) if large."""

    private: bool = False
    commits: list[dict] = field(default_factory=lambda: [{}])
    refs: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def sha(number: int) -> str:
        return hashlib.sha1(str(number).encode()).hexdigest()

    def find(self, revision: str) -> int:
        """The commit's number of a branch, tag or commit."""
        names = {self.sha(i): i for i in range(len(self.commits))} | self.refs
        number = (names | {"main": len(self.commits) - 1}).get(revision)
        if number is None:
            raise Answer(404, {}, X_Error_Code="RevisionNotFound")
        return number


class Down(Exception):
    """The connection is lost."""


class Answer(Exception):
    """The status, content and headers of an answer; a refusal is raised."""

    def __init__(self, status=200, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.status = status
        self.content = content
        self.headers = {"Content-Length": len(content)} | headers


NO_RIGHTS = {"X_Error_Message": "You don't have the rights"}
REPO = "([^/]+/[^/]+)"
ROUTES = (
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"GET /api/models/{REPO}/auth-check(/write)?", "auth_check"),
    (rf"GET /api/models/{REPO}(?:/revision/([^/]+))?", "info"),
    (rf"GET /api/models/{REPO}/tree/([^/]+)", "tree"),
    (rf"POST /api/models/{REPO}/preupload/([^/]+)", "preupload"),
    (rf"POST /api/models/{REPO}/commit/[^/]+", "commit"),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"POST /lfs/([0-9a-f]{64})/verify", "verify"),
    (r"PUT /lfs/([0-9a-f]{64})", "store"),
    (rf"(?:HEAD|GET) /{REPO}/resolve/([^/]+)/(.+)", "resolve"),
)


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other: each call is a method that returns its answer."""

    protocol_version = "HTTP/1.1"

    def route(self):
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path))
        try:
            if self.server.down:
                raise Down
            if self.command == "PUT":
                self.body = b""
            else:
                self.body = b"".join(self.pieces())
            answer = self.answer(f"{self.command} {path}")
        except Answer as refusal:
            answer = refusal
        except Down:
            # This resets the connection, as a cable that is pulled out does.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return self.connection.close()
        if not (isinstance(answer, Answer)):
            answer = Answer(200, answer)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            # So many bytes of one answer are sent before the connection is lost.
            most = self.server.cut_at
            self.wfile.write(answer.content[:most])
            self.close_connection |= most is not None and most < len(answer.content)

    do_GET = route
    do_HEAD = route
    do_POST = route
    do_PUT = route

    def answer(self, request: str):
        for pattern, name in ROUTES:
            match = re.fullmatch(pattern, request)
            if match is not None:
                parts = []
                for part in match.groups():
                    # A part that is left out is None.
                    if part is not None:
                        part = unquote(part)
                    parts.append(part)
                return getattr(self, name)(*parts)
        return Answer(404, {"error": "no such page"})

    def log_message(self, *_):
        pass

    def pieces(self):
        """The request's body, piece by piece."""
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read(min(left, CHUNK))
            if not piece:
                raise Down
            left -= len(piece)
            yield piece

    def account(self) -> Account | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.server.accounts.get(token)

    def repository(self, repo_id: str, *, write: bool = False) -> Repository:
        """The repository, if it is there for this token."""
        found = self.server.repositories.get(repo_id)
        account = self.account()
        may_write = account is not None and account.may_write(repo_id)
        if found is None or (found.private and not may_write):
            status = 401 if account is None else 404
            raise Answer(status, {}, X_Error_Code="RepoNotFound")
        if write and not may_write:
            raise Answer(403, {}, **NO_RIGHTS)
        return found

    # The calls.

    def whoami(self):
        account = self.account()
        # It repeats the token, as no server should.
        if account is None:
            header = self.headers.get("Authorization")
            raise Answer(401, {}, X_Error_Message=f"Invalid credentials {header}")
        return {"name": account.name, "auth": {"accessToken": {"role": account.role}}}

    def create(self):
        wanted = json.loads(self.body)
        account = self.account()
        owner = wanted.get("organization")
        if owner is None:
            owner = account.name
        repo_id = f"{owner}/{wanted['name']}"
        if not account.may_write(repo_id):
            raise Answer(403, {}, **NO_RIGHTS)
        status = 200
        if repo_id in self.server.repositories:
            status = 409
        private = wanted.get("visibility") == "private"
        self.server.repositories.setdefault(repo_id, Repository(private))
        return Answer(status, {"url": f"{self.server.url}/{repo_id}"})

    def validate(self):
        return {"warnings": [], "errors": []}

    def auth_check(self, repo_id, write):
        self.repository(repo_id, write=bool(write))
        return {}

    def info(self, repo_id, revision):
        repository = self.repository(repo_id)
        if revision is None:
            revision = "main"
        number = repository.find(revision)
        siblings = [{"rfilename": path} for path in repository.commits[number]]
        about = {"id": repo_id, "sha": repository.sha(number), "private": repository.private}
        return about | {"siblings": siblings}

    def tree(self, repo_id, revision):
        repository = self.repository(repo_id)
        entries = []
        for path, content in repository.commits[repository.find(revision)].items():
            oid, size = git_oid(content)
            entries.append({"type": "file", "path": path, "oid": oid[:40], "size": size})
            if not isinstance(content, bytes):
                entries[-1]["lfs"] = {"oid": oid, "size": size, "pointerSize": 130}
        return entries

    def preupload(self, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        tree = repository.commits[repository.find(revision)]
        entries = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "regular"
            if path.endswith(".safetensors"):
                mode = "lfs"
            known = {}
            if path in tree:
                known = {"oid": git_oid(tree[path])[0]}
            entries.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        return {"files": entries}

    def batch(self, repo_id):
        self.repository(repo_id, write=True)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            objects.append({key: entry[key] for key in ("oid", "size")})
            if entry["oid"] not in self.server.large:
                url = f"{self.server.url}/lfs/{entry['oid']}"
                actions = {"upload": f"{url}?{SIGNATURE}", "verify": f"{url}/verify"}
                objects[-1]["actions"] = {name: {"href": to} for name, to in actions.items()}
        return {"objects": objects, "transfer": "basic"}

    def store(self, oid):
        content = b""
        server = self.server
        for piece in self.pieces():
            content += piece
            with server.lock:
                server.sent[oid] = server.sent.get(oid, 0) + len(piece)
                if server.down_after is not None:
                    server.down_after -= len(piece)
                    if server.down_after <= 0:
                        server.down = True
                if server.down:
                    raise Down
        assert self.path.endswith(SIGNATURE) and hashlib.sha256(content).hexdigest() == oid
        server.large[oid] = content
        return Answer()

    def verify(self, oid):
        status = 200 if oid in self.server.large else 404
        return Answer(status, {})

    def commit(self, repo_id):
        repository = self.repository(repo_id, write=True)
        tree = dict(repository.commits[-1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.server.large
                tree[value["path"]] = (value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        repository.commits.append(tree)
        sha = repository.sha(len(repository.commits) - 1)
        return {"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha}

    def resolve(self, repo_id, revision, path):
        repository = self.repository(repo_id)
        number = repository.find(revision)
        commit = repository.sha(number)
        stored = repository.commits[number].get(path)
        if stored is None:
            raise Answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if path in self.server.gated:
            raise Answer(403, {}, X_Error_Code="GatedRepo")
        content = self.server.content(stored)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{git_oid(stored)[0]}"'}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is not None:
            start = int(match[1])
            end = min(int(match[2]), len(content) - 1)
            self.server.ranged_bytes += end + 1 - start
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            piece = content[start : end + 1]
            if self.server.spoil is not None:
                piece, headers["Content_Range"] = self.server.spoil(piece, headers["Content_Range"])
            return Answer(206, piece, **headers)
        return Answer(200, content, **headers)


def git_oid(content: bytes | tuple[str, int]) -> tuple[str, int]:
    """A file's id, as git or its extension for large files has it, and its size."""
    if not isinstance(content, bytes):
        return content
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content)


class LoopbackHub(ThreadingHTTPServer):
    """The server. Within a block it answers; afterwards it is closed."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # The accounts by their tokens.
        self.accounts: dict[str, Account] = {}
        # The repositories by "owner/name".
        self.repositories: dict[str, Repository] = {}
        # The large files by SHA-256.
        self.large: dict[str, bytes] = {}
        # The bytes of them that were sent, each time.
        self.sent: dict[str, int] = {}
        # The method and the path of each request, without its query.
        self.requests: list[tuple[str, str]] = []
        # After so many bytes of large files the Hub is down.
        self.down_after: int | None = None
        self.down = False
        # The paths of files that need a permission.
        self.gated: set[str] = set()
        # The bytes that were sent as ranges of files.
        self.ranged_bytes = 0
        # (bytes of a range, its header) → what is sent in their place.
        self.spoil: Callable[[bytes, str], tuple[bytes, str]] | None = None
        # After so many bytes of an answer the connection is lost.
        self.cut_at: int | None = None
        self.lock = threading.Lock()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a repository's files."""
        repository = self.repositories[repo_id]
        tree = repository.commits[repository.find(revision)]
        return {path: self.content(stored) for path, stored in tree.items()}

    def content(self, stored: bytes | tuple[str, int]) -> bytes:
        if isinstance(stored, bytes):
            return stored
        return self.large[stored[0]]

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        """Commits files as if they had been uploaded."""
        repository = self.repositories.setdefault(repo_id, Repository(private))
        repository.commits.append({**repository.commits[-1], **files})

    def revive(self) -> None:
        self.down = False
        self.down_after = None

    def handle_error(self, request, client_address):
        # A lost connection is no news.
        pass

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.thread.join()
        self.server_close()
