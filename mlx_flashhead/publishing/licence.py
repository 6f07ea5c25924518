"""Licences that put conditions on a derived model.

A base model's card names its licence, or else the texts beside the model do. Nothing is guessed.

Source: the agreements, Llama's in meta-llama/llama-models (sections 1.b.i and 1.b.iii), Gemma's at
    ai.google.dev/gemma/terms (3.1).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..index.files import is_companion
from ..models.origin import begins_with

LICENCE_FILES = ("LICEN[CS]E*", "*_LICEN[CS]E*", "USE_POLICY*", "*TERMS*", "NOTICE*", "Notice*")
NOTICE_FILE = "NOTICE.txt"
# What may stand in a licence's name beside its identifier.
_REST = r"meta|community|license|licence|agreement|[-_ ]"
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
    """The conditions that a licence puts on a derived model.

    Attributes:
        identifier: The card's ``license``.
        name: The name for people.
        link: The address of its text.
        text: A pattern that a copy of the text matches.
        notice: A sentence that a file beside the model must hold.
        attribution: A text that the card must show.
        prefix: The model's name must begin with it.
    """

    identifier: str
    name: str
    link: str
    text: str
    notice: str
    attribution: str = ""
    prefix: str = ""


def _llama(version: str, attribution: str = "Built with Llama", prefix: str = "Llama") -> Licence:
    model = f"Llama {version}"
    if version == "3":
        model = "Meta Llama 3"
    return Licence(
        identifier=f"llama{version}",
        name=f"{model} Community License",
        link=f"https://www.llama.com/llama{version.replace('.', '_')}/license",
        text=rf"llama {re.escape(version)} community license agreement",
        notice=f"{model} is licensed under the {model} Community License, Copyright © Meta "
        "Platforms, Inc. All Rights Reserved.",
        attribution=attribution,
        prefix=prefix,
    )


LICENCES = (
    _llama("2", attribution="", prefix=""),
    _llama("3", attribution="Built with Meta Llama 3", prefix="Llama-3"),
    _llama("3.1"),
    _llama("3.2"),
    _llama("3.3"),
    _llama("4"),
    Licence(
        identifier="gemma",
        name="Gemma Terms of Use",
        link="https://ai.google.dev/gemma/terms",
        text=r"gemma terms of use(?! found at)",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms",
    ),
)


def recognise(metadata: dict[str, Any], files: Iterable[Path]) -> Licence | None:
    """The licence with conditions that a card names, or else the texts beside it.

    Args:
        metadata: The card's header.
        files: The files of the licence.

    Returns:
        The licence; None if it is unknown or has no conditions.
    """
    entries = [*as_list(metadata.get("license")), metadata.get("license_name")]
    identifiers = {re.sub(_REST, "", str(entry).lower()) for entry in entries if entry}
    text = ""
    if identifiers <= {"other", "unknown"}:
        text = "\n".join(_beginning(file) for file in files)
    for licence in LICENCES:
        if licence.identifier in identifiers or re.search(licence.text, text):
            return licence
    return None


def check_licence(
    metadata: dict[str, Any], files: Sequence[Path], repo_id: str | None, *, model: str, where: str
) -> None:
    """Refuses to make a model public against its licence.

    Args:
        metadata: The header of its card.
        files: The files of its licence.
        repo_id: The repository; None for a derived name, which is allowed.
        model: The model, for messages.
        where: The folder into which a missing text belongs, for messages.

    Raises:
        ValueError: If the licence is unknown, lacks its text, or forbids the name.
    """
    licence = recognise(metadata, files)
    if licence is None:
        if metadata.get("license"):
            return
        raise ValueError(
            f"The licence of {model} is not known from its card: give it as `license`, such as "
            "apache-2.0."
        )
    owner, _, name = (repo_id or "").rpartition("/")
    if repo_id and not begins_with(licence.prefix, name):
        raise ValueError(
            f"{repo_id} is not a name that the {licence.name} allows: it must begin with "
            f"{licence.prefix}, so call it {owner}/{licence.prefix}-{name}, for example."
        )
    texts = [_beginning(file) for file in files if not file.name.lower().startswith("notice")]
    if not any(re.search(licence.text, text) for text in texts):
        raise ValueError(
            f"The {licence.name} must be passed on with the model, but its text is missing: save "
            f"{licence.link} as LICENSE.txt in {where}, then upload with mlx_flashhead.upload."
        )


def with_licence(metadata: dict[str, Any], license: str | None) -> dict[str, Any]:
    """Adds the user's licence to a card's header.

    Args:
        metadata: The header.
        license: The licence, if the user names one.

    Raises:
        ValueError: If the card names another one.
    """
    declared = metadata.get("license")
    if license and declared and license != declared:
        raise ValueError(
            f"`license` {license} contradicts the model's card, which says {declared}: leave it "
            "out."
        )
    if not license:
        return metadata
    return metadata | {"license": license}


def write_notice(licence: Licence | None, folder: Path) -> None:
    """Puts the licence's notice beside a model, unless a file there holds it.

    Args:
        licence: The licence, if it has conditions.
        folder: The model's folder.
    """
    notices = folder.glob("[Nn][Oo][Tt][Ii][Cc][Ee]*")
    if licence is None or any(licence.notice.lower() in _beginning(file) for file in notices):
        return
    file = folder / NOTICE_FILE
    paragraphs = [licence.notice, changes_in(folder)]
    if file.exists():
        paragraphs.insert(0, file.read_text(encoding="utf-8").rstrip())
    file.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def changes_in(folder: Path) -> str:
    """A sentence on how a folder's content was made from its model."""
    if is_companion(folder):
        return DERIVED
    return MODIFIED


def licence_files(folder: Path) -> list[Path]:
    """The files of a model's folder that belong to its licence."""
    matches = {file for pattern in LICENCE_FILES for file in folder.glob(pattern)}
    return sorted(file for file in matches if file.is_file())


def as_list(entry: Any) -> list[Any]:
    """An entry of a card's header as a list, which may stand alone there."""
    if isinstance(entry, list | tuple):
        return list(entry)
    if entry is None:
        return []
    return [entry]


def _beginning(file: Path) -> str:
    """The first 20,000 characters of a text, in small letters."""
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(20_000).lower()
