"""Where a model's FlashHead comes from: what a user chooses, the one that is named, the one beside
the model, and the cached ones on this machine.

A cache entry is a folder, or a file of a finer head, written completely or not at all. Its name is
the fingerprint of a head's rows and a number, so a moved or renamed model finds its own. Nothing of
another name is touched. The network is used only for repositories that the user names.
"""

import argparse
import errno
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..common.command import printable, with_flags
from ..common.new_folder import new_folder
from ..head.matrix import Matrix
from ..index import files
from ..index.files import FILE_NAME, SETTINGS_NAME, FlashHeadIndex, read_index
from ..index.settings import FlashHeadConfig
from ..models.fetch import ENDING, home, resolve
from ..models.finer_head import FOLDER as FINE_FOLDER

BUILD, REFUSE, DENSE, LATER = "build", "refuse", "dense", "later"
RECIPE = 1  # a new version builds all FlashHeads again
_NAME_LENGTH = 24  # of the 64 characters of a fingerprint
SHELF, SPEEDS, ENTRY_FILES = "flash_heads", "speeds", (FILE_NAME, SETTINGS_NAME)
_NAMES = {  # names of cache entries, by folder: nothing else is touched
    SHELF: re.compile(r"[0-9a-f]{24}-\d+"),
    FINE_FOLDER: re.compile(r"[0-9a-f]{24}-\d+\.safetensors|\.[0-9a-f]{24}-\d+\.\w+\.part"),
    SPEEDS: re.compile(r"[0-9a-f]{24}\.json"),
}


@dataclass(frozen=True)
class HeadOptions:
    """How a model gets its FlashHead. The first five are arguments of `load`.

    Attributes:
        missing: Without any, ``BUILD`` it, ``REFUSE``, or leave the model ``DENSE``: for good, or
            until it is built ``LATER``.
        tunes: Measure the settings of the loop on this machine, once.
        drafts: Whether the model drafts for another one.
        always: Use a FlashHead that makes nothing faster, too.
        flags: Name parameters by their flags, for a command.
        measures: Measure them now, even if they are known.
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
    name = str(options.flash_head)
    folder = resolve(name, files=[FILE_NAME, SETTINGS_NAME, files.CONFIG_NAME])
    if files.stored_recipe(folder) is None:
        raise ValueError(
            f"{name} holds no FlashHead: name another one, or leave it out and one is found or "
            "built."
        )
    return StoredHead(read_index(folder), name)


def bundled_head(folder: Path, options: HeadOptions) -> StoredHead | None:
    """The FlashHead in a model's folder, or None; ValueError for a damaged or another version's."""
    if files.has_flash_head(folder):
        return StoredHead(read_index(folder), str(folder))
    if files.stored_recipe(folder) is not None:
        options.say(
            f"{folder} names a FlashHead, but {FILE_NAME} is missing (other programs leave it out "
            "when they save the model), so another one is used."
        )
    return None


@dataclass(frozen=True)
class Entry:
    """A cached FlashHead, or a finer head, which has no settings, as a damaged one."""

    path: Path
    model: str  # its name
    config: FlashHeadConfig | None = None

    @property
    def key(self) -> str:
        """The beginning of the fingerprint of the model's rows."""
        return self.path.name[:_NAME_LENGTH]

    @property
    def nbytes(self) -> int:
        """Its size on the disk, as far as it can be read."""
        with suppress(OSError):
            parts = self.path.iterdir() if self.path.is_dir() else [self.path]
            return sum(part.stat().st_size for part in parts if part.is_file())
        return 0

    def remove(self) -> bool:
        """Deletes it, and a FlashHead's speeds, of a link the link alone. Returns whether its
        folder is gone: files that are not its own stay."""
        if self.path.suffix != ENDING:
            speeds_of(self.key).unlink(missing_ok=True)
        if self.path.suffix == ENDING or self.path.is_symlink():
            self.path.unlink(missing_ok=True)
            return True
        with suppress(OSError):
            for name in ENTRY_FILES:
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
        return not self.path.exists()


def entries() -> list[Entry]:
    """All cached FlashHeads, the latest first."""
    kept = []
    for folder in _well_named(SHELF):
        if any((folder / name).exists() for name in ENTRY_FILES):
            config, model = None, "damaged"
            with suppress(ValueError, OSError):
                config = files.read_settings(folder)
                model = str(config.recipe.get("model", "unknown"))
            kept.append(Entry(folder, model, config))
    return sorted(kept, key=lambda entry: entry.path.stat().st_mtime, reverse=True)


def fine_heads() -> list[Entry]:
    """All cached finer heads, by model."""
    kept = []
    for file in _well_named(FINE_FOLDER):
        if file.suffix == ENDING:
            loaded: Any = (None, {})
            with suppress(RuntimeError, ValueError, OSError):
                loaded = mx.load(str(file), return_metadata=True)
            kept.append(Entry(file, loaded[1].get("model", "damaged")))
    return sorted(kept, key=lambda entry: entry.model)


def remove_rest() -> list[Path]:
    """Deletes speeds and partly fetched finer heads. Returns what else lies among the cached
    heads and is none of them."""
    parts = (file for file in _well_named(FINE_FOLDER) if file.suffix == ".part")
    for file in (*_well_named(SPEEDS), *parts):
        file.unlink(missing_ok=True)
    left = (path for name in _NAMES for path in (home() / name).glob("*"))
    return sorted(path for path in left if not _NAMES[path.parent.name].fullmatch(path.name))


def _well_named(folder: str) -> list[Path]:
    """The entries of a folder of the home whose names have its form."""
    return [path for path in (home() / folder).glob("*") if _NAMES[folder].fullmatch(path.name)]


def place_of(rows: Matrix) -> Path:
    """The place of these rows' FlashHead, which may not exist yet."""
    return home() / SHELF / f"{rows.fingerprint[:_NAME_LENGTH]}-{RECIPE}"


def speeds_of(fingerprint: str) -> Path:
    """The file of what was measured with the FlashHead of these rows."""
    return home() / SPEEDS / f"{fingerprint[:_NAME_LENGTH]}.json"


def find(rows: Matrix, say: Callable[[str], None]) -> StoredHead | None:
    """The FlashHead that was built for these rows (in token order), else the nearest one for
    another form of them. A damaged one counts as missing, with a sentence."""
    place, best, best_cosine = place_of(rows), None, 0.0
    with suppress(OSError):  # what cannot be read is not there
        if place.is_dir():
            try:
                return StoredHead(read_index(place), str(place))
            except (ValueError, OSError) as error:
                say(f"{str(error).partition(': ')[0]}: it is built again.")
        for entry in entries():
            path, config = entry.path, entry.config
            other = path.name.endswith(f"-{RECIPE}") and path != place
            if not other or config is None or config.vocab_size != rows.n_rows:
                continue
            with suppress(ValueError, OSError):  # damaged, or of other rows
                index = read_index(path)
                index.check_fit(rows, str(path))
                cosine, _ = index.sketch.likeness(rows)
                if cosine > best_cosine:
                    best, best_cosine = StoredHead(index, str(path)), cosine
    return best


def keep(index: FlashHeadIndex, place: Path) -> None:
    """Keeps a FlashHead and replaces another one in its place, whose speeds are forgotten; OSError
    if it cannot be written. Nothing is left behind."""
    with new_folder(place) as folder:
        files.write_companion(folder, index)
    speeds_of(index.config.fingerprint).unlink(missing_ok=True)


def obstacle(place: Path, nbytes: int) -> str | None:
    """Why a FlashHead of about that size cannot be cached in ``place``; None if it can."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=place.parent):
            pass
        if shutil.disk_usage(place.parent).free < nbytes:
            return os.strerror(errno.ENOSPC)
    except OSError as error:
        return error.strerror or str(error)
    return None
