"""Where a model's FlashHead comes from: the user, the model's folder, or the cache."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..head.matrix import Matrix
from ..index import files
from ..index.files import FILE_NAME, SETTINGS_NAME, read_index
from ..index.flash_head_index import FlashHeadIndex
from ..models.fetch import resolve
from .cached import entries, folder_of
from .head_options import HeadOptions


@dataclass(frozen=True)
class StoredHead:
    """A FlashHead, and its folder or repository, for messages."""

    index: FlashHeadIndex
    source: str


def explicit_head(options: HeadOptions, folder: Path | None = None) -> StoredHead | None:
    """The FlashHead that the user names, else the one in the model's folder, if there is one.

    Args:
        options: How a model gets its FlashHead.
        folder: The model's folder; None if that does not count.

    Raises:
        ValueError: If it is not there, damaged or of another version.
    """
    if options.flash_head is not None:
        name = str(options.flash_head)
        named = resolve(name, files=[FILE_NAME, SETTINGS_NAME, files.CONFIG_NAME])
        if files.stored_recipe(named) is None:
            raise ValueError(
                f"{name} holds no FlashHead: name another one, or none to have one built."
            )
        return StoredHead(read_index(named), name)
    if folder is not None and files.has_flash_head(folder):
        return StoredHead(read_index(folder), str(folder))
    if folder is not None and files.stored_recipe(folder) is not None:
        options.say(f"{folder} names a FlashHead, but {FILE_NAME} is missing: another one is used.")
    return None


def find(rows: Matrix, say: Callable[[str], None]) -> StoredHead | None:
    """Finds the cached FlashHead that was built for these rows, else one for near rows.

    Args:
        rows: The head's rows (V, D) in token order.
        say: Takes a sentence if the FlashHead is damaged, which counts as missing.
    """
    folder = folder_of(rows)
    try:
        if folder.is_dir():
            return StoredHead(read_index(folder), str(folder))
    except (ValueError, OSError) as error:
        say(f"{str(error).partition(': ')[0]}: it is built again.")
    for entry in entries():
        if entry.config is None or not entry.is_current:
            continue
        # It may be damaged, or of other rows.
        with suppress(ValueError, OSError):
            index = read_index(entry.path)
            index.check_fit(rows, str(entry.path))
            return StoredHead(index, str(entry.path))
    return None
