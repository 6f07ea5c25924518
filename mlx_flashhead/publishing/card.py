"""Model cards, from the template card.md, and what a model's card says of its origin."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, snapshot_download

from ..common.repositories import redacted_logs
from ..common.tables import percent
from ..index.files import FILE_NAME, is_companion
from ..index.flash_head_config import AGAIN, FlashHeadConfig
from ..models.origin import Origin, is_repository, local_origin
from .licence import (
    LICENCE_FILES,
    Licence,
    as_list,
    changes_in,
    licence_files,
    recognise,
    with_licence,
)

CARD_FILE = "README.md"
MARKER = "<!-- mlx_flashhead: your own text goes below this line and is kept -->"
# The entry of a card's header that says how a model was made from its base.
RELATION = "base_model_relation"
# Entries of a base model's card that hold for a derived model too.
KEPT_METADATA = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Provenance:
    """A base model with its card's header and its licence.

    Attributes:
        origin: Where the model is from.
        metadata: The header of its card.
        files: The files of its licence.
    """

    origin: Origin
    metadata: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def licence(self) -> Licence | None:
        """Its licence, if it has conditions."""
        return recognise(self.metadata, self.files)


def find_provenance(
    path_or_repo: str, folder: Path, base_model: str | None = None, license: str | None = None
) -> Provenance:
    """Reads what a model's folder and its card on the Hub say of it.

    Args:
        path_or_repo: The model, as the user names it.
        folder: Its folder.
        base_model: Its repository, as the user names it.
        license: Its licence, for a card that names none.

    Returns:
        The model with its card's header and its licence.

    Raises:
        ValueError: If the card names another licence.
    """
    origin = local_origin(folder)
    in_cache = origin.revision is not None
    documents = folder
    if in_cache and not Path(path_or_repo).expanduser().is_dir():
        # mlx-lm does not download these files.
        documents = _fetched_documents(origin.repo_id or "", origin.revision) or folder
    elif base_model is not None and not (folder / CARD_FILE).exists():
        documents = _fetched_documents(base_model) or folder
    metadata = read_metadata(documents / CARD_FILE)
    repo_id = base_model
    bases = _base_models(metadata)
    is_conversion = not in_cache and metadata.get("library_name") == "mlx"
    if repo_id is None and is_conversion and len(bases) == 1:
        repo_id = bases[0]
    if repo_id not in (None, origin.repo_id):
        origin = Origin(repo_id.rpartition("/")[2], repo_id)
    files = {file.name: file for file in [*licence_files(documents), *licence_files(folder)]}
    return Provenance(origin, with_licence(metadata, license), tuple(files.values()))


def _base_models(metadata: dict[str, Any]) -> list[str]:
    """The repositories that a card's header names as those of its model's base."""
    return [name for name in as_list(metadata.get("base_model")) if is_repository(name)]


def _fetched_documents(repo_id: str, revision: str | None = None) -> Path | None:
    """A folder with a repository's card and its licence; None if they cannot be downloaded."""
    # The Hub's client raises many unrelated types.
    with suppress(Exception), redacted_logs():
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=[CARD_FILE, *LICENCE_FILES]
            )
        )
    return None


def card_metadata(base: Provenance, alone: bool = False) -> dict[str, Any]:
    """The header of a derived model's card.

    Args:
        base: The model that it was made from.
        alone: It is a FlashHead without the model.
    """
    metadata: dict[str, Any] = {}
    if base.licence is not None:
        metadata["license"] = base.licence.identifier
    metadata |= {key: base.metadata[key] for key in KEPT_METADATA if base.metadata.get(key)}
    metadata |= {"library_name": "mlx", "pipeline_tag": "text-generation"}
    if base.origin.repo_id:
        metadata["base_model"] = base.origin.repo_id
        metadata[RELATION] = "quantized"
    else:
        # A folder of unknown origin may still name its own base model.
        bases = _base_models(base.metadata)
        metadata["base_model"] = bases
        if len(bases) == 1:
            metadata["base_model"] = bases[0]
        metadata[RELATION] = base.metadata.get(RELATION)
    if alone:
        metadata[RELATION] = "adapter"
    tags = [tag for tag in as_list(base.metadata.get("tags")) if isinstance(tag, str)]
    metadata["tags"] = list(dict.fromkeys([*tags, "mlx", "flashhead"]))
    return {key: value for key, value in metadata.items() if value}


def read_metadata(card: Path) -> dict[str, Any]:
    """The header of a card; empty if there is no readable one."""
    # A bad card must not stop a conversion.
    with suppress(Exception):
        text = card.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("---"):
            return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return {}


def write_card(
    folder: Path,
    metadata: dict[str, Any],
    config: FlashHeadConfig,
    *,
    title: str,
    model: str,
    own_text: str = "",
) -> None:
    """Writes README.md into the folder of a model with a FlashHead, or of a FlashHead alone.

    Args:
        folder: The folder.
        metadata: The card's header.
        config: The FlashHead's settings.
        title: The card's title.
        model: A repository or a folder, which the card's examples name.
        own_text: A person's text, which follows the marker.

    Raises:
        ValueError: If the settings hold figures that a card cannot show.
    """
    base = metadata.get("base_model")
    if not isinstance(base, str) or metadata.get(RELATION) not in ("quantized", "adapter"):
        base = None
    link = str(metadata.get("license_link"))
    if not link.startswith("http"):
        # The copy beside the card.
        link = next((file.name for file in licence_files(folder)), "")
    index_size = None
    if is_companion(folder):
        index_size = (folder / FILE_NAME).stat().st_size
    try:
        card = ModelCard.from_template(
            ModelCardData(**metadata, ignore_metadata_errors=True),
            template_path=str(Path(__file__).with_name("card.md")),
            title=title,
            model=model,
            base=base,
            index_size=index_size,
            config=config,
            report=config.report,
            licence=recognise(metadata, ()),
            licence_name=metadata.get("license_name") or metadata.get("license"),
            licence_link=link,
            changes=changes_in(folder),
            percent=percent,
        )
    except Exception as error:
        # Foreign settings may make anything of the template.
        raise ValueError(
            f"The settings in {folder} hold figures that a card cannot show ({error}): {AGAIN}."
        ) from error
    (folder / CARD_FILE).write_text(
        f"{card.content.rstrip()}\n\n{MARKER}\n{own_text}", encoding="utf-8"
    )


def text_below_marker(card: Path) -> str:
    """A person's text on a card: all below the marker, or all of a card without it."""
    if not card.exists():
        return ""
    text = card.read_text(encoding="utf-8-sig")
    _, marker, below = text.partition(f"{MARKER}\n")
    if marker or not text:
        return below
    return ModelCard(text, ignore_metadata_errors=True).text.strip("\n") + "\n"
