"""Licences of base models that put conditions on derived models.

A model's card names its licence. If it does not, the texts beside the model do. Nothing is guessed.

Source: the licence agreements themselves, Llama's in meta-llama/llama-models (sections 1.b.i and
1.b.iii), Gemma's at ai.google.dev/gemma/terms (section 3.1).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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
    """The conditions that a licence puts on a derived model.

    Attributes:
        identifier: The card's ``license``.
        name: Full name.
        link: Address of the text.
        text: Pattern that a copy of the text matches.
        notice: Sentence that a file beside the model must hold.
        attribution: Text that the card must show, or "".
        prefix: Beginning of the model's name, or "".
    """

    identifier: str
    name: str
    link: str
    text: str
    notice: str
    attribution: str = ""
    prefix: str = ""


def _llama(version: str, path: str, attribution: str = "Built with Llama", prefix: str = "Llama"):
    meta = "Meta " if version == "3" else ""
    return Licence(
        identifier=f"llama{version}",
        name=f"{meta}Llama {version} Community License",
        link=f"https://www.llama.com/{path}/license",
        text=rf"llama {re.escape(version)} community license agreement",
        notice=f"{meta}Llama {version} is licensed under the {meta}Llama {version} Community "
        "License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
        attribution=attribution,
        prefix=prefix,
    )


LICENCES = (
    _llama("2", "llama2", attribution="", prefix=""),
    _llama("3", "llama3", attribution="Built with Meta Llama 3", prefix="Llama-3"),
    _llama("3.1", "llama3_1"),
    _llama("3.2", "llama3_2"),
    _llama("3.3", "llama3_3"),
    _llama("4", "llama4"),
    Licence(
        identifier="gemma",
        name="Gemma Terms of Use",
        link="https://ai.google.dev/gemma/terms",
        text=r"gemma terms of use(?! found at)",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms",
    ),
)


def recognise(metadata: dict, files: Iterable[Path]) -> Licence | None:
    """The licence of a model, if it is one of `LICENCES`.

    Args:
        metadata: Of its card.
        files: The licence's files beside it.
    """
    declared = metadata.get("license") or ""
    declared = (
        [str(one).lower() for one in declared]
        if isinstance(declared, list)
        else [str(declared).lower()]
    )
    if any(one not in ("", "other", "unknown") for one in declared):
        found = map(_by_identifier, declared)
        return next((licence for licence in found if licence is not None), None)
    named = _by_identifier(str(metadata.get("license_name") or "").lower())
    if named is not None:
        return named
    text = "\n".join(_beginning(file) for file in files).lower()
    return next((licence for licence in LICENCES if re.search(licence.text, text)), None)


def check_known(metadata: dict, model: str) -> None:
    """Checks that a model's licence is known, before anything is made public.

    Args:
        metadata: Its card's header.
        model: Its name, for the error.

    Raises:
        ValueError: If the licence is not known.
    """
    if not metadata.get("license"):
        raise ValueError(
            f"The licence of {model} is not known, since its card does not name it: give it as "
            "`license`, such as apache-2.0."
        )


def check_name(licence: Licence | None, repo_id: str) -> None:
    """Checks that the licence allows a repository's name.

    Raises:
        ValueError: If it does not.
    """
    owner, _, name = repo_id.rpartition("/")
    if licence is not None and not has_prefix(licence, name):
        suggested = f"{owner}/{licence.prefix}-{name}".lstrip("/")
        raise ValueError(
            f"{repo_id} is not a name that the {licence.name} allows: it must begin with "
            f"{licence.prefix}, so call it {suggested}, for example."
        )


def has_prefix(licence: Licence, name: str) -> bool:
    """Whether the name begins with the licence's prefix; case and hyphens do not matter."""
    return _plain(name).startswith(_plain(licence.prefix))


def check_text(
    licence: Licence | None, files: Iterable[Path], place: str, before: str = ""
) -> None:
    """Checks that a copy of the licence is beside the model.

    Args:
        licence: The model's licence.
        files: Files beside the model.
        place: Place for the copy, for the error.
        before: A step before that, for the error.

    Raises:
        ValueError: If there is none.
    """
    if licence is None:
        return
    texts = [file for file in files if not file.name.lower().startswith("notice")]
    if not any(re.search(licence.text, _beginning(file).lower()) for file in texts):
        raise ValueError(
            f"The {licence.name} must be handed on with the model, but its text is missing: "
            f"{before}save {licence.link} as LICENSE.txt in {place}, then upload with "
            "mlx_flashhead.upload."
        )


def write_notice(licence: Licence | None, folder: Path) -> None:
    """Puts the licence's notice beside the model, unless a file there holds it."""
    if licence is None:
        return
    if any(licence.notice in _beginning(f) for f in folder.glob("[Nn][Oo][Tt][Ii][Cc][Ee]*")):
        return
    file = folder / NOTICE_FILE
    already = file.read_text(encoding="utf-8").rstrip() + "\n\n" if file.exists() else ""
    file.write_text(f"{already}{licence.notice}\n\n{changes_in(folder)}\n", encoding="utf-8")


def changes_in(folder: Path) -> str:
    """What a folder's content is to the model that it was made from."""
    return DERIVED if is_companion(folder) else MODIFIED


def licence_files(folder: Path) -> list[Path]:
    """The files of a model's folder that belong to its licence."""
    found = {file for pattern in LICENCE_FILES for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def _by_identifier(identifier: str) -> Licence | None:
    identifier = re.sub(r"(meta|community|license|licence|agreement|[-_ ])", "", identifier)
    return next((licence for licence in LICENCES if licence.identifier == identifier), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _beginning(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(20_000)
