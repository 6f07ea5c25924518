"""Publishing on the Hugging Face Hub: sign in, reserve a repository, check the licence, write the
card, upload. Errors of the Hub and its client become one sentence without the user's token."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError

from ..common.command import printable
from ..common.repositories import full_name, holds_secret, redact, redacted_logs
from ..index.files import is_companion, read_index
from ..index.settings import FlashHeadConfig
from ..models.origin import begins_with
from .card import (
    CARD_FILE,
    Provenance,
    card_metadata,
    card_of,
    check_licence,
    licence_files,
    published_provenance,
    read_metadata,
    recognise,
    text_below_marker,
    with_licence,
    write_card,
    write_notice,
)

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
# Never part of a model, and often private. The client itself leaves out .git and .cache.
NOT_UPLOADED = [".*", "*/.*", "*.log", "__pycache__/*"]
WEIGHTS = "model*.safetensors"
MAX_TEXT_BYTES = 50_000_000  # of a file that is searched for the token


def add_documents(
    folder: Path, base: Provenance, config: FlashHeadConfig, relation: str, target: Path
) -> None:
    """Writes a new checkpoint's card and puts the licence's files beside it. Those of an older one
    in ``target``, the folder's final place, stay, and so does the text below its card's marker."""
    for file in [*licence_files(target), *base.files]:
        shutil.copy(file, folder)
    write_notice(base.licence, folder)
    own, metadata = text_below_marker(card_of(target)), card_metadata(base, relation)
    write_card(folder, metadata, config, base.licence, config.recipe["name"], target.name, own)


def publish(
    folder: Path,
    repo: str | None = None,
    *,
    private: bool = False,
    license: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Uploads a checkpoint's folder, and returns the address of its repository.

    Without ``repo`` it has the conversion's name for it, under the user's own. ``license`` is for a
    card that does not name it.

    Raises:
        ValueError: If the folder may not be published, or the Hub rejects it. The folder stays.
    """
    config = read_index(folder).config
    metadata = with_licence(read_metadata(folder / CARD_FILE), license)
    texts: tuple[Path, ...] = ()
    if not (folder / CARD_FILE).exists():  # made at the first use of a model, which reads no card
        base = published_provenance(config.recipe.get("model"), license)
        relation = "adapter" if is_companion(folder) else "quantized"
        metadata, texts = card_metadata(base, relation), base.files
    files = [*licence_files(folder), *texts]
    licence = recognise(metadata, files)
    user = sign_in()
    name = repo or config.recipe.get("name")
    if name is None:
        raise ValueError(f"{folder} does not hold its own name: give OWNER/NAME as `repo`.")
    if licence is not None:
        metadata = {"license": licence.identifier} | metadata
        if repo is None and not begins_with(licence.prefix, name):
            name = f"{licence.prefix}-{name}"
    repo_id = full_name(name, user)
    check_licence(metadata, files, repo_id, model=str(folder), place=str(folder))
    _check_secrets(folder)
    address = reserve(repo_id, user, private)
    own = text_below_marker(card_of(folder))
    if not own:
        with _client() as api, suppress(RemoteEntryNotFoundError):
            published = Path(api.hf_hub_download(repo_id, CARD_FILE)).read_text("utf-8-sig")
            own = text_below_marker(published)
    for file in texts:
        shutil.copy(file, folder)
    write_notice(licence, folder)
    write_card(folder, metadata, config, licence, repo_id.rpartition("/")[2], repo_id, own)
    say(f"Uploading {folder} to {repo_id}")
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
            ignore_patterns=[*NOT_UPLOADED],  # which the client changes
            # of the repository: mlx-lm reads every file of weights
            delete_patterns=None if is_companion(folder) else WEIGHTS,
        )
    return address


def sign_in() -> str:
    """The name of the user whose token is used, or a ValueError if it may not write."""
    if get_token() is None:
        raise ValueError(f"An upload needs a Hugging Face token, but there is none: {LOGIN}.")
    refused = "The Hugging Face Hub does not accept the token: get another one from"
    with _client(f"{refused} {TOKENS_PAGE}, then {LOGIN}.") as api:
        account = api.whoami()
        name = str(account["name"])
        role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ValueError(
            f"The Hugging Face token may only read: make one that may write at {TOKENS_PAGE}, then "
            f"{LOGIN}."
        )
    return name


def reserve(repo_id: str, user: str, private: bool = False) -> str:
    """Creates the repository, or checks that the user may write to it. Returns its address."""
    refused = (
        f"{user} may not write to {repo_id}: choose another name, such as "
        f"{user}/{repo_id.rpartition('/')[2]}, or get a token that may."
    )
    failed = f"{repo_id} cannot be created on the Hugging Face Hub (%s): choose another name."
    with _client(refused, failed) as api:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.auth_check(repo_id, write=True)  # create_repo accepts any visible repository
        is_public = private and not api.repo_info(repo_id).private
    if is_public:
        raise ValueError(
            f"{repo_id} exists already and is public, in spite of `private=True`: choose another "
            "name, or make it private on its page."
        )
    return str(address)


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
        causes = [error, error.__cause__] if error.__cause__ else [error]
        answers = [each for each in causes if isinstance(each, HfHubHTTPError)]
        if answers:
            denied = answers[0].response.status_code in (401, 403)
            sentence = (refused if denied else failed) or sentence
        texts = [" ".join(str(each).split()).rstrip(".:") or type(each).__name__ for each in causes]
        reason = printable(redact(": ".join(dict.fromkeys(texts))))
        # `from None`: the client's own message may hold the token
        raise ValueError(sentence.replace("%s", shorten(reason, 300, placeholder=" …"))) from None


def _check_secrets(folder: Path) -> None:
    """Refuses an upload with a file that holds the user's token."""
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file() or file.suffix == ".safetensors":
            continue
        if file.stat().st_size <= MAX_TEXT_BYTES and holds_secret(file.read_bytes()):
            raise ValueError(
                f"{file} holds a Hugging Face token, which would be published: delete it there."
            )
