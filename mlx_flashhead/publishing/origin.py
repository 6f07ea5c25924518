"""The origin of a model: its repository, its commit, its card and its licence."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, snapshot_download

from ..common.repositories import redacted_logs
from . import licences
from .licences import LICENCE_FILES, Licence, as_list

CARD_FILE = "README.md"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# Entries of a base model's card that hold for a derived model too.
KEPT_METADATA = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Origin:
    """A model that is converted."""

    name: str
    repo_id: str | None = None  # "owner/name" on the Hub
    revision: str | None = None  # its commit
    metadata: dict = field(default_factory=dict)  # its card's header
    licence: Licence | None = None  # one with conditions
    files: tuple[Path, ...] = ()  # of its licence

    @property
    def known_as(self) -> str:
        """The name by which others can find it: its repository, if that is known."""
        return self.repo_id or self.name


def find_origin(
    hf_path: str, folder: Path, base_model: str | None = None, license: str | None = None
) -> Origin:
    """The origin of a model, from its folder and its card on the Hub.

    The user may name its repository, and its licence if the card names none.
    """
    repo_id = revision = None
    *_, holder, snapshots, commit = ("", "", *folder.absolute().parts)
    if snapshots == "snapshots" and holder.startswith("models--"):  # in the Hub's cache
        repo_id, revision = holder.removeprefix("models--").replace("--", "/", 1), commit
    documents = folder
    if repo_id is not None and not Path(hf_path).expanduser().is_dir():
        # mlx-lm does not download these files
        documents = _fetched_documents(repo_id, revision) or folder
    elif base_model is not None and not (folder / CARD_FILE).exists():
        documents = _fetched_documents(base_model, None) or folder
    metadata = with_licence(read_metadata(documents / CARD_FILE), license)
    repo_id = base_model or repo_id or _repository_in(folder, metadata)
    name = (repo_id or folder.resolve().name).rpartition("/")[2]
    by_name = {file.name: file for f in (documents, folder) for file in licences.licence_files(f)}
    files = tuple(by_name.values())
    licence = licences.recognise(metadata, files)
    return Origin(name, repo_id, revision, metadata, licence, files)


def local_origin(folder: Path) -> Origin:
    """The origin of a model from its folder alone, without the network."""
    return find_origin(str(folder), folder)


def card_metadata(origin: Origin, relation: str = "quantized") -> dict:
    """The header of a derived model's card: "quantized", or an "adapter" for a FlashHead alone."""
    metadata = {key: origin.metadata[key] for key in KEPT_METADATA if origin.metadata.get(key)}
    if origin.licence is not None and "license" not in metadata:
        metadata["license"] = origin.licence.identifier
    metadata["library_name"] = "mlx"
    metadata["pipeline_tag"] = "text-generation"
    if origin.repo_id is not None:
        metadata |= {"base_model": origin.repo_id, "base_model_relation": relation}
    elif base := _texts(origin.metadata, "base_model"):
        # a folder of unknown origin may still name its own base model
        metadata["base_model"] = base if len(base) > 1 else base[0]
        if named := origin.metadata.get("base_model_relation"):
            metadata["base_model_relation"] = named
    if relation == "adapter":
        metadata["base_model_relation"] = relation
    tags = [*_texts(origin.metadata, "tags"), "mlx", "flashhead"]
    metadata["tags"] = list(dict.fromkeys(tags))
    return metadata


def with_licence(metadata: dict, license: str | None) -> dict:
    """The header of a card with the licence that the user names, if the card names no other."""
    declared = metadata.get("license")
    if license is None or license == declared:
        return metadata
    if declared:
        raise ValueError(
            f"`license` {license} contradicts the model's card, which says {declared}: leave it "
            "out."
        )
    return metadata | {"license": license}


def read_metadata(card: Path) -> dict:
    """The header of a card; empty if there is no readable one."""
    try:
        text = card.read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("---"):
            return {}
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a bad card must not stop a conversion
        return {}


def _fetched_documents(repo_id: str, revision: str | None) -> Path | None:
    """A folder with a repository's card and its licence; None if they cannot be downloaded."""
    with suppress(Exception), redacted_logs():  # the Hub's client raises many unrelated types
        patterns = [CARD_FILE, *LICENCE_FILES]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    return None


def _repository_in(folder: Path, metadata: dict) -> str | None:
    """The repository that a local folder names as its own, or as the source of its conversion."""
    base = as_list(metadata.get("base_model"))
    is_conversion = metadata.get("library_name") == "mlx" or (
        metadata.get("base_model_relation") == "quantized"
    )
    named = base[0] if is_conversion and len(base) == 1 else None
    if named is None:
        with suppress(OSError, ValueError, AttributeError):  # without a readable configuration
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            named = config.get("_name_or_path")
    return named if isinstance(named, str) and _REPOSITORY.fullmatch(named) else None


def _texts(metadata: dict, key: str) -> list[str]:
    return [each for each in as_list(metadata.get(key)) if isinstance(each, str)]
