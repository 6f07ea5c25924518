"""Model cards, from the template card.md, and licences: a base model's card names its licence, or
else the texts beside the model do. Nothing is guessed. Source: the agreements, Llama's in
meta-llama/llama-models (sections 1.b.i and 1.b.iii), Gemma's at ai.google.dev/gemma/terms (3.1).
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, snapshot_download

from ..common.repositories import redacted_logs
from ..common.tables import percent
from ..index.files import FILE_NAME, is_companion
from ..index.settings import AGAIN, FlashHeadConfig
from ..models.origin import Origin, begins_with, is_repository, local_origin

CARD_FILE = "README.md"
MARKER = "<!-- mlx_flashhead: your own text goes below this line and is kept -->"
# Entries of a base model's card that hold for a derived model too.
KEPT_METADATA = ("license", "license_name", "license_link", "language")

LICENCE_FILES = ("LICEN[CS]E*", "*_LICEN[CS]E*", "USE_POLICY*", "*TERMS*", "NOTICE*", "Notice*")
NOTICE_FILE = "NOTICE.txt"
MODIFIED = (
    "Modified: converted to MLX's format with mlx_flashhead, which may have quantized the weights, "
    "and which adds flash_head.index and an entry in config.json."
)
DERIVED = (
    "Derived: flash_head.index was computed from the model's weights with mlx_flashhead. It holds "
    "centroids of the output projection's rows, and 64 of the rows."
)


@dataclass(frozen=True)
class Licence:
    """The conditions that a licence puts on a derived model."""

    identifier: str  # the card's `license`
    name: str
    link: str
    text: str  # a pattern that a copy of the text matches
    notice: str  # a sentence that a file beside the model must hold
    attribution: str = ""  # a text that the card must show
    prefix: str = ""  # of the model's name


def _llama(version: str, attribution: str = "Built with Llama", prefix: str = "Llama") -> Licence:
    model = "Meta Llama 3" if version == "3" else f"Llama {version}"
    return Licence(
        f"llama{version}",
        f"{model} Community License",
        f"https://www.llama.com/llama{version.replace('.', '_')}/license",
        rf"llama {re.escape(version)} community license agreement",
        f"{model} is licensed under the {model} Community License, Copyright © Meta Platforms, "
        "Inc. All Rights Reserved.",
        attribution,
        prefix,
    )


GEMMA = Licence(
    "gemma",
    "Gemma Terms of Use",
    "https://ai.google.dev/gemma/terms",
    r"gemma terms of use(?! found at)",
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms",
)
LLAMA_2, LLAMA_3 = _llama("2", "", ""), _llama("3", "Built with Meta Llama 3", "Llama-3")
LICENCES = (LLAMA_2, LLAMA_3, *map(_llama, ("3.1", "3.2", "3.3", "4")), GEMMA)


def recognise(metadata: dict, files: Iterable[Path]) -> Licence | None:
    """The licence with conditions that a card's header names, or else the files beside it."""
    declared = [str(each or "").lower() for each in as_list(metadata.get("license"))]
    names = [name for name in declared if name not in ("", "other", "unknown")]
    text = "" if names else "\n".join(map(_beginning, files))
    names = names or [str(metadata.get("license_name") or "").lower()]
    rest = r"(meta|community|license|licence|agreement|[-_ ])"
    identifiers = [re.sub(rest, "", name) for name in names]
    named = (licence for licence in LICENCES if licence.identifier in identifiers)
    return next(named, next((each for each in LICENCES if re.search(each.text, text)), None))


def check_licence(
    metadata: dict, files: Sequence[Path], repo_id: str | None, *, model: str, place: str
) -> None:
    """Refuses to make a model public whose licence is unknown, lacks its text, which belongs into
    ``place``, or forbids the name. A derived name, None, is allowed."""
    licence = recognise(metadata, files)
    if licence is None:
        if metadata.get("license"):
            return
        remedy = "give it as `license`, such as apache-2.0"
        raise ValueError(f"The licence of {model} is not known from its card: {remedy}.")
    owner, _, name = (repo_id or "").rpartition("/")
    if repo_id and not begins_with(licence.prefix, name):
        raise ValueError(
            f"{repo_id} is not a name that the {licence.name} allows: it must begin with "
            f"{licence.prefix}, so call it {owner}/{licence.prefix}-{name}, for example."
        )
    texts = (_beginning(file) for file in files if not file.name.lower().startswith("notice"))
    if not any(re.search(licence.text, text) for text in texts):
        raise ValueError(
            f"The {licence.name} must be passed on with the model, but its text is missing: save "
            f"{licence.link} as LICENSE.txt in {place}, then upload with mlx_flashhead.upload."
        )


def write_notice(licence: Licence | None, folder: Path) -> None:
    """Puts the licence's notice beside the model, unless a file there holds it."""
    notices = folder.glob("[Nn][Oo][Tt][Ii][Cc][Ee]*")
    if licence is None or any(licence.notice.lower() in _beginning(file) for file in notices):
        return
    file = folder / NOTICE_FILE
    already = file.read_text(encoding="utf-8").rstrip() + "\n\n" if file.exists() else ""
    file.write_text(f"{already}{licence.notice}\n\n{changes_in(folder)}\n", encoding="utf-8")


def changes_in(folder: Path) -> str:
    """What a folder's content is to the model that it was made from."""
    return DERIVED if is_companion(folder) else MODIFIED


def licence_files(folder: Path) -> list[Path]:
    """The files of a model's folder that belong to its licence."""
    matches = {file for pattern in LICENCE_FILES for file in folder.glob(pattern)}
    return sorted(file for file in matches if file.is_file())


def as_list(value: object) -> list:
    """An entry of a card's header, which may stand alone."""
    return list(value) if isinstance(value, list | tuple) else [value] if value is not None else []


def _beginning(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(20_000).lower()


@dataclass(frozen=True)
class Provenance:
    """A base model with its card's header and its licence."""

    origin: Origin
    metadata: dict
    files: tuple[Path, ...]  # of its licence

    @property
    def licence(self) -> Licence | None:
        """Its licence, if it has conditions."""
        return recognise(self.metadata, self.files)


def find_provenance(
    path_or_repo: str, folder: Path, base_model: str | None = None, license: str | None = None
) -> Provenance:
    """What the folder of a model and its card on the Hub say of it. The user may name its
    repository, and its licence if the card names none."""
    origin, documents = local_origin(folder), folder
    in_cache = origin.revision is not None
    if in_cache and not Path(path_or_repo).expanduser().is_dir():
        # mlx-lm does not download these files
        documents = _fetched_documents(origin.repo_id or "", origin.revision) or folder
    elif base_model is not None and not (folder / CARD_FILE).exists():
        documents = _fetched_documents(base_model) or folder
    metadata = read_metadata(documents / CARD_FILE)
    repo_id = base_model
    if repo_id is None and not in_cache:  # a conversion's card names its source
        relation, bases = metadata.get("base_model_relation"), as_list(metadata.get("base_model"))
        is_conversion = metadata.get("library_name") == "mlx" or relation == "quantized"
        if is_conversion and len(bases) == 1 and is_repository(bases[0]):
            repo_id = bases[0]
    if repo_id not in (None, origin.repo_id):
        origin = Origin(repo_id.rpartition("/")[2], repo_id)
    files = {file.name: file for each in (documents, folder) for file in licence_files(each)}
    return Provenance(origin, with_licence(metadata, license), tuple(files.values()))


def _fetched_documents(repo_id: str, revision: str | None = None) -> Path | None:
    """A folder with a repository's card and its licence; None if they cannot be downloaded."""
    with suppress(Exception), redacted_logs():  # the Hub's client raises many unrelated types
        patterns = [CARD_FILE, *LICENCE_FILES]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    return None


def card_metadata(base: Provenance, relation: str = "quantized") -> dict:
    """The header of a derived model's card: "quantized", or an "adapter" for a FlashHead alone."""
    bases, tags = (
        [text for text in as_list(base.metadata.get(key)) if isinstance(text, str)]
        for key in ("base_model", "tags")
    )
    metadata = {key: base.metadata[key] for key in KEPT_METADATA if base.metadata.get(key)}
    if base.licence is not None:
        metadata = {"license": base.licence.identifier} | metadata
    metadata |= {"library_name": "mlx", "pipeline_tag": "text-generation"}
    named: dict = {"base_model": base.origin.repo_id, "base_model_relation": relation}
    if base.origin.repo_id is None:  # a folder of unknown origin may still name its own base model
        named["base_model"] = bases if len(bases) > 1 else next(iter(bases), None)
        if relation != "adapter":
            named["base_model_relation"] = base.metadata.get("base_model_relation")
    metadata |= {key: value for key, value in named.items() if value}
    return metadata | {"tags": list(dict.fromkeys([*tags, "mlx", "flashhead"]))}


def with_licence(metadata: dict, license: str | None) -> dict:
    """A card's header with the user's licence; ValueError if the card names another one."""
    declared = metadata.get("license")
    if license is None or license == declared:
        return metadata
    if declared:
        contradiction = f"`license` {license} contradicts the model's card, which says {declared}"
        raise ValueError(f"{contradiction}: leave it out.")
    return metadata | {"license": license}


def read_metadata(card: Path) -> dict:
    """The header of a card; empty if there is no readable one."""
    with suppress(Exception):  # a bad card must not stop a conversion
        text = card.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("---"):
            return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return {}


def write_card(
    folder: Path,
    metadata: dict,
    config: FlashHeadConfig,
    title: str,
    model: str,
    own_text: str = "",
) -> None:
    """Writes README.md into the folder of a model with a FlashHead, or of a FlashHead alone.
    The examples name it as ``model``, a repository or a folder. ``own_text`` is a person's."""
    base, relation = metadata.get("base_model"), metadata.get("base_model_relation")
    if not isinstance(base, str) or relation not in ("quantized", "adapter"):
        base = None
    link = str(metadata.get("license_link"))
    if not link.startswith("http"):  # the copy beside the card
        link = next((file.name for file in licence_files(folder)), "")
    try:
        card = ModelCard.from_template(
            ModelCardData(**metadata, ignore_metadata_errors=True),
            template_path=str(Path(__file__).with_name("card.md")),
            title=title,
            model=model,
            base=base,
            index_size=(folder / FILE_NAME).stat().st_size if is_companion(folder) else None,
            config=config,
            report=config.report,
            licence=recognise(metadata, ()),
            licence_name=metadata.get("license_name") or metadata.get("license"),
            licence_link=link,
            changes=changes_in(folder),
            percent=percent,
            size=lambda nbytes: f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e4 else f"{nbytes:.0f} B",
            number=lambda value, decimals: "–" if value is None else f"{value:.{decimals}f}",
        )
    except Exception as error:  # whatever foreign settings make of the template
        wrong = f"The settings in {folder} hold figures that a card cannot show ({error})"
        raise ValueError(f"{wrong}: {AGAIN}.") from error
    text = f"{card.content.rstrip()}\n\n{MARKER}\n{own_text}"
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def text_below_marker(card: Path) -> str:
    """A person's text on a card: all below the marker, or all of a card without it."""
    text = card.read_text(encoding="utf-8-sig") if card.exists() else ""
    _, marker, below = text.partition(f"{MARKER}\n")
    if marker or not text:
        return below
    return ModelCard(text, ignore_metadata_errors=True).text.strip("\n") + "\n"
