"""What an unfinished build has computed, on the disk: the next one goes on from there."""

import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ..common.new_folder import new_file

# Between two writings of a stage pass so many seconds.
SECONDS = 20.0

Arrays = dict[str, np.ndarray]


def checksum(*arrays: np.ndarray) -> int:
    """A number that is another one for other values."""
    total = 0
    for array in arrays:
        total = zlib.crc32(array.tobytes(), total)
    return total


class Checkpoint:
    """A file for each stage of a build, which is written whole or not at all.

    What cannot be written, or read, is computed again.

    Args:
        folder: Where the files are; None: nothing is kept.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._written_at = time.monotonic()
        self._unwritten: tuple[str, int, Callable[[], Arrays]] | None = None

    def read(self, stage: str, source: int) -> Arrays:
        """Returns what is kept of a stage; nothing if there is nothing whole.

        Args:
            stage: The name of the stage.
            source: A checksum of what the stage is computed from. What was computed from anything
                else is not returned.
        """
        if self._folder is None:
            return {}
        with suppress(OSError, ValueError, EOFError, KeyError, BadZipFile):
            with np.load(self._folder / f"{stage}.npz", allow_pickle=False) as kept:
                arrays = dict(kept)
            if int(arrays.pop("source")) == source:
                return arrays
        return {}

    def offer(self, stage: str, source: int, arrays: Callable[[], Arrays]) -> None:
        """Keeps what a stage has computed so far, now and then, and when the build is left.

        Args:
            stage: The name of the stage.
            source: A checksum of what it is computed from.
            arrays: Makes the arrays, later too: what it reads must not change meanwhile.
        """
        if self._unwritten is not None and self._unwritten[0] != stage:
            self.write()
        self._unwritten = (stage, source, arrays)
        if time.monotonic() - self._written_at > SECONDS:
            self.write()

    def write(self) -> None:
        """Writes what was offered last and is not written yet."""
        if self._unwritten is None:
            return
        stage, source, arrays = self._unwritten
        self._unwritten = None
        if self._folder is not None:
            with suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                with new_file(self._folder / f"{stage}.npz") as file, file.open("wb") as opened:
                    np.savez(opened, source=source, **arrays())  # type: ignore[arg-type]
        self._written_at = time.monotonic()


NOT_KEPT = Checkpoint(None)
