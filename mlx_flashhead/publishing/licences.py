"""Licences of base models that put conditions on derived models.

A model's card names its licence. If it does not, the texts beside the model do. Nothing is guessed.

Source: the licence agreements themselves, Llama's in meta-llama/llama-models (sections 1.b.i and
1.b.iii), Gemma's at ai.google.dev/gemma/terms (section 3.1).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..index.files import is_companion
from ..models.origin import begins_with

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
    meta = "Meta " if version == "3" else ""
    return Licence(
        identifier=f"llama{version}",
        name=f"{meta}Llama {version} Community License",
        link=f"https://www.llama.com/llama{version.replace('.', '_')}/license",
        text=rf"llama {re.escape(version)} community license agreement",
        notice=f"{meta}Llama {version} is licensed under the {meta}Llama {version} Community "
        "License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
        attribution=attribution,
        prefix=prefix,
    )


GEMMA = Licence(
    identifier="gemma",
    name="Gemma Terms of Use",
    link="https://ai.google.dev/gemma/terms",
    text=r"gemma terms of use(?! found at)",
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms",
)
LLAMA_2, LLAMA_3 = _llama("2", "", ""), _llama("3", "Built with Meta Llama 3", "Llama-3")
LICENCES = (LLAMA_2, LLAMA_3, *map(_llama, ("3.1", "3.2", "3.3", "4")), GEMMA)


def recognise(metadata: dict, files: Iterable[Path]) -> Licence | None:
    """The licence with conditions that a card's header names, or else the files beside it."""
    names = [str(each or "").lower() for each in as_list(metadata.get("license"))]
    is_named = any(name not in ("", "other", "unknown") for name in names)
    if not is_named:
        names = [str(metadata.get("license_name") or "").lower()]
    for name in names:
        identifier = re.sub(r"(meta|community|license|licence|agreement|[-_ ])", "", name)
        for licence in LICENCES:
            if licence.identifier == identifier:
                return licence
    text = "" if is_named else "\n".join(map(_beginning, files))
    return next((licence for licence in LICENCES if re.search(licence.text, text)), None)


def check(
    metadata: dict, files: Sequence[Path], repo_id: str | None, *, model: str, place: str
) -> None:
    """Refuses to make a model public whose licence is unknown, lacks its text or forbids the name.

    A derived name, None, is allowed. ``place`` says where the text is to be saved.
    """
    licence = recognise(metadata, files)
    if licence is None:
        if metadata.get("license"):
            return
        raise ValueError(
            f"The licence of {model} is not known, since its card does not name it: give it as "
            "`license`, such as apache-2.0."
        )
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
