"""Publishes a checkpoint on the Hugging Face Hub.

Errors of the Hub and its client become one sentence without the user's token.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError

from ..common.command import printable
from ..common.repositories import full_name, redacted_logs
from ..index.files import is_companion, read_index
from ..index.flash_head_config import FlashHeadConfig
from ..models.fetch import reason
from ..models.origin import begins_with, is_repository
from .card import (
    CARD_FILE,
    Provenance,
    card_metadata,
    find_provenance,
    read_metadata,
    text_below_marker,
    write_card,
)
from .licence import check_licence, licence_files, recognise, with_licence, write_notice

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
# Never part of a model, and often private. The client itself leaves out .git and .cache.
NOT_UPLOADED = [".*", "*/.*", "*.log", "__pycache__/*"]


def add_documents(folder: Path, base: Provenance, config: FlashHeadConfig, target: Path) -> None:
    """Writes a new checkpoint's card and puts the licence's files beside it.

    The licence's files of an older checkpoint stay, and so does the text below its card's marker.

    Args:
        folder: The new checkpoint.
        base: The model that it was made from.
        config: The settings of its FlashHead.
        target: The folder's final place, where an older checkpoint may be.
    """
    for file in [*licence_files(target), *base.files]:
        shutil.copy(file, folder)
    write_notice(base.licence, folder)
    write_card(
        folder,
        card_metadata(base, is_companion(folder)),
        config,
        title=config.recipe["name"],
        model=target.name,
        own_text=text_below_marker(target / CARD_FILE),
    )


def publish(
    folder: Path,
    repo: str | None = None,
    *,
    private: bool = False,
    license: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Uploads a checkpoint. Its folder stays.

    Args:
        folder: The checkpoint.
        repo: The repository, with or without its owner (default: the conversion's name under the
            user's own).
        private: Make the repository private if it is a new one.
        license: The licence, for a card that does not name it.
        say: Takes a line before the upload.

    Returns:
        The address of the repository.

    Raises:
        ValueError: If the folder may not be published, or the Hub rejects it.
    """
    config = read_index(folder).config
    card = folder / CARD_FILE
    metadata = with_licence(read_metadata(card), license)
    texts: list[Path] = []
    if not card.exists():
        # A FlashHead that was made at the first use of a model has no card.
        model = config.recipe.get("model")
        if not is_repository(model):
            model = None
        base = find_provenance(str(folder), folder, model, license)
        metadata = card_metadata(base, is_companion(folder))
        texts = [file for file in base.files if file.parent != folder]
    files = [*licence_files(folder), *texts]
    licence = recognise(metadata, files)
    user = sign_in()
    name = repo or config.recipe.get("name", folder.name)
    if licence is not None:
        metadata = {"license": licence.identifier} | metadata
        if repo is None and not begins_with(licence.prefix, name):
            name = f"{licence.prefix}-{name}"
    repo_id = full_name(name, user)
    check_licence(metadata, files, repo_id, model=str(folder), where=str(folder))
    address = reserve(repo_id, user, private)
    own_text = text_below_marker(card)
    if not own_text:
        with _client() as api, suppress(RemoteEntryNotFoundError):
            own_text = text_below_marker(Path(api.hf_hub_download(repo_id, CARD_FILE)))
    for file in texts:
        shutil.copy(file, folder)
    write_notice(licence, folder)
    write_card(
        folder,
        metadata,
        config,
        title=repo_id.rpartition("/")[2],
        model=repo_id,
        own_text=own_text,
    )
    say(f"Uploading {folder} to {repo_id}")
    failed = (
        f"{repo_id} could not be uploaded (%s): the model is kept in {folder}, and "
        f"`mlx_flashhead.upload --path {folder} --repo {repo_id}` continues without sending stored "
        "files again."
    )
    # mlx-lm reads every file of weights, so those that the folder lacks leave the repository.
    deleted: str | None = "model*.safetensors"
    if is_companion(folder):
        deleted = None
    with _client(failed, failed, failed) as api:
        # The client changes the list of patterns.
        api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            commit_message="Upload FlashHead",
            ignore_patterns=list(NOT_UPLOADED),
            delete_patterns=deleted,
        )
    return address


def sign_in() -> str:
    """Finds out whose token is used.

    Returns:
        The name of the user.

    Raises:
        ValueError: If there is no token, or the Hub does not accept it.
    """
    if get_token() is None:
        raise ValueError(f"An upload needs a Hugging Face token, but there is none: {LOGIN}.")
    another = f"get another one from https://huggingface.co/settings/tokens, then {LOGIN}"
    with _client(f"The Hugging Face Hub does not accept the token: {another}.") as api:
        return str(api.whoami()["name"])


def reserve(repo_id: str, user: str, private: bool = False) -> str:
    """Creates a repository, or checks that the user may write to it.

    Args:
        repo_id: "owner/name".
        user: The user.
        private: Make it private if it is a new one.

    Returns:
        Its address.

    Raises:
        ValueError: If the user may not write to it, or it is public and should be private.
    """
    denial = (
        f"{user} may not write to {repo_id}: choose another name, such as "
        f"{user}/{repo_id.rpartition('/')[2]}, or get a token that may."
    )
    failed = f"{repo_id} cannot be created on the Hugging Face Hub (%s): choose another name."
    with _client(denial, failed) as api:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        # create_repo accepts any visible repository.
        api.auth_check(repo_id, write=True)
        is_public = private and not api.repo_info(repo_id).private
    if is_public:
        raise ValueError(
            f"{repo_id} exists already and is public, in spite of `private=True`: choose another "
            "name, or make it private on its page."
        )
    return str(address)


@contextmanager
def _client(denial: str = "", failed: str = "", unreachable: str = "") -> Iterator[HfApi]:
    """The Hub's client, whose errors become one sentence.

    Args:
        denial: The sentence if the Hub denies the access.
        failed: The sentence if it rejects the request.
        unreachable: The sentence if it cannot be reached.

    Each sentence may have the reason, as %s.
    """
    try:
        with redacted_logs():
            yield HfApi()
    except Exception as error:
        # The Hub's client raises many unrelated types.
        remedy = "check the network and try again"
        if isinstance(error, OfflineModeIsEnabled):
            remedy = "unset HF_HUB_OFFLINE"
        sentence = unreachable or f"The Hugging Face Hub cannot be reached (%s): {remedy}."
        causes = [error]
        if isinstance(error.__cause__, Exception):
            causes.append(error.__cause__)
        for cause in causes:
            if isinstance(cause, HfHubHTTPError):
                is_denied = cause.response.status_code in (401, 403)
                if is_denied and denial:
                    sentence = denial
                elif not is_denied and failed:
                    sentence = failed
        reasons = dict.fromkeys(reason(cause) for cause in causes)
        # `from None`: the client's own message may hold the token.
        raise ValueError(sentence.replace("%s", printable(": ".join(reasons)))) from None
