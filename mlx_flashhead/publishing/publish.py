"""Publishing a checkpoint: its name, its card, its licence, the upload."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from ..common.redaction import holds_secret
from ..common.repository_name import full_name
from ..head.formats import AFFINE
from ..head.matrix import Matrix
from ..index.files import read_index
from ..index.settings import FlashHeadConfig
from . import hub, licences
from .card import text_below_marker, write_card
from .origin import CARD_FILE, Origin, card_metadata, read_metadata, with_licence

DTYPE_LABELS = {mx.bfloat16: "bf16", mx.float16: "fp16", mx.float32: "fp32"}
MAX_NAME = 96
MAX_TEXT_BYTES = 50_000_000


def checkpoint_name(origin: Origin, label: str | None) -> str:
    """The name of a conversion's result: ``<model>-FlashHead-<precision>``.

    Args:
        origin: The converted model.
        label: Its precision, such as "4bit"; None for a FlashHead alone, whose name has none.
    """
    # the Hub allows these characters, but neither "--" nor ".."
    name = re.sub(r"[^\w.]+|\.{2,}", "-", origin.name, flags=re.ASCII).strip("-.") or "model"
    name = name.removesuffix(f"-{label}").removesuffix("-FlashHead")
    if origin.licence is not None and not licences.has_prefix(origin.licence, name):
        name = name.removeprefix("Meta-")
        if not licences.has_prefix(origin.licence, name):
            name = f"{origin.licence.prefix}-{name}"
    ending = f"-FlashHead-{label}" if label else "-FlashHead"
    return name[: MAX_NAME - len(ending)].rstrip("-.") + ending


def precision_label(rows: Matrix) -> str:
    """The precision of rows in the form of models' names: "4bit", "mxfp4", "bf16"."""
    if not rows.quantized:
        return DTYPE_LABELS[rows.weight.dtype]
    return f"{rows.bits}bit" if rows.mode == AFFINE else rows.mode


def add_documents(folder: Path, origin: Origin, config: FlashHeadConfig, target: Path) -> None:
    """Writes a new checkpoint's card and puts the licence's files beside it.

    Args:
        folder: The checkpoint's folder while it is written.
        origin: The converted model.
        config: The checkpoint's settings.
        target: The folder's final place. An older checkpoint there leaves its licence files, and
            the text below the marker of its card.
    """
    for file in [*licences.licence_files(target), *origin.files]:
        shutil.copy(file, folder)
    licences.write_notice(origin.licence, folder)
    write_card(
        folder,
        config.recipe["metadata"],
        config,
        origin.licence,
        title=config.recipe["name"],
        model=target.name,
        own_text=text_below_marker(_read(target / CARD_FILE)),
    )


def publish(
    folder: Path,
    repo: str | None = None,
    *,
    private: bool = False,
    license: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Uploads a checkpoint.

    Args:
        folder: The checkpoint's folder.
        repo: Its repository, with or without its owner; None: the conversion's name for it, under
            the user's own.
        private: Make a new repository private.
        license: The model's licence as the Hub calls it, for a card that does not name it.
        say: Called with a sentence at each step.

    Returns:
        The repository's address.

    Raises:
        ValueError: If the folder is not a checkpoint or may not be published, or if the Hub
            refuses. The folder is kept.
    """
    config = read_index(folder).config
    metadata = read_metadata(folder / CARD_FILE) or config.recipe.get("metadata", {})
    metadata = with_licence(metadata, license)
    files = licences.licence_files(folder)
    licence = licences.recognise(metadata, files)
    if licence is not None:
        metadata = {"license": licence.identifier} | metadata
    licences.check_known(metadata, str(folder))
    licences.check_text(licence, files, str(folder))
    user = hub.sign_in()
    name = repo or config.recipe.get("name")
    if name is None:
        raise ValueError(f"{folder} does not hold its own name: give OWNER/NAME as `repo`.")
    repo_id = full_name(name, user)
    licences.check_name(licence, repo_id)
    check_secrets(folder)
    address = hub.reserve(repo_id, user, private)
    own = text_below_marker(_read(folder / CARD_FILE)) or text_below_marker(hub.read_card(repo_id))
    licences.write_notice(licence, folder)
    title = repo_id.rpartition("/")[2]
    write_card(folder, metadata, config, licence, title=title, model=repo_id, own_text=own)
    say(f"Uploading {folder} to {repo_id}")
    hub.upload(folder, repo_id)
    return address


def check_licence(origin: Origin, repo_id: str | None, target: Path) -> None:
    """Checks, before a conversion, that its result may be published under a name.

    Args:
        origin: The model.
        repo_id: "owner/name", or None for a derived name.
        target: The checkpoint's folder.

    Raises:
        ValueError: If the licence is not known, if it does not allow the name, or if its text is
            missing.
    """
    licences.check_known(card_metadata(origin), origin.known_as)
    if repo_id is not None:
        licences.check_name(origin.licence, repo_id)
    files = [*origin.files, *licences.licence_files(target)]
    licences.check_text(origin.licence, files, str(target), "convert without `upload`, ")


def check_secrets(folder: Path) -> None:
    """Checks that no file of the upload holds the user's token.

    Raises:
        ValueError: If one does, naming it.
    """
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if hidden or not file.is_file() or file.suffix == ".safetensors":
            continue
        if file.stat().st_size <= MAX_TEXT_BYTES and holds_secret(file.read_bytes()):
            raise ValueError(
                f"{file} holds a Hugging Face token, which would be published: delete it there."
            )


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8-sig") if file.exists() else None
