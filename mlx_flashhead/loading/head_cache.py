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
from ..models.fetch import home
from ..models.finer_head import FOLDER as FINE_FOLDER
from ..models.finer_head import remove_files
from ..models.tensor_files import ENDING
from .sources import StoredHead

# Version of the recipe. A new one builds all FlashHeads again.
RECIPE = 1
_NAME_LENGTH = 24  # of the 64 characters of a fingerprint
OWN_FILES = (FILE_NAME, SETTINGS_NAME)
_NAME = re.compile(r"[0-9a-f]{24}-\d+")
_FINE_NAME = re.compile(r"[0-9a-f]{24}-(6|8|16)\.safetensors")
_SPEED_NAME = re.compile(r"[0-9a-f]{24}\.json")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A kept FlashHead: its folder, and its settings, None if it is damaged."""

    folder: Path
    config: FlashHeadConfig | None

    @property
    def model(self) -> str:
        """The name of its model."""
        return str(self.config.recipe.get("model", "unknown")) if self.config else "damaged"

    @property
    def key(self) -> str:
        """The beginning of the fingerprint of its rows."""
        return self.folder.name[:_NAME_LENGTH]

    @property
    def nbytes(self) -> int:
        """Its size on the disk, as far as it can be read."""
        with suppress(OSError):
            return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())
        return 0

    @property
    def built_at(self) -> float:
        """When it was built, in seconds of the epoch."""
        return self.folder.stat().st_mtime

    @property
    def path(self) -> Path:
        return self.folder

    def remove(self) -> bool:
        """Deletes it and its speeds; of a link, the link alone.

        Returns whether its folder is gone: files that are not its own stay.
        """
        speeds_of(self.key).unlink(missing_ok=True)
        if self.folder.is_symlink():
            self.folder.unlink()
            return True
        for name in OWN_FILES:
            with suppress(OSError):
                (self.folder / name).unlink()
        with suppress(OSError):
            self.folder.rmdir()
        return not self.folder.exists()


@dataclass(frozen=True)
class FineHead:
    """A kept finer head: its file, and of which model and original it is."""

    path: Path
    model: str
    original: str

    @property
    def key(self) -> str:
        """The beginning of the fingerprint of the model's own rows."""
        return self.path.name[:_NAME_LENGTH]

    @property
    def bits(self) -> str:
        return self.path.stem.rpartition("-")[2]

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    def remove(self) -> bool:
        """Deletes it, and what was fetched of it anew."""
        self.path.unlink(missing_ok=True)
        remove_files(self.path.parent, f".{self.path.stem}.*.part")
        return True


def fine_heads() -> list[FineHead]:
    """All kept finer heads, by model."""
    kept = []
    for file in (home() / FINE_FOLDER).glob("*" + ENDING):
        if _FINE_NAME.fullmatch(file.name):
            about = {}
            with suppress(RuntimeError, ValueError, OSError):
                loaded: Any = mx.load(str(file), return_metadata=True)
                about = loaded[1]
            names = (about.get(name, "damaged") for name in ("model", "original"))
            kept.append(FineHead(file, *names))
    return sorted(kept, key=lambda head: head.model)


def strangers() -> list[Path]:
    """What lies among the kept heads and is none."""
    places = {_shelf(): _NAME, home() / FINE_FOLDER: _FINE_NAME, home() / "speeds": _SPEED_NAME}
    found = [path for place, name in places.items() for path in place.glob("[!.]*")
             if not name.fullmatch(path.name)]  # fmt: skip
    return sorted(found)


def entries() -> list[Entry]:
    """All kept FlashHeads, the latest first."""
    folders = [
        folder
        for folder in _shelf().glob("*")
        if _NAME.fullmatch(folder.name) and any((folder / name).exists() for name in OWN_FILES)
    ]
    kept = []
    for folder in folders:
        try:
            kept.append(Entry(folder, read_settings(folder)))
        except (ValueError, OSError):
            kept.append(Entry(folder, None))
    return sorted(kept, key=lambda entry: entry.built_at, reverse=True)


def place_of(rows: Matrix) -> Path:
    """The place of these rows' FlashHead, which may not exist yet."""
    return _shelf() / f"{rows.fingerprint[:_NAME_LENGTH]}-{RECIPE}"


def find(rows: Matrix, say: Say) -> StoredHead | None:
    """The FlashHead that was built for these rows (in token order), or for another form of them.

    A damaged entry counts as missing, and is told.
    """
    place = place_of(rows)
    try:
        index = _read(place, say) if place.is_dir() else None
        return _nearest(rows, place) if index is None else StoredHead(index, str(place))
    except OSError:  # what cannot be read is not there
        return None


def speeds_of(fingerprint: str) -> Path:
    """The file of what was measured with the FlashHead of these rows."""
    return home() / "speeds" / f"{fingerprint[:_NAME_LENGTH]}.json"


def keep(index: FlashHeadIndex, place: Path) -> None:
    """Keeps a FlashHead and replaces another one in its place, whose speeds are forgotten.

    Raises:
        OSError: If it cannot be written. Nothing is left behind.
        ValueError: The same, in a sentence.
    """
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


def remove_unfinished() -> None:
    """Deletes what was fetched of finer heads that are not whole, and all speeds."""
    for file in (home() / FINE_FOLDER).glob(".*.part"):
        if _FINE_NAME.fullmatch(file.name.split(".")[1] + ENDING):
            file.unlink(missing_ok=True)
    for file in (home() / "speeds").glob("*.json"):
        if _SPEED_NAME.fullmatch(file.name):
            file.unlink(missing_ok=True)


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


def _shelf() -> Path:
    return home() / "flash_heads"


def _nearest(rows: Matrix, place: Path) -> StoredHead | None:
    """The entry with the nearest rows, if any are near enough."""
    best, best_cosine = None, 0.0
    for entry in entries():
        of_this_recipe = entry.folder.name.endswith(f"-{RECIPE}") and entry.folder != place
        if not of_this_recipe or entry.config is None or entry.config.vocab_size != rows.n_rows:
            continue
        index = _read(entry.folder, lambda _: None)
        try:
            if index is None or index.hidden_size != rows.hidden_size:
                continue
            index.check_fit(rows, str(entry.folder))
        except ValueError:
            continue
        cosine = index.sketch.likeness(rows).cosine
        if cosine > best_cosine:
            best, best_cosine = StoredHead(index, str(entry.folder)), cosine
    return best


def _read(folder: Path, say: Say) -> FlashHeadIndex | None:
    try:
        return read_index(folder)
    except (ValueError, OSError) as error:
        say(f"{str(error).partition(': ')[0]}: it is built again.")
        return None
