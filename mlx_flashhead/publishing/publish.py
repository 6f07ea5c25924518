"""Publishing a checkpoint: its name, its card, its licence, the upload."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ..common.repositories import full_name, holds_secret
from ..index.files import read_index
from ..index.settings import FlashHeadConfig
from . import hub, licences
from .card import text_below_marker, write_card
from .origin import CARD_FILE, Origin, read_metadata, with_licence

MAX_NAME = 96
MAX_TEXT_BYTES = 50_000_000


def checkpoint_name(origin: Origin, label: str | None) -> str:
    """The name of a conversion's result: ``<model>-FlashHead``, with the label of a precision."""
    # the Hub allows these characters, but neither "--" nor ".."
    name = re.sub(r"[^\w.]+|\.{2,}", "-", origin.name, flags=re.ASCII).strip("-.") or "model"
    name = name.removesuffix(f"-{label}").removesuffix("-FlashHead")
    if origin.licence is not None and not licences.has_prefix(origin.licence, name):
        name = name.removeprefix("Meta-")
        if not licences.has_prefix(origin.licence, name):
            name = f"{origin.licence.prefix}-{name}"
    ending = f"-FlashHead-{label}" if label else "-FlashHead"
    return name[: MAX_NAME - len(ending)].rstrip("-.") + ending


def add_documents(folder: Path, origin: Origin, config: FlashHeadConfig, target: Path) -> None:
    """Writes a new checkpoint's card and puts the licence's files beside it. Those of an older one
    in ``target``, the folder's final place, stay, and so does the text below its card's marker."""
    for file in [*licences.licence_files(target), *origin.files]:
        shutil.copy(file, folder)
    licences.write_notice(origin.licence, folder)
    recipe, own = config.recipe, text_below_marker(_card(target))
    write_card(folder, recipe["metadata"], config, origin.licence, recipe["name"], target.name, own)


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
        ValueError: If the folder may not be published, or the Hub refuses. The folder is kept.
    """
    config = read_index(folder).config
    metadata = read_metadata(folder / CARD_FILE) or config.recipe.get("metadata", {})
    metadata = with_licence(metadata, license)
    files = licences.licence_files(folder)
    licence = licences.recognise(metadata, files)
    if licence is not None:
        metadata = {"license": licence.identifier} | metadata
    user = hub.sign_in()
    name = repo or config.recipe.get("name")
    if name is None:
        raise ValueError(f"{folder} does not hold its own name: give OWNER/NAME as `repo`.")
    repo_id = full_name(name, user)
    licences.check(metadata, files, repo_id, model=str(folder), place=folder)
    _check_secrets(folder)
    address = hub.reserve(repo_id, user, private)
    own = text_below_marker(_card(folder)) or text_below_marker(hub.read_card(repo_id))
    licences.write_notice(licence, folder)
    write_card(folder, metadata, config, licence, repo_id.rpartition("/")[2], repo_id, own)
    say(f"Uploading {folder} to {repo_id}")
    hub.upload(folder, repo_id)
    return address


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


def _card(folder: Path) -> str:
    card = folder / CARD_FILE
    return card.read_text(encoding="utf-8-sig") if card.exists() else ""
