"""What a user chooses of a FlashHead, and the look-up: a named one, or the one beside the model.

It asks the network only for repositories that the user names.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.arguments import whole_number
from ..common.command import printable, with_flags
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
BUILD, REFUSE, DENSE, LATER = "build", "refuse", "dense", "later"


@dataclass(frozen=True)
class HeadOptions:
    """How a model gets its FlashHead. The first five are arguments of `load`.

    Attributes:
        missing: Without any, ``BUILD`` it, ``REFUSE``, or leave the model ``DENSE``: for good, or
            until it is built ``LATER``.
        tunes: Measure the settings of the loop on this machine, once.
        drafts: Whether the model drafts for another one.
        always: Use a FlashHead that makes nothing faster, too.
        flags: Name parameters by their flags, since a command asks.
    """

    flash_head: str | Path | None = None
    missing: str = BUILD
    n_probes: int | None = None
    backend: str | None = None
    progress: bool = True
    tunes: bool = True
    drafts: bool = False
    always: bool = False
    flags: bool = False

    def say(self, text: str) -> None:
        """Prints a sentence on standard error, if there is progress to be shown."""
        if self.progress:
            text = with_flags(text) if self.flags else text
            print(printable(text), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class StoredHead:
    """A FlashHead, and its folder or repository, for messages."""

    index: FlashHeadIndex
    source: str


def explicit_head(options: HeadOptions) -> StoredHead | None:
    """The FlashHead that the user names, or None.

    Raises:
        ValueError: If it does not exist, or is damaged.
    """
    if options.flash_head is None:
        return None
    folder = resolve(str(options.flash_head), files=FILES)
    if not is_written_here(folder):
        raise ValueError(
            f"{options.flash_head} holds no FlashHead: name another one, or leave it out and one "
            "is found or built."
        )
    return StoredHead(read_index(folder), str(options.flash_head))


def bundled_head(folder: Path, options: HeadOptions) -> StoredHead | None:
    """The FlashHead in a model's folder, or None.

    Raises:
        ValueError: If it is damaged or of another version.
    """
    if has_flash_head(folder):
        return StoredHead(read_index(folder), str(folder))
    if is_written_here(folder):
        options.say(
            f"{folder} names a FlashHead, but {FILE_NAME} is missing (other programs leave it out "
            "when they save the model), so another one is used."
        )
    return None


def add_head_options(group: Any) -> None:
    """Adds ``--n-probes``, ``--flash-head`` and ``--no-build`` to a command's arguments."""
    add_probes_option(group)
    add_source_options(group)


def add_probes_option(group: Any) -> None:
    """Adds ``--n-probes`` to a command's arguments."""
    group.add_argument(
        "--n-probes",
        type=whole_number(1),
        help="Clusters scored per token (default: the number that is fastest on this machine).",
    )


def add_source_options(group: Any, no_build: str = "Refuse to build a missing FlashHead.") -> None:
    """Adds ``--flash-head`` and ``--no-build`` to a command's arguments."""
    group.add_argument(
        "--flash-head",
        metavar="FOLDER_OR_REPO",
        help="Source of the FlashHead (default: the model's folder, else the one that was built "
        "for this model before, else a new one is built once and kept).",
    )
    group.add_argument("--no-build", action="store_true", help=no_build)


def add_answering_options(group: Any) -> None:
    """Adds the flags of a command that answers before a FlashHead is built."""
    add_source_options(group, "Build no FlashHead: without one, answer dense.")
    group.add_argument(
        "--build-first",
        action="store_true",
        help="Build a missing FlashHead before the first answer (default: the model answers dense, "
        "and the FlashHead is built when there is time).",
    )
    group.add_argument(
        "--flash-head-always",
        action="store_true",
        help="Use the FlashHead where it makes this model no faster on this machine, too.",
    )
    group.add_argument(
        "--no-verify",
        action="store_true",
        help="Take the FlashHead's choices as they are (default: the dense rows check every token, "
        "so that the text is the dense model's).",
    )


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """``--flash-head`` and ``--no-build`` as arguments of ``load``."""
    return {"flash_head": args.flash_head, "build": not args.no_build}


def head_options(args: argparse.Namespace, *, dense: bool = False) -> HeadOptions:
    """The flags of `add_head_options` or `add_answering_options`; ``dense`` builds none."""
    answers_first = "build_first" in args
    missing = BUILD
    if dense or (answers_first and args.no_build):
        missing = DENSE
    elif args.no_build:
        missing = REFUSE
    elif answers_first and not args.build_first:
        missing = LATER
    always = answers_first and args.flash_head_always
    return HeadOptions(args.flash_head, missing, args.n_probes, always=always, flags=True)
