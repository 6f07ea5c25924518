"""A folder or a file that is written completely or not at all.

It is written in a temporary folder beside its place, and renamed at the end. A process that is
killed leaves that folder.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from .interrupts import cleanup

# A part of the names of temporary folders, and of no others.
TEMPORARY = "mlx_flashhead-new"


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
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(target) as temporary:
        new = temporary / "new"
        replaced = temporary / "replaced"
        new.mkdir()
        yield new

        def put_back() -> None:
            if replaced.exists() and not target.exists():
                os.replace(replaced, target)

        with cleanup(put_back):
            if target.exists():
                os.replace(target, replaced)
            os.replace(new, target)


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
    """A folder beside ``target``. Its errors name ``target``."""
    prefix = f".{target.name}.{TEMPORARY}."
    try:
        new = TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True)
        with cleanup(new.cleanup):
            yield Path(new.name)
    except OSError as error:
        if error.strerror and TEMPORARY in str(error.filename or TEMPORARY):
            error.filename = str(target)
        raise
