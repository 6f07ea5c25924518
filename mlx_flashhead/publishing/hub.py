"""Talks to the Hugging Face Hub: who writes, where to, and the upload itself.

Whatever the Hub or its client says is turned into one sentence, without the user's token.
"""

import fnmatch
from pathlib import Path
from textwrap import shorten

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from ..index.redaction import redact, redacted_logs

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
# Never part of a model, and often private. The client itself leaves out .git and .cache.
NOT_UPLOADED = [".*", "*/.*", "*.log", "__pycache__/*"]
WEIGHTS = "model*.safetensors"


def sign_in() -> str:
    """The name of the user whose token is used.

    Raises:
        ValueError: If there is no token, it is not valid or may not write, or the Hub cannot be
            reached.
    """
    try:
        account = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ValueError(
            f"An upload needs a Hugging Face token, but there is none: {LOGIN}."
        ) from None
    except Exception as error:  # the Hub's client raises many unrelated types
        if _status(error) in (401, 403):
            raise ValueError(
                f"The Hugging Face Hub does not accept the token: get another one from "
                f"{TOKENS_PAGE}, then {LOGIN}."
            ) from None
        raise ValueError(_unreachable(error)) from None
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ValueError(
            f"The Hugging Face token may only read: make one that may write at {TOKENS_PAGE}, then "
            f"{LOGIN}."
        )
    return account["name"]


def full_name(name: str, user: str) -> str:
    """ "owner/name" of a repository that may be named without its owner.

    Raises:
        ValueError: If the Hub has no such names.
    """
    repo_id = name if "/" in name else f"{user}/{name}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{name!r} is no name of a repository: give OWNER/NAME of letters, digits, '-', '_' "
            "and '.', at most 96 of them."
        ) from None
    return repo_id


def reserve(repo_id: str, user: str, private: bool = False) -> str:
    """Creates the repository, or makes sure that one which is there can be written to.

    Args:
        repo_id: "owner/name".
        user: Who writes.
        private: Make it a private one.

    Returns:
        Its address.

    Raises:
        ValueError: If it cannot be written to, or is public though ``private`` is wanted.
    """
    api = HfApi()
    try:
        with redacted_logs():
            address = api.create_repo(repo_id, private=private or None, exist_ok=True)
            _check_writable(api, repo_id)
            is_public = private and not api.repo_info(repo_id).private
    except Exception as error:  # the Hub's client raises many unrelated types
        if _status(error) in (401, 403):
            raise ValueError(
                f"{user} may not write to {repo_id}: choose another name, such as "
                f"{user}/{repo_id.rpartition('/')[2]}, or get a token that may."
            ) from None
        if isinstance(error, HfHubHTTPError):
            raise ValueError(
                f"{repo_id} cannot be created on the Hugging Face Hub ({_reason(error)}): choose "
                "another name."
            ) from None
        raise ValueError(_unreachable(error)) from None
    if is_public:
        raise ValueError(
            f"{repo_id} is there already and is public, so --private cannot hold: choose another "
            "name, or make it private on its page."
        )
    return str(address)


def read_card(repo_id: str) -> str | None:
    """The text of a repository's card, None where there is none.

    Raises:
        ValueError: If the Hub cannot be asked.
    """
    try:
        with redacted_logs():
            path = HfApi().hf_hub_download(repo_id, "README.md")
        return Path(path).read_text(encoding="utf-8-sig")
    except Exception as error:  # the Hub's client raises many unrelated types
        if _status(error) == 404:
            return None
        raise ValueError(_unreachable(error)) from None


def upload(folder: Path, repo_id: str) -> None:
    """Uploads a folder, in which the Hub's client skips what is stored already.

    Weights in the repository that are not in the folder are deleted: mlx-lm reads every file of
    weights that it finds.

    Raises:
        ValueError: If it does not succeed; the folder stays as it is.
    """
    api = HfApi()
    try:
        with redacted_logs():
            api.upload_folder(
                folder_path=folder,
                repo_id=repo_id,
                commit_message="Upload FlashHead checkpoint",
                ignore_patterns=list(NOT_UPLOADED),
                delete_patterns=_other_weights(api, repo_id, folder),
            )
    except Exception as error:  # the Hub's client raises many unrelated types
        # `from None`: the client's own message could hold the token that this one leaves out
        raise ValueError(
            f"{repo_id} could not be uploaded ({_reason(error)}): the model is kept in {folder}, "
            f"and `mlx_flashhead.upload --path {folder} --repo {repo_id}` continues without "
            "sending stored files again."
        ) from None


def _other_weights(api: HfApi, repo_id: str, folder: Path) -> list[str] | None:
    """Files of weights in the repository that are not in the folder."""
    try:
        stored = fnmatch.filter(api.list_repo_files(repo_id), WEIGHTS)
    except HfHubHTTPError as error:
        if _status(error) != 404:
            raise
        return None  # nothing was ever committed
    return [name for name in stored if not (folder / name).exists()] or None


def _check_writable(api: HfApi, repo_id: str) -> None:
    """`create_repo` is content with any repository that can be seen."""
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise
        # a Hub that cannot answer this says no when it is written to


def _status(error: BaseException | None) -> int | None:
    """The status of the Hub's answer that an error goes back to, if it goes back to one."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return None if error is None else error.response.status_code


def _unreachable(error: Exception) -> str:
    remedy = (
        "unset HF_HUB_OFFLINE"
        if isinstance(error, OfflineModeIsEnabled)
        else "check the network and try again"
    )
    return f"The Hugging Face Hub cannot be reached ({_reason(error)}): {remedy}."


def _reason(error: Exception) -> str:
    """What the error and what led to it say, on one line and without secrets."""
    said = []
    while error is not None and len(said) < 2:
        said.append(" ".join(str(error).split()).rstrip(".:") or type(error).__name__)
        error = error.__cause__
    return shorten(redact(": ".join(dict.fromkeys(said))), 300, placeholder=" …")
