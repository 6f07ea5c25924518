"""Fetches models: the folder of a path, or of a repository on the Hugging Face Hub."""

import os
from contextlib import suppress
from pathlib import Path
from textwrap import shorten

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..common.repositories import redact
from ..index.files import FILE_NAME
from .compat.mlx_lm import DEFAULT_ALLOW_PATTERNS, download

HOME_VARIABLE = "MLX_FLASHHEAD_HOME"


def home() -> Path:
    """Where FlashHeads and finer heads are kept: $MLX_FLASHHEAD_HOME, or ~/.cache/mlx_flashhead.

    Raises:
        ValueError: If it is that of a user who does not exist.
    """
    folder = os.environ.get(HOME_VARIABLE) or "~/.cache/mlx_flashhead"
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"The home directory in {folder} is not known: set {HOME_VARIABLE} to a folder."
        ) from error


def resolve(path_or_repo: str, revision: str | None = None, files: list[str] | None = None) -> Path:
    """The local folder of a model: itself, or its download from the Hugging Face Hub; ValueError if
    neither exists. ``files`` are patterns of what to download; default: the whole checkpoint."""
    if not str(path_or_repo):
        raise ValueError("The name of the model is empty: give a folder or a repository.")
    path = Path(path_or_repo)
    with suppress(RuntimeError):  # of a user who does not exist
        path = path.expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{path_or_repo} is a folder, which has no revision {revision!r}: leave it out."
            )
        return path
    if path.exists():
        raise ValueError(f"{path_or_repo} is a file: name its folder instead.")
    if len(path.parts) > 2 or path.is_absolute() or str(path_or_repo).startswith((".", "~")):
        raise ValueError(f"There is no folder {path_or_repo}: check the path of the model.")
    try:
        return download(
            str(path_or_repo),
            revision=revision,
            allow_patterns=files or [*DEFAULT_ALLOW_PATTERNS, FILE_NAME],
        )
    except Exception as error:  # the Hub's client raises many unrelated types
        # the error's own text may hold the token
        raise ValueError(hub_sentence(str(path_or_repo), revision, error)) from None


def hub_sentence(name: str, revision: str | None, error: Exception) -> str:
    """What a user can do about an error of the Hub's client, without secrets."""
    missing, constants = f"There is no folder {name!r} here, and", huggingface_hub.constants
    page = f"{constants.ENDPOINT}/{name}"
    unreached = "the Hugging Face Hub cannot be reached: check the network and the name."
    if constants.HF_HUB_OFFLINE:
        unreached = "it was not downloaded before: check the name, or unset HF_HUB_OFFLINE."
    sentences = {
        GatedRepoError: f"{name} is gated: ask for access on {page}, then log in with "
        "`hf auth login`.",
        RepositoryNotFoundError: f"{missing} no such repository on the Hugging Face Hub: check the "
        "name, or log in with `hf auth login` if it is private.",
        RevisionNotFoundError: f"The repository {name} has no revision {revision!r}: its page "
        "lists them.",
        RemoteEntryNotFoundError: f"{name} lacks a file of its weights: choose another source.",
        OfflineModeIsEnabled: f"{missing} {unreached}",
        HFValidationError: f"{missing} it cannot be a repository: give a folder or OWNER/NAME.",
        LocalEntryNotFoundError: f"{missing} {unreached}",
        Exception: f"{missing} the Hugging Face Hub does not give it ({reason(error)}): check the "
        "name and the network.",
    }
    return next(said for kind, said in sentences.items() if isinstance(error, kind))


def reason(error: Exception) -> str:
    """The error's message as one short line without secrets."""
    return shorten(redact(str(error)), 400, placeholder=" …").rstrip(".:") or type(error).__name__
