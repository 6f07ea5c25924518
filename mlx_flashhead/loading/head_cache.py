"""The FlashHeads that were built on this machine, found by the rows of the model's head.

Each is a folder, written completely or not at all. Its name is the fingerprint of the rows and the
version of the recipe, so a moved or renamed model finds its own.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from ..common.new_folder import new_folder
from ..head.matrix import Matrix
from ..index.files import FlashHeadIndex, read_index, read_settings, write_companion
from ..index.settings import FlashHeadConfig
from ..models.fetch import home
from .sources import StoredHead

# Version of the recipe. A new one builds all FlashHeads again.
RECIPE = 1
_NAME_LENGTH = 24  # of the 64 characters of a fingerprint

Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A kept FlashHead: its folder, and its settings, None if it is damaged."""

    folder: Path
    config: FlashHeadConfig | None

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


def entries() -> list[Entry]:
    """All kept FlashHeads, the latest first."""
    folders = [folder for folder in _shelf().glob("[!.]*") if folder.is_dir()]
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


def remove(entry: Entry) -> None:
    """Deletes a FlashHead; of a link, the link alone."""
    if entry.folder.is_symlink():
        entry.folder.unlink()
    else:
        shutil.rmtree(entry.folder)


@contextmanager
def one_at_a_time(place: Path, say: Say, *, waits: bool) -> Iterator[bool]:
    """Within the block, no other process builds the FlashHead of ``place``.

    If one does, the block waits for it or gets False. Without a writable place there is no lock.
    """
    lock = FileLock(home() / "locks" / f"{place.name}.lock")
    other = "Another process is building the FlashHead of this model: "
    with ExitStack() as stack:
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.acquire(timeout=0))
        except Timeout:
            say(other + ("waiting for it." if waits else "it is used from the next start."))
            if waits:
                stack.enter_context(lock.acquire())
        except OSError:
            yield True
            return
        yield lock.is_locked


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
