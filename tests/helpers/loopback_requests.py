"""How the Hub of the tests answers the calls of creating, uploading and downloading."""

import base64
import hashlib
import json
import re
import socket
import struct
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from loopback_state import Account, Down, Repository, git_oid

CHUNK = 1 << 12
SIGNATURE = "X-Amz-Signature=0123456789abcdef"


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other."""

    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)/auth-check(/write)?", "auth_check"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("POST", r"/lfs/([0-9a-f]{64})/verify", "verify"),
        ("POST", r"/lfs/([0-9a-f]{64})/complete", "complete"),
        ("PUT", r"/lfs/([0-9a-f]{64})(?:/(\d+))?", "store"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def route(self):
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path))
        if self.server.down:
            return self.lose_connection()
        try:
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    return getattr(self, name)(*(g and unquote(g) for g in match.groups()))
            self.read()
            self.answer(404, {"error": "no such page"})
        except Down:
            self.lose_connection()

    do_GET = do_HEAD = do_POST = do_PUT = route

    def lose_connection(self):
        """Resets the connection, as a cable that is pulled out does."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    # What is read and answered

    def body(self):
        """The request's body, piece by piece."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, CHUNK))
            if not piece:
                raise Down
            left -= len(piece)
            yield piece

    def read(self) -> bytes:
        return b"".join(self.body())

    def answer(self, status=200, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass

    # Who asks

    def account(self) -> Account | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.server.accounts.get(token)

    def readable(self, repo_id: str) -> Repository | None:
        """The repository, if it is there for this token; else that is answered."""
        repository = self.server.repositories.get(repo_id)
        account = self.account()
        if repository and repository.private and not (account and account.may_write(repo_id)):
            repository = None
        if repository is None:
            self.answer(404 if account else 401, {}, X_Error_Code="RepoNotFound")
        return repository

    def writable(self, repo_id: str) -> Repository | None:
        repository = self.readable(repo_id)
        account = self.account()
        if repository and not (account and account.may_write(repo_id)):
            self.answer(403, {}, X_Error_Message="You don't have the rights")
            return None
        return repository

    # The calls

    def whoami(self):
        account = self.account()
        if account is None:
            said = self.headers.get("Authorization")  # as no server should
            return self.answer(401, {}, X_Error_Message=f"Invalid credentials {said}")
        organisations = [{"name": name} for name in account.organisations]
        token = {"displayName": "test", "role": account.role}
        self.answer(
            200, {"name": account.name, "orgs": organisations, "auth": {"accessToken": token}}
        )

    def create(self):
        wanted = json.loads(self.read())
        account = self.account()
        if account is None:
            return self.answer(401, {})
        repo_id = f"{wanted.get('organization') or account.name}/{wanted['name']}"
        if not account.may_write(repo_id):
            return self.answer(403, {}, X_Error_Message="You don't have the rights")
        url = {"url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repositories:
            return self.answer(409, url)
        private = wanted.get("visibility") == "private"
        self.server.repositories[repo_id] = Repository(private)
        self.answer(200, url)

    def validate(self):
        self.read()
        self.answer(200, {"warnings": [], "errors": []})

    def auth_check(self, repo_id, write):
        if (self.writable if write else self.readable)(repo_id):
            self.answer(200, {})

    def info(self, repo_id, revision):
        repository = self.readable(repo_id)
        if repository is None:
            return
        number = repository.find(revision or "main")
        if number is None:
            return self.answer(404, {}, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": path} for path in repository.commits[number]]
        self.answer(
            200,
            {
                "id": repo_id,
                "sha": repository.sha(number),
                "private": repository.private,
                "siblings": siblings,
            },
        )

    def tree(self, repo_id, revision):
        repository = self.readable(repo_id)
        if repository is None:
            return
        entries = []
        for path, content in repository.commits[repository.find(revision)].items():
            oid, size = git_oid(content)
            entry = {"type": "file", "path": path, "oid": oid[:40], "size": size}
            if not isinstance(content, bytes):
                entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)

    def preupload(self, repo_id, revision):
        files = json.loads(self.read())["files"]
        repository = self.writable(repo_id)
        if repository is None:
            return
        tree = repository.commits[repository.find(revision)]
        found = []
        for file in files:
            path = file["path"]
            large = path.endswith(".safetensors")
            entry = {"path": path, "uploadMode": "lfs" if large else "regular"}
            if path in tree:
                entry["oid"] = git_oid(tree[path])[0]
            found.append(entry | {"shouldIgnore": False})
        self.answer(200, {"files": found})

    def batch(self, repo_id):
        objects = json.loads(self.read())["objects"]
        if self.writable(repo_id) is None:
            return
        found = []
        for wanted in objects:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size}
            if oid not in self.server.large:
                url = f"{self.server.url}/lfs/{oid}"
                upload = {"href": f"{url}?{SIGNATURE}"}
                part = self.server.multipart
                if part is not None and size > part:
                    self.server.parts[oid] = {}
                    header = {"chunk_size": str(part)}
                    for number in range(1, -(-size // part) + 1):
                        header[f"{number:05}"] = f"{url}/{number}?{SIGNATURE}"
                    upload = {"href": f"{url}/complete?{SIGNATURE}", "header": header}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
            found.append(entry)
        self.answer(200, {"objects": found, "transfer": "basic"})

    def store(self, oid, part):
        content = bytearray()
        for piece in self.body():
            content += piece
            self.server.received(oid, len(piece))
        if part is not None:
            self.server.parts[oid][int(part)] = bytes(content)
        elif hashlib.sha256(content).hexdigest() == oid:
            self.server.large[oid] = bytes(content)
        signed = parse_qs(urlsplit(self.path).query)
        assert signed
        self.answer(200, ETag=f'"{hashlib.md5(content).hexdigest()}"')

    def complete(self, oid):
        parts = json.loads(self.read())["parts"]
        stored = self.server.parts[oid]
        content = b"".join(stored[part["partNumber"]] for part in parts)
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {})
        self.server.large[oid] = content
        self.answer(200, {})

    def verify(self, oid):
        self.read()
        self.answer(200 if oid in self.server.large else 404, {})

    def commit(self, repo_id, revision):
        lines = [json.loads(line) for line in self.read().splitlines()]
        repository = self.writable(repo_id)
        if repository is None:
            return
        tree = dict(repository.commits[-1])
        for line in lines:
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
        address = f"{self.server.url}/{repo_id}/commit/{sha}"
        self.answer(200, {"commitUrl": address, "commitOid": sha})

    def resolve(self, repo_id, revision, path):
        repository = self.readable(repo_id)
        if repository is None:
            return
        number = repository.find(revision)
        if number is None:
            return self.answer(404, {}, X_Error_Code="RevisionNotFound")
        commit = repository.sha(number)
        content = repository.commits[number].get(path)
        if content is None:
            return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        oid, _ = git_oid(content)
        data = content if isinstance(content, bytes) else self.server.large[oid]
        self.answer(200, data, ETag=f'"{oid}"', X_Repo_Commit=commit)
