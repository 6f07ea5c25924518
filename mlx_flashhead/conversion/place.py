"""The place of a conversion's result: it replaces nothing else, and the disk has room."""

import shutil
from pathlib import Path

from ..index.files import is_written_here

GIGABYTE = 1e9


def check_place(target: Path, overwrite: bool) -> None:
    """Checks that the target may be written.

    Raises:
        ValueError: If it exists and may not be replaced.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder: choose another --mlx-path.")
    if not overwrite:
        raise ValueError(
            f"{target} exists already: choose another --mlx-path, or pass --overwrite to replace "
            "it."
        )
    if any(target.iterdir()) and not is_written_here(target):
        raise ValueError(
            f"{target} was not written by mlx_flashhead.convert, so --overwrite does not replace "
            "it: choose another --mlx-path, or delete it yourself."
        )


def check_apart(source: Path, target: Path) -> None:
    """Checks that the model's folder and the target are apart.

    Raises:
        ValueError: If the folders are the same, or one lies in the other.
    """
    one, other = source.resolve(), target.resolve()
    if one == other:
        raise ValueError(
            f"--mlx-path {target} is the folder of the model itself: choose another one."
        )
    if one in other.parents or other in one.parents:
        raise ValueError(
            f"The model's folder {source} and --mlx-path {target} lie one inside the other: choose "
            "a place beside it."
        )


def check_room(target: Path, nbytes: int) -> None:
    """Checks that the disk has room.

    Args:
        target: The place to write.
        nbytes: Approximate size.

    Raises:
        ValueError: If there is less room, with both figures.
    """
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ValueError(
            f"{target} needs {nbytes / GIGABYTE:.2f} GB, but only {free / GIGABYTE:.2f} GB are "
            "free there: free some space or choose another --mlx-path."
        )
