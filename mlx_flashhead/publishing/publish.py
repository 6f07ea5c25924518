"""Publishes a checkpoint on the Hugging Face Hub. Errors of the Hub and its client become one
sentence without the user's token."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from ..common.command import printable
from ..common.repositories import full_name, holds_secret, redact, redacted_logs
from ..index.files import is_companion, read_index
from ..index.settings import FlashHeadConfig
from ..models.origin import begins_with, is_repository
from . import card as cards

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
# Never part of a model, and often private. The client itself leaves out .git and .cache.
NOT_UPLOADED = [".*", "*/.*", "*.log", "__pycache__/*"]
MAX_TEXT_BYTES = 50_000_000  # of a file that is searched for the token


def add_documents(
    folder: Path, base: cards.Provenance, config: FlashHeadConfig, relation: str, target: Path
) -> None:
    """Writes a new checkpoint's card and puts the licence's files beside it. Those of an older one
    in ``target``, the folder's final place, stay, and so does the text below its card's marker."""
    for file in [*cards.licence_files(target), *base.files]:
        shutil.copy(file, folder)
    cards.write_notice(base.licence, folder)
    own = cards.text_below_marker(target / cards.CARD_FILE)
    metadata, title = cards.card_metadata(base, relation), config.recipe["name"]
    cards.write_card(folder, metadata, config, title, target.name, own)


def publish(
    folder: Path,
    repo: str | None = None,
    *,
    private: bool = False,
    license: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Uploads a checkpoint's folder, and returns the address of its repository, which by default
    has the conversion's name under the user's own. ``license`` is for a card that does not name it.
    ValueError if the folder may not be published, or the Hub rejects it. The folder stays."""
    config, card = read_index(folder).config, folder / cards.CARD_FILE
    metadata = cards.with_licence(cards.read_metadata(card), license)
    texts: list[Path] = []
    if not card.exists():  # made at the first use of a model, which reads no card
        model = config.recipe.get("model")
        named = model if is_repository(model) else None
        base = cards.find_provenance(str(folder), folder, named, license)
        metadata = cards.card_metadata(base, "adapter" if is_companion(folder) else "quantized")
        texts = [file for file in base.files if file.parent != folder]
    files = [*cards.licence_files(folder), *texts]
    licence = cards.recognise(metadata, files)
    user = sign_in()
    name = repo or config.recipe.get("name", folder.name)
    if licence is not None:
        metadata = {"license": licence.identifier} | metadata
        if repo is None and not begins_with(licence.prefix, name):
            name = f"{licence.prefix}-{name}"
    repo_id = full_name(name, user)
    cards.check_licence(metadata, files, repo_id, model=str(folder), place=str(folder))
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    for name in filter_repo_objects(names, ignore_patterns=[*NOT_UPLOADED, "*.safetensors"]):
        file = folder / name
        if file.stat().st_size <= MAX_TEXT_BYTES and holds_secret(file.read_bytes()):
            wrong = f"{file} holds a Hugging Face token, which would be published"
            raise ValueError(f"{wrong}: delete it there.")
    address = reserve(repo_id, user, private)
    own = cards.text_below_marker(card)
    if not own:
        with _client() as api, suppress(RemoteEntryNotFoundError):
            own = cards.text_below_marker(Path(api.hf_hub_download(repo_id, cards.CARD_FILE)))
    for file in texts:
        shutil.copy(file, folder)
    cards.write_notice(licence, folder)
    cards.write_card(folder, metadata, config, repo_id.rpartition("/")[2], repo_id, own)
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
            delete_patterns=None if is_companion(folder) else "model*.safetensors",
        )
    return address


def sign_in() -> str:
    """The name of the user whose token is used; ValueError if there is none, or it is not valid."""
    if get_token() is None:
        raise ValueError(f"An upload needs a Hugging Face token, but there is none: {LOGIN}.")
    another = f"get another one from https://huggingface.co/settings/tokens, then {LOGIN}"
    with _client(f"The Hugging Face Hub does not accept the token: {another}.") as api:
        return str(api.whoami()["name"])


def reserve(repo_id: str, user: str, private: bool = False) -> str:
    """Creates the repository, or checks that the user may write to it. Returns its address."""
    own = f"{user}/{repo_id.rpartition('/')[2]}"
    remedy = f"choose another name, such as {own}, or get a token that may"
    denial = f"{user} may not write to {repo_id}: {remedy}."
    failed = f"{repo_id} cannot be created on the Hugging Face Hub (%s): choose another name."
    with _client(denial, failed) as api:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.auth_check(repo_id, write=True)  # create_repo accepts any visible repository
        is_public = private and not api.repo_info(repo_id).private
    if is_public:
        wrong = f"{repo_id} exists already and is public, in spite of `private=True`"
        raise ValueError(f"{wrong}: choose another name, or make it private on its page.")
    return str(address)


@contextmanager
def _client(denial: str = "", failed: str = "", unreachable: str = "") -> Iterator[HfApi]:
    """The Hub's client. Its errors become one of these sentences, with the reason as %s."""
    try:
        with redacted_logs():
            yield HfApi()
    except Exception as error:  # the Hub's client raises many unrelated types
        offline = isinstance(error, OfflineModeIsEnabled)
        remedy = "unset HF_HUB_OFFLINE" if offline else "check the network and try again"
        sentence = unreachable or f"The Hugging Face Hub cannot be reached (%s): {remedy}."
        causes = [error, error.__cause__] if error.__cause__ else [error]
        for answer in (each for each in causes if isinstance(each, HfHubHTTPError)):
            denied = answer.response.status_code in (401, 403)
            sentence = (denial if denied else failed) or sentence
        texts = [" ".join(str(each).split()).rstrip(".:") or type(each).__name__ for each in causes]
        reason = printable(redact(": ".join(dict.fromkeys(texts))))
        # `from None`: the client's own message may hold the token
        raise ValueError(sentence.replace("%s", shorten(reason, 300, placeholder=" …"))) from None
