"""A small Hugging Face Hub on this machine, which `huggingface_hub` itself talks to.

It keeps repositories, their commits and large files in memory, checks tokens, and answers the calls
that creating, uploading and downloading take. It counts what is sent to it, and can go down in the
middle of a file.
"""

import threading
from http.server import ThreadingHTTPServer

from loopback_requests import Account, Down, Handler, Repository

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"


class LoopbackHub(ThreadingHTTPServer):
    """The server."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.accounts: dict[str, Account] = {}  # by token
        self.repositories: dict[str, Repository] = {}  # by "owner/name"
        self.large: dict[str, bytes] = {}  # large files by SHA-256
        self.sent: dict[str, int] = {}  # bytes of them that were sent, each time
        self.requests: list[tuple[str, str]] = []  # method, path without its query
        self.down_after: int | None = None  # bytes of large files
        self.down = False
        self.gated: set[str] = set()  # paths of files
        self.ranged_bytes = 0  # sent as ranges of files
        self.cut_at: int | None = None  # bytes of an answer after which the connection is lost
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a repository's files."""
        repository = self.repositories[repo_id]
        tree = repository.commits[repository.find(revision)]
        return {path: self.content(stored) for path, stored in tree.items()}

    def content(self, stored: bytes | tuple[str, int]) -> bytes:
        return stored if isinstance(stored, bytes) else self.large[stored[0]]

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        """Commits files as if they had been uploaded."""
        repository = self.repositories.setdefault(repo_id, Repository(private))
        repository.commits.append({**repository.commits[-1], **files})

    def received(self, oid: str, n_bytes: int) -> None:
        """Counts bytes of a large file, and goes down when there were enough.

        Raises:
            Down: Then.
        """
        with self.lock:
            self.sent[oid] = self.sent.get(oid, 0) + n_bytes
            if self.down_after is not None:
                self.down_after -= n_bytes
                self.down = self.down or self.down_after <= 0
            if self.down:
                raise Down

    def revive(self) -> None:
        self.down, self.down_after = False, None

    def handle_error(self, request, client_address):
        pass  # a lost connection is no news

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.thread.join()
        self.server_close()
