"""A folder or a file that is written completely or not at all.

It is written under a temporary name beside its place and renamed at the end. A failure or an
interruption leaves the disk as it was. The next process that writes to the same place removes the
remains of killed ones.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Parts of the names of temporary folders, which nobody else's folders have.
NEW, OLD = "mlx_flashhead-new", "mlx_flashhead-old"
YOUNG = 1.0  # seconds in which a process may not have locked its folder yet


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block succeeds.

    Args:
        target: Place of the folder; missing parents are made, and a folder there is replaced.

    Yields:
        The folder to write into.

    Raises:
        ValueError: If the place cannot be written.
        OSError: If writing into the folder fails, naming ``target``.
    """
    missing_parents = [parent for parent in target.parents if not parent.exists()]
    folder, lock = None, None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _tidy(target)
            folder = Path(tempfile.mkdtemp(prefix=_prefix(target, NEW), dir=target.parent))
            lock = _lock(folder)
            folder.chmod(0o755)  # mkdtemp's are private
        except OSError as error:
            raise ValueError(
                f"{target} cannot be written ({error.strerror}): choose another place."
            ) from None
        try:
            yield folder
        except OSError as error:
            within = error.filename is None or Path(error.filename).is_relative_to(folder)
            if error.strerror and within:
                error.filename = str(target)
            raise
        if target.exists():
            _exchange(folder, target)
        else:
            os.replace(folder, target)
    finally:
        if lock is not None:
            os.close(lock)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if not target.exists():
            for parent in missing_parents:
                with suppress(OSError):
                    parent.rmdir()


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary path that becomes the file ``target`` when the block succeeds.

    Args:
        target: Place of the file; an existing file is replaced.

    Yields:
        The path to write to.

    Raises:
        OSError: If ``target`` cannot be written.
    """
    lock = None
    try:
        _tidy(target)
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target, NEW), dir=target.parent))
        lock = _lock(folder)
    except OSError as error:
        error.filename = str(target)  # instead of the temporary folder's
        raise
    try:
        yield folder / target.name
        os.replace(folder / target.name, target)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(target: Path, kind: str) -> str:
    return f".{target.name}.{kind}."


def _lock(folder: Path) -> int | None:
    """Marks a folder as being written, as long as this process lives.

    Returns:
        The descriptor that holds the lock; None if another process holds it or locks do not exist.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _tidy(target: Path) -> None:
    """Removes the remains of killed processes, and restores a replaced folder if it is missing."""
    prefixes = (_prefix(target, NEW), _prefix(target, OLD))
    for folder in [f for f in target.parent.iterdir() if f.name.startswith(prefixes)]:
        if not folder.is_dir() or time.time() - folder.stat().st_mtime < YOUNG:
            continue
        lock = _lock(folder)
        if lock is None:
            continue
        replaced = folder / target.name
        if folder.name.startswith(_prefix(target, OLD)) and not target.exists():
            with suppress(FileNotFoundError):
                os.replace(replaced, target)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _exchange(folder: Path, target: Path) -> None:
    """Puts ``folder`` in the place of ``target``, then deletes the old folder."""
    aside = Path(tempfile.mkdtemp(prefix=_prefix(target, OLD), dir=target.parent))
    replaced = aside / target.name
    try:
        os.replace(target, replaced)
        os.replace(folder, target)
    except BaseException:
        if replaced.exists() and not target.exists():
            os.replace(replaced, target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside)
