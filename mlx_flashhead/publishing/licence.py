"""Licences that put conditions on a derived model, by the names that cards give them.

Source: the agreements, Llama's in meta-llama/llama-models (sections 1.b.i and 1.b.iii), Gemma's at
    ai.google.dev/gemma/terms (3.1).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..index.files import is_companion

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

    name: str
    link: str
    notice: str  # a sentence that a file beside the model, and its card, hold
    asks: str  # what a person who publishes the model sees to
    attribution: str = ""  # a text that the card must show


def _llama(version: str, attribution: str = "Built with Llama", prefix: str = "Llama") -> Licence:
    model = "Meta Llama 3" if version == "3" else f"Llama {version}"
    return Licence(
        f"{model} Community License",
        f"https://www.llama.com/llama{version.replace('.', '_')}/license",
        f"{model} is licensed under the {model} Community License, Copyright © Meta Platforms, "
        "Inc. All Rights Reserved.",
        "a copy of its text beside the model"
        + (f", and a name that begins with {prefix}" if prefix else ""),
        attribution,
    )


# By what a card has as `license`, or as `license_name`.
LICENCES = {
    "llama2": _llama("2", attribution="", prefix=""),
    "llama3": _llama("3", attribution="Built with Meta Llama 3", prefix="Llama 3"),
    "llama3.1": _llama("3.1"),
    "llama3.2": _llama("3.2"),
    "llama3.3": _llama("3.3"),
    "llama4": _llama("4"),
    "gemma": Licence(
        "Gemma Terms of Use",
        "https://ai.google.dev/gemma/terms",
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms",
        "a copy of its text beside the model",
    ),
}


def recognise(metadata: dict[str, Any]) -> Licence | None:
    """The licence that a card's header names, if it has conditions and is known."""
    named = [*as_list(metadata.get("license")), metadata.get("license_name")]
    return next((LICENCES[name] for name in named if name in LICENCES), None)


def check_licence(metadata: dict[str, Any], model: str) -> None:
    """Refuses to make a model public whose card's header names no licence, with a ValueError."""
    if not metadata.get("license"):
        raise ValueError(
            f"The licence of {model} is not known from its card: give it as `license`, such as "
            "apache-2.0."
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
    return metadata | {"license": license} if license else metadata


def write_notice(licence: Licence | None, folder: Path) -> None:
    """Puts the licence's notice beside a model, unless it is there.

    Args:
        licence: The licence, if it has conditions.
        folder: The model's folder.
    """
    file = folder / NOTICE_FILE
    text = file.read_text(encoding="utf-8").rstrip() + "\n\n" if file.exists() else ""
    if licence is not None and licence.notice not in text:
        notice = f"{text}{licence.notice}\n\n{changes_in(folder)}\n"
        file.write_text(notice, encoding="utf-8")


def changes_in(folder: Path) -> str:
    """A sentence on how a folder's content was made from its model."""
    return DERIVED if is_companion(folder) else MODIFIED


def licence_files(folder: Path) -> list[Path]:
    """The files of a model's folder that belong to its licence."""
    matches = {file for pattern in LICENCE_FILES for file in folder.glob(pattern)}
    return sorted(file for file in matches if file.is_file())


def as_list(entry: Any) -> list[Any]:
    """An entry of a card's header as a list, which may stand alone there."""
    if isinstance(entry, list | tuple):
        return list(entry)
    return [] if entry is None else [entry]
