"""Fetches models and small files from the Hugging Face Hub, and says what went wrong."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from huggingface_hub import constants, errors

from ..common.repositories import redact
from ..index.files import FILE_NAME

# An address of a model's page on the Hub, or of a file of it.
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)")
LOG_IN = "log in with `hf auth login`"
GO_ONLINE = "unset HF_HUB_OFFLINE"
HOME_VARIABLE = "MLX_FLASHHEAD_HOME"
# Folders in it: of finer heads, of MTP layers, of what was measured on this machine.
FINE_HEADS = "fine_heads"
DRAFTERS = "drafters"
SPEEDS = "speeds"


def home() -> Path:
    """Where FlashHeads and finer heads are cached; ValueError of a user who does not exist."""
    folder = Path(os.path.expanduser(os.environ.get(HOME_VARIABLE) or "~/.cache/mlx_flashhead"))
    if folder.parts[0].startswith("~"):
        raise ValueError(
            f"The home directory in {folder} is not known: set {HOME_VARIABLE} to a folder."
        )
    return folder


@contextmanager
def kept_in(folder: Path, what: str) -> Iterator[None]:
    """A block that keeps something in a folder of the cache, which is made.

    Args:
        folder: The folder.
        what: What is kept, as the subject of a sentence.

    Raises:
        ValueError: If the folder cannot be read or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    # MLX raises the latter where a disk is full.
    except (OSError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{what} cannot be kept in {folder} ({said}): free some space, or set "
            f"{HOME_VARIABLE} to another folder."
        ) from None


def resolve(path_or_repo: str, revision: str | None = None, files: list[str] | None = None) -> Path:
    """The local folder of a model, which is downloaded from the Hugging Face Hub if need be.

    Args:
        path_or_repo: A folder or a repository.
        revision: A branch, tag or commit of the repository.
        files: Patterns of the names of the files to download (default: a model's).

    Raises:
        ValueError: If there is neither such a folder nor such a repository.
    """
    if not path_or_repo:
        raise ValueError("The name of the model is empty: give a folder or a repository.")
    path = Path(os.path.expanduser(path_or_repo))
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{path_or_repo} is a folder, which has no revision {revision!r}: leave it out."
            )
        return path
    if path.exists():
        raise ValueError(f"{path_or_repo} is a file: name its folder instead.")
    address = _ADDRESS.match(path_or_repo)
    if address:
        raise ValueError(f"{path_or_repo} is an address: give OWNER/NAME, {address[1]}.")
    if len(path.parts) > 2 or path.is_absolute() or path_or_repo.startswith((".", "~")):
        raise ValueError(f"There is no folder {path_or_repo}: check the path of the model.")
    # It takes a second to import, which a folder does without.
    from .compat.mlx_lm import DEFAULT_ALLOW_PATTERNS, download

    with hub_errors(path_or_repo, revision):
        patterns = files or [*DEFAULT_ALLOW_PATTERNS, FILE_NAME]
        return download(path_or_repo, revision=revision, allow_patterns=patterns)


@contextmanager
def hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """A block in which errors of the Hub's client, not of the disk, become a ValueError."""
    try:
        yield
    # The client raises many unrelated types.
    except Exception as error:
        sentence = hub_sentence(error, name, revision)
        if sentence is None:
            raise
        # The error's own text may hold the token.
        raise ValueError(sentence) from None


def hub_sentence(error: Exception, name: str, revision: str | None = None) -> str | None:
    """What an error of the Hub's client means for a user who has named a model.

    Args:
        error: Of the client, or another one.
        name: The model, as the user has named it.
        revision: Its revision, if one is named.

    Returns:
        A sentence with a remedy, or None if it is the disk's error, or has a sentence of its own.
    """
    disk_error = isinstance(error, OSError) and error.errno is not None
    if disk_error or type(error) is ValueError:
        return None
    address = f"{constants.ENDPOINT}/{name}"
    missing = f"There is no folder {name!r} here, and"
    match error:
        case errors.GatedRepoError():
            return f"{name} is gated: ask for access on {address}, then {LOG_IN}."
        case errors.RepositoryNotFoundError():
            return (
                f"{missing} no such repository on the Hugging Face Hub: check the name, or "
                f"{LOG_IN} if it is private."
            )
        case errors.RevisionNotFoundError():
            return f"{name} has no revision {revision!r}: see its page."
        case errors.RemoteEntryNotFoundError():
            return f"{name} lacks a file of its weights: choose another."
        case errors.HFValidationError():
            return f"{missing} it cannot be a repository: give a folder or OWNER/NAME."
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            if constants.HF_HUB_OFFLINE:
                return f"{missing} it was not downloaded before: check the name, or {GO_ONLINE}."
            return (
                f"{missing} the Hugging Face Hub cannot be reached: check the network and the name."
            )
    return (
        f"{missing} the Hugging Face Hub does not give it ({reason(error)}): check the name and "
        "the network."
    )


def reason(error: BaseException) -> str:
    """The error's message as one short line without secrets."""
    said = shorten(redact(str(error)), 400, placeholder=" …").rstrip(".:")
    if not said:
        return type(error).__name__
    return said
