"""The origin of a model: its name, repository and commit, from its folder alone.

Reads no card and no licence, and uses no network.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_NAME = 96  # characters of a repository's name
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """A model that gets a FlashHead."""

    name: str
    repo_id: str | None = None  # "owner/name" on the Hub
    revision: str | None = None  # its commit

    @property
    def known_as(self) -> str:
        """The name by which others can find it: its repository, if that is known."""
        return self.repo_id or self.name

    def result_name(self, label: str | None = None, prefix: str = "") -> str:
        """The name of a conversion's result: ``<model>-FlashHead``, and a precision.

        Args:
            label: Of the precision, such as "4bit".
            prefix: The word with which a licence asks names to begin.
        """
        # the Hub allows these characters, but neither "--" nor ".."
        name = re.sub(r"[^\w.]+|\.{2,}", "-", self.name, flags=re.ASCII).strip("-.") or "model"
        name = name.removesuffix(f"-{label}").removesuffix("-FlashHead")
        if not begins_with(prefix, name):
            name = name.removeprefix("Meta-")
            name = name if begins_with(prefix, name) else f"{prefix}-{name}"
        ending = f"-FlashHead-{label}" if label else "-FlashHead"
        return name[: MAX_NAME - len(ending)].rstrip("-.") + ending


def begins_with(prefix: str, name: str) -> bool:
    """Whether a name begins with a licence's prefix; case and hyphens do not matter."""
    return _letters(name).startswith(_letters(prefix))


def _letters(text: str) -> str:
    """The letters and digits of a text, in small letters."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def local_origin(folder: Path) -> Origin:
    """The origin of the model in a folder, which may lie in the Hub's cache."""
    parts = folder.absolute().parts
    match parts[-3:]:
        case (holder, "snapshots", commit) if holder.startswith("models--"):
            cached = holder.removeprefix("models--").replace("--", "/", 1)
            return Origin(cached.rpartition("/")[2], cached, commit)
    named = None
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # not readable
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_name_or_path"]
    repo_id = named if is_repository(named) else None
    return Origin((repo_id or folder.resolve().name).rpartition("/")[2], repo_id)


def is_repository(name: object) -> bool:
    """Whether a name has the form "owner/name" of a repository."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None
