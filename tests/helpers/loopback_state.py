"""What the Hub of the tests keeps: accounts, and repositories with their commits."""

import hashlib
from dataclasses import dataclass, field


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

    def find(self, revision: str) -> int | None:
        """The commit's number of a branch, tag or commit."""
        if revision == "main":
            return len(self.commits) - 1
        by_sha = {self.sha(i): i for i in range(len(self.commits))}
        return self.refs.get(revision, by_sha.get(revision))


class Down(Exception):
    """The connection is lost."""


def git_oid(content: bytes | tuple[str, int]) -> tuple[str, int]:
    """A file's id, as git or its extension for large files has it, and its size."""
    if not isinstance(content, bytes):
        return content
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content)
