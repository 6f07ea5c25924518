"""The folder that a conversion writes: what it may replace, and where it may be."""

import os
import shutil
from pathlib import Path

from ..common.tables import megabytes
from ..index import files
from ..publishing.card import CARD_FILE
from ..publishing.licence import licence_files

FILES_KEY = "folder"  # of the recipe: the names of the files that a conversion has written


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses a target that may not be replaced.

    Args:
        target: The folder to write.
        overwrite: Whether an earlier conversion may be replaced.

    Raises:
        ValueError: If it is there and may not be replaced, or if it holds files that no conversion
            has written.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder: choose another `mlx_path`.")
    if not overwrite:
        raise ValueError(
            f"{target} exists already: choose another `mlx_path`, or `overwrite` to replace it."
        )
    names = {file.name for file in target.iterdir()}
    recipe = files.stored_recipe(target)
    if names and recipe is None:
        raise ValueError(
            f"{target} was not written by mlx_flashhead.convert, so `overwrite` does not replace "
            "it: choose another `mlx_path`, or delete it yourself."
        )
    written = {name for name in (recipe or {}).get(FILES_KEY) or [] if isinstance(name, str)}
    licences = {file.name for file in licence_files(target)}
    others = sorted(names - written - licences - {CARD_FILE})
    if others:
        raise ValueError(
            f"{target} holds {', '.join(others[:3])}, which no conversion has written: move that "
            "away, or choose another `mlx_path`."
        )


def check_apart(source: Path, target: Path) -> None:
    """Refuses a target that is the model's folder or lies in it.

    `check_target` refuses one around it.

    Args:
        source: The model's folder.
        target: The folder to write.

    Raises:
        ValueError: If it is or lies there.
    """
    folders = [path for path in (target, *target.resolve().parents) if path.exists()]
    if any(os.path.samefile(folder, source) for folder in folders):
        raise ValueError(
            f"`mlx_path` {target} is the folder of the model itself, or lies in it: choose another "
            "one."
        )


def check_space(target: Path, folder: Path, nbytes: int, named: str = "mlx_path") -> None:
    """Checks that a result fits on the disk.

    Args:
        target: The folder to write, for the message.
        folder: A folder on the same disk.
        nbytes: The size of the result.
        named: The parameter that chooses the target.

    Raises:
        ValueError: If it does not fit.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ValueError(
            f"{target} needs {megabytes(nbytes)}, but only {megabytes(free)} are free there: "
            f"free some space or choose another `{named}`."
        )
