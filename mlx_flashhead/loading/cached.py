"""What is kept on this machine: FlashHeads, finer heads, MTP layers, speeds, and unfinished builds.

A cache entry is a folder, or a file of a finer head or of a model's MTP layer. Its name is the
fingerprint of a head's rows and a number, so a moved or renamed model finds its own. Nothing of
another name is touched.
"""

import hashlib
import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import mlx.core as mx

from ..common.new_folder import new_folder
from ..head.matrix import Matrix
from ..index import files
from ..index.files import FILE_NAME, SETTINGS_NAME
from ..index.flash_head_config import FlashHeadConfig
from ..index.flash_head_index import FlashHeadIndex
from ..models.fetch import DRAFTERS, FINE_HEADS, HOME_VARIABLE, SPEEDS, home
from ..models.tensor_files import ENDING

# A new version builds all FlashHeads again.
RECIPE = 1
# A name has so many of the 64 characters of a fingerprint.
_NAME_LENGTH = 24
INDEX_FOLDER = "flash_heads"
# The folder of what builds have computed that were left.
UNFINISHED = "unfinished"
INDEX_FILES = (FILE_NAME, SETTINGS_NAME)
# The names of cache entries, by folder. Nothing else is touched.
_NAMES = {
    INDEX_FOLDER: re.compile(r"[0-9a-f]{24}-\d+"),
    UNFINISHED: re.compile(r"[0-9a-f]{24}-\d+"),
    FINE_HEADS: re.compile(r"[0-9a-f]{24}-\d+\.safetensors"),
    DRAFTERS: re.compile(r"[0-9a-f]{24}-\d+\.safetensors"),
    SPEEDS: re.compile(r"[0-9a-f]{24}\.json"),
}


@dataclass(frozen=True)
class Entry:
    """A cached FlashHead, a finer head, or a model's MTP layer.

    Attributes:
        path: Its folder or its file.
        model: The model's name.
        config: A FlashHead's settings; None for the others, and for a damaged FlashHead.
    """

    path: Path
    model: str
    config: FlashHeadConfig | None = None

    @property
    def is_current(self) -> bool:
        """Whether this version of the package builds FlashHeads as it was built."""
        return self.path.name.endswith(f"-{RECIPE}")

    @property
    def is_fine_head(self) -> bool:
        """Whether this is a finer head."""
        return self.path.parent.name == FINE_HEADS

    @property
    def is_drafter(self) -> bool:
        """Whether this is a model's MTP layer."""
        return self.path.parent.name == DRAFTERS

    @property
    def nbytes(self) -> int:
        """Its size on the disk, or 0 if it cannot be read."""
        with suppress(OSError):
            parts = [self.path]
            if self.path.is_dir():
                parts = [*self.path.iterdir()]
            return sum(part.stat().st_size for part in parts if part.is_file())
        return 0

    def remove(self) -> bool:
        """Deletes it with its speeds. Where it is a link, only the link is deleted.

        Returns:
            Whether its folder is gone, which it is not if it holds other files.
        """
        files_of_it = [self.path / name for name in INDEX_FILES]
        if self.path.suffix == ENDING or self.path.is_symlink():
            files_of_it = [self.path]
        for file in files_of_it:
            file.unlink(missing_ok=True)
        if self.config is not None:
            speeds_of(self.config).unlink(missing_ok=True)
        # It may hold other files, or be gone.
        with suppress(OSError):
            self.path.rmdir()
        return not self.path.exists()


def entries() -> list[Entry]:
    """All cached FlashHeads, finer heads and MTP layers, the latest first."""
    found = []
    for path in _cached(INDEX_FOLDER):
        if any((path / name).exists() for name in INDEX_FILES):
            entry = Entry(path, "damaged")
            with suppress(ValueError, OSError):
                config = files.read_settings(path)
                entry = Entry(path, str(config.recipe.get("model", "unknown")), config)
            found.append(entry)
    for path in [*_cached(FINE_HEADS), *_cached(DRAFTERS)]:
        metadata: dict[str, str] = {}
        with suppress(RuntimeError, ValueError, OSError):
            loaded: Any = mx.load(str(path), return_metadata=True)
            metadata = loaded[1]
        found.append(Entry(path, metadata.get("model", "damaged")))
    return sorted(found, key=lambda entry: entry.path.stat().st_mtime, reverse=True)


def remove_rest() -> list[Path]:
    """Deletes speeds, and what unfinished builds have computed.

    Returns:
        The files in the cache's folders that are not its own.
    """
    for file in _cached(SPEEDS):
        file.unlink(missing_ok=True)
    for path in _cached(UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
    others = []
    for folder, pattern in _NAMES.items():
        others += [path for path in (home() / folder).glob("*") if not pattern.fullmatch(path.name)]
    return sorted(others)


def _cached(folder: str) -> list[Path]:
    """The paths in a folder of the cache that have the names of its entries."""
    pattern = _NAMES[folder]
    return [path for path in (home() / folder).glob("*") if pattern.fullmatch(path.name)]


def folder_of(rows: Matrix) -> Path:
    """The folder of these rows' FlashHead, which may not exist yet."""
    return home() / INDEX_FOLDER / f"{rows.fingerprint[:_NAME_LENGTH]}-{RECIPE}"


def unfinished_of(folder: Path) -> Path:
    """The folder with what an unfinished build of this FlashHead has computed."""
    return home() / UNFINISHED / folder.name


def speeds_of(config: FlashHeadConfig) -> Path:
    """The file with the speeds that this FlashHead was measured to have.

    Another FlashHead of the same rows has other clusters, and a file of its own.
    """
    settings = json.dumps(config.to_dict(), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return home() / SPEEDS / f"{digest[:_NAME_LENGTH]}.json"


def check_writable() -> None:
    """Checks that a FlashHead could be kept in the cache.

    Raises:
        ValueError: If it could not.
    """
    folder = home() / INDEX_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{home()} cannot be written ({error.strerror or error}): set {HOME_VARIABLE} to "
            "another place."
        ) from error


def keep(index: FlashHeadIndex, folder: Path) -> None:
    """Keeps a FlashHead in the cache, and forgets the speeds of the one that was in its place.

    Args:
        index: The FlashHead.
        folder: Its folder, by `folder_of`.

    Raises:
        OSError: If the folder cannot be written.
    """
    replaced = [index.config]
    # There may be none, or a damaged one.
    with suppress(ValueError, OSError):
        replaced.append(files.read_settings(folder))
    with new_folder(folder) as written:
        files.write_companion(written, index)
    for config in replaced:
        speeds_of(config).unlink(missing_ok=True)
