"""FlashHeads and finer heads that are kept on this machine, found by the rows of a model's head.

Each is a folder or a file, written completely or not at all. Its name is the fingerprint of the
rows and a number, so a moved or renamed model finds its own. Nothing of another name is touched.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import mlx.core as mx
from filelock import FileLock, Timeout

from ..common.new_folder import new_folder
from ..head.matrix import Matrix
from ..index.files import (
    FILE_NAME,
    SETTINGS_NAME,
    FlashHeadIndex,
    read_index,
    read_settings,
    write_companion,
)
from ..index.settings import FlashHeadConfig
from ..models.fetch import ENDING, home
from ..models.finer_head import FOLDER as FINE_FOLDER
from .sources import StoredHead

# Version of the recipe. A new one builds all FlashHeads again.
RECIPE = 1
_NAME_LENGTH = 24  # of the 64 characters of a fingerprint
SHELF, ENTRY_FILES = "flash_heads", (FILE_NAME, SETTINGS_NAME)
_NAMES = {  # of what is kept, by folder: nothing else is touched
    SHELF: re.compile(r"[0-9a-f]{24}-\d+"),
    FINE_FOLDER: re.compile(r"[0-9a-f]{24}-\d+\.safetensors|\.[0-9a-f]{24}-\d+\.\w+\.part"),
    "speeds": re.compile(r"[0-9a-f]{24}\.json"),
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A kept FlashHead: its folder, and its settings, None if it is damaged."""

    path: Path
    config: FlashHeadConfig | None

    @property
    def model(self) -> str:
        """The name of its model."""
        return str(self.config.recipe.get("model", "unknown")) if self.config else "damaged"

    @property
    def key(self) -> str:
        """The beginning of the fingerprint of the model's rows."""
        return self.path.name[:_NAME_LENGTH]

    @property
    def nbytes(self) -> int:
        """Its size on the disk, as far as it can be read."""
        with suppress(OSError):
            files = self.path.iterdir() if self.path.is_dir() else [self.path]
            return sum(file.stat().st_size for file in files if file.is_file())
        return 0

    def remove(self) -> bool:
        """Deletes it and its speeds, of a link the link alone. Returns whether its folder is gone:
        files that are not its own stay."""
        speeds_of(self.key).unlink(missing_ok=True)
        if self.path.is_symlink():
            self.path.unlink()
            return True
        with suppress(OSError):
            for name in ENTRY_FILES:
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
        return not self.path.exists()


@dataclass(frozen=True)
class FineHead(Entry):
    """A kept finer head: its file, and what it says about itself."""

    about: dict[str, str]

    @property
    def model(self) -> str:
        return self.about.get("model", "damaged")

    @property
    def bits(self) -> str:
        return self.path.stem.rpartition("-")[2]

    def remove(self) -> bool:
        self.path.unlink(missing_ok=True)
        return True


def entries() -> list[Entry]:
    """All kept FlashHeads, the latest first."""
    cached = []
    for folder in _well_named(SHELF):
        if any((folder / name).exists() for name in ENTRY_FILES):
            config = None
            with suppress(ValueError, OSError):
                config = read_settings(folder)
            cached.append(Entry(folder, config))
    return sorted(cached, key=lambda entry: entry.path.stat().st_mtime, reverse=True)


def fine_heads() -> list[FineHead]:
    """All kept finer heads, by model."""
    cached = []
    for file in _well_named(FINE_FOLDER):
        if file.suffix == ENDING:
            loaded: Any = (None, {})
            with suppress(RuntimeError, ValueError, OSError):
                loaded = mx.load(str(file), return_metadata=True)
            cached.append(FineHead(file, None, loaded[1]))
    return sorted(cached, key=lambda head: head.model)


def remove_rest() -> list[Path]:
    """Deletes speeds and what was fetched of finer heads so far. Returns what lies among the kept
    heads and is none of them."""
    parts = (file for file in _well_named(FINE_FOLDER) if file.suffix == ".part")
    for file in (*_well_named("speeds"), *parts):
        file.unlink(missing_ok=True)
    left = (path for name in _NAMES for path in (home() / name).glob("*"))
    return sorted(path for path in left if not _NAMES[path.parent.name].fullmatch(path.name))


def _well_named(folder: str) -> list[Path]:
    """What lies in a folder of the home and has a name as it is given there."""
    return [path for path in (home() / folder).glob("*") if _NAMES[folder].fullmatch(path.name)]


def place_of(rows: Matrix) -> Path:
    """The place of these rows' FlashHead, which may not exist yet."""
    return home() / SHELF / f"{rows.fingerprint[:_NAME_LENGTH]}-{RECIPE}"


def find(rows: Matrix, say: Say) -> StoredHead | None:
    """The FlashHead that was built for these rows (in token order), or for another form of them.

    A damaged entry counts as missing, with a sentence.
    """
    place = place_of(rows)
    with suppress(OSError):  # what cannot be read is not there
        if place.is_dir():
            try:
                return StoredHead(read_index(place), str(place))
            except (ValueError, OSError) as error:
                say(f"{str(error).partition(': ')[0]}: it is built again.")
        return _nearest(rows, place)
    return None


def speeds_of(fingerprint: str) -> Path:
    """The file of what was measured with the FlashHead of these rows."""
    return home() / "speeds" / f"{fingerprint[:_NAME_LENGTH]}.json"


def keep(index: FlashHeadIndex, place: Path) -> None:
    """Keeps a FlashHead and replaces another one in its place, whose speeds are forgotten; OSError,
    or ValueError in a sentence, if it cannot be written. Nothing is left behind."""
    with new_folder(place) as folder:
        write_companion(folder, index)
    speeds_of(index.config.fingerprint).unlink(missing_ok=True)


def obstacle(place: Path, nbytes: int) -> str | None:
    """Why a FlashHead of about that size cannot be kept in ``place``; None if it can."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=place.parent):
            pass
        if shutil.disk_usage(place.parent).free < nbytes:
            return os.strerror(errno.ENOSPC)
    except OSError as error:
        return error.strerror or str(error)
    return None


def lock_of(place: Path) -> FileLock | None:
    """The lock of the one process that builds the FlashHead of ``place``; None if there is none,
    since the place cannot be written."""
    lock = FileLock(home() / "locks" / f"{place.name}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire(timeout=0)
    except OSError:
        return None
    return lock


def _nearest(rows: Matrix, place: Path) -> StoredHead | None:
    """The entry with the nearest rows, if any are near enough."""
    best, best_cosine = None, 0.0
    for path, config in ((entry.path, entry.config) for entry in entries()):
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
