"""The origin of a model: its name, repository and commit, from its folder alone.

Reads no card and no licence, and uses no network.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Characters of a repository's name.
MAX_NAME = 96
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """A model that gets a FlashHead.

    Attributes:
        name: Its name.
        repo_id: "owner/name" on the Hub, if it is known.
        revision: Its commit, if it is known.
    """

    name: str
    repo_id: str | None = None
    revision: str | None = None

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
        # The Hub allows these characters, but neither "--" nor "..".
        name = re.sub(r"[^\w.]+|\.{2,}", "-", self.name, flags=re.ASCII).strip("-.")
        if not name:
            name = "model"
        name = name.removesuffix(f"-{label}").removesuffix("-FlashHead")
        if not begins_with(prefix, name):
            name = name.removeprefix("Meta-")
        if not begins_with(prefix, name):
            name = f"{prefix}-{name}"
        ending = "-FlashHead"
        if label:
            ending = f"-FlashHead-{label}"
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
    # A configuration may not be readable.
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        repo_id = config["_name_or_path"]
        if is_repository(repo_id):
            return Origin(repo_id.rpartition("/")[2], repo_id)
    return Origin(folder.resolve().name)


def is_repository(name: object) -> bool:
    """Whether a name has the form "owner/name" of a repository."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None
