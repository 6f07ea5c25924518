"""A folder or a file that is written completely or not at all.

It is written in a temporary folder beside its place, and renamed at the end. A process that was
killed leaves its temporary folder, which the next process that writes there removes.
"""

import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = "mlx_flashhead-new"  # part of the names of temporary folders, and of no others
REPLACED = "replaced"  # what stood in the place, until the new folder stands there
YOUNG = 1.0  # seconds in which a process may not have locked its folder yet


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes its place when the block succeeds.

    Missing parents are made.

    Args:
        target: The place, where an earlier folder is replaced.

    Yields:
        The temporary folder.

    Raises:
        OSError: If the place cannot be written. It names the place.
    """
    missing_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(target) as temporary:
            (temporary / "new").mkdir()
            yield temporary / "new"
            if target.exists():
                os.replace(target, temporary / REPLACED)
            os.replace(temporary / "new", target)
    finally:
        for parent in missing_parents:
            with suppress(OSError):  # the folder stands in it
                parent.rmdir()


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary file that takes its place when the block succeeds.

    Args:
        target: The place, where an earlier file is replaced.

    Yields:
        The path of the temporary file, which is not there yet.

    Raises:
        OSError: If the place cannot be written. It names the place.
    """
    with _temporary_folder(target) as folder:
        yield folder / target.name
        os.replace(folder / target.name, target)


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, locked while this process writes. Its errors name ``target``."""
    prefix = f".{target.name}.{TEMPORARY}."
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > YOUNG:
            with _locked(left) as is_mine:
                if is_mine:  # its process was killed
                    _clear(left, target)
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        with _locked(folder):
            try:
                yield folder
            finally:
                _clear(folder, target)
    except OSError as error:
        if error.strerror and TEMPORARY in str(error.filename or TEMPORARY):
            error.filename = str(target)
        raise


def _clear(folder: Path, target: Path) -> None:
    """Removes a temporary folder. What it has replaced comes back, unless the new one is there."""
    if (folder / REPLACED).exists() and not target.exists():
        os.replace(folder / REPLACED, target)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """A block with a folder's lock; False if another process has it, or locks do not exist."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError:
        locked = False
    try:
        yield locked
    finally:
        os.close(descriptor)
