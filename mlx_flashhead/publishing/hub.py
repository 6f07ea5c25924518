"""The Hugging Face Hub: sign in, reserve a repository, upload.

Errors of the Hub and its client become one sentence without the user's token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..common.command import printable
from ..common.repositories import redact, redacted_logs
from ..index.files import is_companion

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
# Never part of a model, and often private. The client itself leaves out .git and .cache.
NOT_UPLOADED = [".*", "*/.*", "*.log", "__pycache__/*"]
WEIGHTS = "model*.safetensors"


def sign_in() -> str:
    """The name of the user whose token is used, or a ValueError if it may not write."""
    if get_token() is None:
        raise ValueError(f"An upload needs a Hugging Face token, but there is none: {LOGIN}.")
    with _client(
        f"The Hugging Face Hub does not accept the token: get another one from {TOKENS_PAGE}, "
        f"then {LOGIN}."
    ) as api:
        account = api.whoami()
    try:
        name = str(account["name"])
        role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            "The Hugging Face Hub did not say whose token this is: check HF_ENDPOINT."
        ) from None
    if role == "read":
        raise ValueError(
            f"The Hugging Face token may only read: make one that may write at {TOKENS_PAGE}, then "
            f"{LOGIN}."
        )
    return name


def reserve(repo_id: str, user: str, private: bool = False) -> str:
    """Creates the repository, or checks that the user may write to it. Returns its address."""
    with _client(
        f"{user} may not write to {repo_id}: choose another name, such as "
        f"{user}/{repo_id.rpartition('/')[2]}, or get a token that may.",
        f"{repo_id} cannot be created on the Hugging Face Hub (%s): choose another name.",
    ) as api:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        try:  # create_repo accepts any visible repository
            api.auth_check(repo_id, write=True)
        except HfHubHTTPError as error:
            if _status(error) in (401, 403):
                raise
            # a Hub without this request refuses at the upload
        is_public = private and not api.repo_info(repo_id).private
    if is_public:
        raise ValueError(
            f"{repo_id} exists already and is public, in spite of `private=True`: choose another "
            "name, or make it private on its page."
        )
    return str(address)


def read_card(repo_id: str) -> str:
    """The text of a repository's card, empty if there is none."""
    with _client() as api:
        try:
            path = api.hf_hub_download(repo_id, "README.md")
        except Exception as error:
            if _status(error) != 404:
                raise
            return ""
    return Path(path).read_text(encoding="utf-8-sig")


def upload(folder: Path, repo_id: str) -> None:
    """Uploads a folder. The Hub's client skips files that are stored already.

    With a model, weights of the repository that are not in the folder are deleted, since mlx-lm
    reads every file of weights.
    """
    failed = (
        f"{repo_id} could not be uploaded (%s): the model is kept in {folder}, and "
        f"`mlx_flashhead.upload --path {folder} --repo {repo_id}` continues without sending stored "
        "files again."
    )
    with _client(failed, failed, failed) as api:
        api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            commit_message="Upload FlashHead",
            ignore_patterns=list(NOT_UPLOADED),  # which the client changes
            delete_patterns=None if is_companion(folder) else WEIGHTS,
        )


@contextmanager
def _client(refused: str = "", failed: str = "", unreachable: str = "") -> Iterator[HfApi]:
    """The Hub's client. Its errors become one of these sentences, with the reason as %s."""
    try:
        with redacted_logs():
            yield HfApi()
    except Exception as error:  # the Hub's client raises many unrelated types
        offline = isinstance(error, OfflineModeIsEnabled)
        remedy = "unset HF_HUB_OFFLINE" if offline else "check the network and try again"
        sentence = unreachable or f"The Hugging Face Hub cannot be reached (%s): {remedy}."
        status = _status(error)
        if status is not None:
            sentence = (refused if status in (401, 403) else failed) or sentence
        causes = (error, error.__cause__) if error.__cause__ else (error,)
        said = [" ".join(str(each).split()).rstrip(".:") or type(each).__name__ for each in causes]
        reason = printable(redact(": ".join(dict.fromkeys(said))))
        # `from None`: the client's own message may hold the token
        raise ValueError(sentence.replace("%s", shorten(reason, 300, placeholder=" …"))) from None


def _status(error: BaseException | None) -> int | None:
    """The status of the Hub's answer that caused an error, or None."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return None if error is None else error.response.status_code
