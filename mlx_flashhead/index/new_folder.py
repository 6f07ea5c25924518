"""A folder or a file that is written completely or not at all.

It is written under a temporary name beside its place and renamed at the end. A failure or an
interruption leaves the disk as it was.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block succeeds.

    Args:
        target: Place of the folder; missing parents are made.
        overwrite: Replace an existing model.

    Yields:
        The folder to write into.

    Raises:
        ValueError: If ``target`` exists and may not be replaced, or cannot be written.
    """
    _check_place(target, overwrite)
    missing_parents = [parent for parent in target.parents if not parent.exists()]
    folder = None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            folder.chmod(0o755)  # mkdtemp's are private
        except OSError as error:
            raise ValueError(
                f"{target} cannot be written ({error.filename}: {error.strerror}): choose another "
                "--mlx-path."
            ) from None
        yield folder
        if target.exists():
            _exchange(folder, target)
        else:
            os.replace(folder, target)
    finally:
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
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        error.filename = str(target)  # instead of the temporary folder's
        raise
    try:
        yield folder / target.name
        os.replace(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_place(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder: choose another --mlx-path.")
    if not overwrite:
        raise ValueError(
            f"{target} exists already: choose another --mlx-path, or pass --overwrite to replace "
            "it."
        )
    if any(target.iterdir()) and not (target / "config.json").exists():
        raise ValueError(
            f"{target} is not a model's folder, so --overwrite does not delete it: choose another "
            "--mlx-path."
        )


def _exchange(folder: Path, target: Path) -> None:
    """Puts ``folder`` in the place of ``target``, then deletes the old folder."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
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
