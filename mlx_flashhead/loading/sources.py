"""What a user chooses of a FlashHead, and the look-up: a named one, or the one beside the model.

It asks the network only for repositories that the user names.
"""

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..common.command import printable, with_flags
from ..index.files import (
    CONFIG_NAME,
    FILE_NAME,
    SETTINGS_NAME,
    FlashHeadIndex,
    has_flash_head,
    read_index,
    stored_recipe,
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
        measures: Measure them now, even if they are known.
        flags: Name parameters by their flags, since a command asks.
        fine_head: Source of a finer head's rows; True: the original that the model names.
        head_bits: Bits of the finer head; default: 8.
        verify: Whether another program's text is verified.
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
    measures: bool = False
    fine_head: str | Path | bool | None = None
    head_bits: int | None = None
    verify: bool = True

    @classmethod
    def from_flags(cls, args: argparse.Namespace, *, dense: bool = False) -> "HeadOptions":
        """The choices of the flags in `common/flags.py`; ``dense`` builds no FlashHead;
        ValueError if they contradict each other."""
        unverified = getattr(args, "no_verify", False) or getattr(args, "draw_probes", False)
        # unverified choices are a FlashHead's, never silently a normal head's
        answers_first = "build_first" in args and not unverified
        missing = BUILD
        if dense or (answers_first and args.no_build):
            missing = DENSE
        elif args.no_build:
            missing = REFUSE
        elif answers_first and not args.build_first:
            missing = LATER
        if args.head_bits is not None and not args.fine_head:
            raise ValueError("`head_bits` are those of a finer head: add --fine-head.")
        return cls(
            args.flash_head,
            missing,
            args.n_probes,
            always=getattr(args, "flash_head_always", False),
            flags=True,
            fine_head=args.fine_head,
            head_bits=args.head_bits,
            verify=not unverified,
        )

    def say(self, text: str) -> None:
        """Prints a sentence on standard error, if there is progress to be shown."""
        if self.progress:
            text = with_flags(text) if self.flags else text
            tqdm.write(printable(text), file=sys.stderr)  # above a bar that is shown
            sys.stderr.flush()

    def warn(self, text: str) -> None:
        """Says what is not as the user wanted it, whether there is progress to be shown or not."""
        if self.progress:
            self.say(text)
        else:
            warnings.warn(text, stacklevel=2)


@dataclass(frozen=True)
class StoredHead:
    """A FlashHead, and its folder or repository, for messages."""

    index: FlashHeadIndex
    source: str


def explicit_head(options: HeadOptions) -> StoredHead | None:
    """The FlashHead that the user names, or None; ValueError if it is not there, or damaged."""
    if options.flash_head is None:
        return None
    folder = resolve(str(options.flash_head), files=FILES)
    if stored_recipe(folder) is None:
        raise ValueError(
            f"{options.flash_head} holds no FlashHead: name another one, or leave it out and one "
            "is found or built."
        )
    return StoredHead(read_index(folder), str(options.flash_head))


def bundled_head(folder: Path, options: HeadOptions) -> StoredHead | None:
    """The FlashHead in a model's folder, or None; ValueError for a damaged or another version's."""
    if has_flash_head(folder):
        return StoredHead(read_index(folder), str(folder))
    if stored_recipe(folder) is not None:
        options.say(
            f"{folder} names a FlashHead, but {FILE_NAME} is missing (other programs leave it out "
            "when they save the model), so another one is used."
        )
    return None
