"""Finished stages of a conversion, kept on disk so that one which was killed can continue.

They lie in a folder ``.<name>.stages`` beside the target, and only of conversions that ask for it.
Each stage is one file, which is there completely or not at all and carries a fingerprint of all
that determines it: whatever was made from something else is not used.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

CALIBRATION, CLUSTERS = "calibration", "clusters"
# What of a model's folder decides how texts are read and computed on, besides the weights.
SETTINGS_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")


class Stages:
    """The stages of one conversion.

    Args:
        folder: Where they are kept; None: nowhere.
        say: Told in a sentence what is continued and what is not.
    """

    def __init__(self, folder: Path | None = None, say: Callable[[str], None] = lambda _: None):
        self.folder = folder
        self.say = say

    def run(
        self,
        name: str,
        fingerprint: Callable[[], str],
        compute: Callable[[], dict[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """The stage's arrays: kept ones if they fit, else computed and kept.

        Args:
            name: ``CALIBRATION`` or ``CLUSTERS``.
            fingerprint: Called only if stages are kept.
            compute: Called only if no kept stage fits.

        Raises:
            OSError: If the stage cannot be written.
        """
        if self.folder is None:
            return compute()
        file, expected = self._file(name), fingerprint()
        if file.exists():
            with suppress(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
                with np.load(file) as kept:
                    arrays = dict(kept)
                if arrays.pop("fingerprint").item() == expected:
                    self.say(f"Continuing with the {name} of an earlier run")
                    return arrays
            self.say(f"The {name} of an earlier run had another model or settings: made anew")
        arrays = compute()
        self.folder.mkdir(exist_ok=True)
        unfinished = self._unfinished(name)
        with unfinished.open("wb") as sink:
            np.savez(sink, fingerprint=np.array(expected), **arrays)
            sink.flush()
            os.fsync(sink.fileno())
        unfinished.replace(file)
        return arrays

    def kept(self) -> list[str]:
        """The stages that an earlier run has left."""
        names = (CALIBRATION, CLUSTERS)
        return [n for n in names if self.folder is not None and self._file(n).exists()]

    def delete(self) -> None:
        """Deletes the stages, and their folder unless it holds something else."""
        if self.folder is None or not self.folder.is_dir():
            return
        for name in (CALIBRATION, CLUSTERS):
            self._file(name).unlink(missing_ok=True)
            self._unfinished(name).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def _unfinished(self, name: str) -> Path:
        return self.folder / f"{name}.unfinished"


def stages_folder(target: Path) -> Path:
    """Where the stages of a conversion to ``target`` are kept."""
    return target.parent / f".{target.name}.stages"


def fingerprint(*parts) -> str:
    """SHA-256 (hex) of anything that JSON can hold, in order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def array_fingerprint(array: mx.array | np.ndarray) -> str:
    """SHA-256 (hex) of an array's dtype, shape and values."""
    digest = hashlib.sha256(f"{array.dtype}:{tuple(array.shape)};".encode())
    if isinstance(array, mx.array):  # numpy has no bfloat16
        array = np.array(array.reshape(-1).view(mx.uint8))
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def model_fingerprint(model: nn.Module, source: Path) -> str:
    """SHA-256 (hex) of a model's weights, its settings and its tokenizer's files in ``source``."""
    weights = [(name, array_fingerprint(a)) for name, a in tree_flatten(model.parameters())]
    files = sorted(file for pattern in SETTINGS_FILES for file in source.glob(pattern))
    contents = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return fingerprint(sorted(weights), contents)
