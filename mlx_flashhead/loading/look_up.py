"""Finds a given FlashHead, or the one in the model's folder.

It asks the network only for repositories that the user names.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..index.files import (
    CONFIG_NAME,
    FILE_NAME,
    SETTINGS_NAME,
    FlashHeadIndex,
    has_flash_head,
    is_written_here,
    read_index,
)
from ..models.fetch import resolve

FILES = [FILE_NAME, SETTINGS_NAME, CONFIG_NAME]


@dataclass(frozen=True)
class Found:
    """A FlashHead and its source.

    Attributes:
        index: The FlashHead.
        source: Its folder or repository, for messages.
    """

    index: FlashHeadIndex
    source: str


def given(flash_head: str | Path | None) -> Found | None:
    """The FlashHead that the user names.

    Args:
        flash_head: A folder or a Hugging Face repository; None: none is named.

    Raises:
        ValueError: If the folder or repository does not exist or does not hold a FlashHead.
    """
    if flash_head is None:
        return None
    folder = resolve(str(flash_head), files=FILES)
    if not is_written_here(folder):
        raise ValueError(
            f"{flash_head} holds no FlashHead: name another one, or leave it out and one is found "
            "or built."
        )
    return Found(read_index(folder), str(flash_head))


def inside(folder: Path, say: Callable[[str], None]) -> Found | None:
    """The FlashHead in a model's folder.

    Args:
        folder: The model's folder.
        say: Called with a sentence if the settings name a missing index.

    Raises:
        ValueError: If it is damaged or of another version.
    """
    if has_flash_head(folder):
        return Found(read_index(folder), str(folder))
    if is_written_here(folder):
        say(
            f"{folder} names a FlashHead, but {FILE_NAME} is missing (other programs leave it out "
            "when they save the model), so another one is used."
        )
    return None


def add_look_up_options(group: Any) -> None:
    """Adds ``--flash-head`` and ``--no-build`` to a command's arguments."""
    group.add_argument(
        "--flash-head",
        metavar="FOLDER_OR_REPO",
        help="Source of the FlashHead (default: the model's folder, else the one that was built "
        "for this model before, else a new one is built once and kept).",
    )
    group.add_argument(
        "--no-build", action="store_true", help="Refuse to build a missing FlashHead."
    )


def add_check_option(group: Any) -> None:
    """Adds ``--no-check`` to a command's arguments."""
    group.add_argument(
        "--no-check",
        action="store_true",
        help="Take the FlashHead's choices as they are (default: the dense rows check every token, "
        "so that the text is the dense model's).",
    )


def look_up_options(args: argparse.Namespace) -> dict[str, Any]:
    """These flags as arguments of ``load``."""
    return {"flash_head": args.flash_head, "build": not args.no_build}
