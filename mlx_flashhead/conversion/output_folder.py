"""The place of a conversion's result: it replaces nothing else, and the disk has room."""

import os
import shutil
from pathlib import Path

from ..index.files import CONFIG_NAME, FILE_NAME, SETTINGS_NAME, is_written_here, read_settings
from ..publishing.licences import licence_files
from ..publishing.origin import CARD_FILE

FILES_KEY = "folder"  # of the recipe: the names of the files that a conversion has written
LISTED = 3  # names of other files in a message


def files_of(folder: Path) -> list[str]:
    """Names of the files of a conversion, from its folder while it is written."""
    settings = CONFIG_NAME if (folder / CONFIG_NAME).exists() else SETTINGS_NAME
    return sorted({*(file.name for file in folder.iterdir()), FILE_NAME, settings})


def check_place(target: Path, overwrite: bool) -> None:
    """Refuses a target that may not be replaced, or holds what no conversion has written."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder: choose another `mlx_path`.")
    if not overwrite:
        raise ValueError(
            f"{target} exists already: choose another `mlx_path`, or `overwrite` to replace it."
        )
    names = {file.name for file in target.iterdir()}
    if not names:
        return
    if not is_written_here(target):
        raise ValueError(
            f"{target} was not written by mlx_flashhead.convert, so `overwrite` does not replace "
            "it: choose another `mlx_path`, or delete it yourself."
        )
    written = read_settings(target).recipe.get(FILES_KEY, [])
    of_licence = (file.name for file in licence_files(target))
    others = sorted(names - {*written, CARD_FILE, *of_licence})
    if others:
        some = ", ".join(others[:LISTED]) + (", …" if len(others) > LISTED else "")
        raise ValueError(
            f"{target} holds {some}, which no conversion has written: move that away, or "
            "choose another `mlx_path`."
        )


def check_apart(source: Path, target: Path) -> None:
    """Refuses a target that is the model's folder or lies in it, or the other way round."""

    def same(one: Path, other: Path) -> bool:
        return one.exists() and other.exists() and os.path.samefile(one, other)

    if same(source, target):
        raise ValueError(
            f"`mlx_path` {target} is the folder of the model itself: choose another one."
        )
    pairs = ((source, target), (target, source))
    if any(same(parent, outer) for inner, outer in pairs for parent in inner.resolve().parents):
        raise ValueError(
            f"The model's folder {source} and `mlx_path` {target} lie one inside the other: choose "
            "a place beside it."
        )


def check_room(target: Path, nbytes: int) -> None:
    """Refuses a disk without room for about ``nbytes``."""
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ValueError(
            f"{target} needs {nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are "
            "free there: free some space or choose another `mlx_path`."
        )
