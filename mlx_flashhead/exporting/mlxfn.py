"""Exported functions for an older MLX: the same file without the fields that it does not know.

A file holds MLX's version but no version of the format, and a reader ignores the former. Two fields
of FlashHead's files are new: the compile options of a Metal kernel since 0.32.0 (four bytes at the
end of each kernel), and metadata in the head of the file since 0.32.1. MLX 0.31 would read them as
the next field. Both are empty in FlashHead's files and are left out.

Source: mlx/export.cpp and mlx/fast_primitives.h of MLX 0.31.1, 0.32.0 and 0.32.1.
"""

import math
import mmap
from collections.abc import Callable
from pathlib import Path

from ..index.new_folder import new_file

VERSIONS = ("0.31", "0.32")

DTYPE_BYTES = 5  # the type as an int, then its size
STREAM_BYTES = 12  # index, device, index of the device
NO_OPTIONS = b"\0\0\0\0"


def rewrite_for(version: str, path: Path) -> None:
    """Rewrites a file of Metal kernels, in place.

    Args:
        version: "0.31".
        path: A file of Metal kernels alone, written by MLX 0.32.1 or later.

    Raises:
        ValueError: If the file has another form.
    """
    if version != VERSIONS[0]:
        raise ValueError(f"There is no other form of the file for MLX {version!r}.")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        new_file(path) as target,
        target.open("wb") as older,
    ):
        start = 0
        for first, last in _Reader(data).unknown_to_031():
            older.write(data[start:first])
            start = last
        older.write(data[start:])


class _Reader:
    """Walks through a file. Numbers are little-endian, and lists begin with their length."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._at = 0
        self._constants: set[int] = set()

    def unknown_to_031(self) -> list[tuple[int, int]]:
        """The ranges of bytes that MLX 0.31 does not know, in order."""
        self._string()  # MLX's version
        n_functions = self._number(4)
        self._skip(1)  # shapeless
        first = self._at
        if self._string():
            raise ValueError("The exported file holds metadata, which MLX 0.31 cannot read.")
        ranges = [(first, self._at)]
        for _ in range(n_functions):
            self._list(self._string)  # names of the arguments
            self._list(lambda: self._skip(8))  # their ids
            self._list(self._shape_and_dtype)
            self._list(lambda: self._skip(8))  # the results' ids
            self._list(lambda: self._operation(ranges))
        if self._at != len(self._data):
            raise ValueError("The exported file is not of the form that this version of MLX has.")
        return ranges

    def _operation(self, ranges: list[tuple[int, int]]) -> None:
        identity = self._number(8)
        if not self._number(1):  # an argument, or a constant
            if self._number(1) and identity not in self._constants:
                self._constants.add(identity)
                self._skip(self._shape_and_dtype())
            return
        self._list(lambda: self._skip(8))  # ids of its inputs
        self._skip(STREAM_BYTES)
        name = self._string()
        if name != b"CustomKernel":
            raise ValueError(
                f"The exported file holds {name.decode(errors='replace')}, which is not a kernel."
            )
        ranges.append(self._kernel())
        if self._number(8):  # results besides the first
            self._list(lambda: self._skip(8))  # the ids of all
            self._list(self._shape)
            self._list(lambda: self._skip(DTYPE_BYTES))
        else:
            self._shape_and_dtype()

    def _kernel(self) -> tuple[int, int]:
        """Passes a kernel; → the range of its compile options."""
        self._string()  # name
        self._string()  # source
        self._skip(6 * 4)  # grid, threadgroup
        self._list(lambda: self._skip(3))  # which arguments bring their shapes
        self._skip(1)  # whether they must be contiguous
        if self._number(1):  # an initial value
            self._skip(4)
        if self._number(8):
            raise ValueError("The exported file holds a kernel with scalar arguments.")
        self._skip(1 + 4)  # precompiled, shared memory
        first = self._at
        self._skip(4)
        if self._data[first : self._at] != NO_OPTIONS:
            raise ValueError("The exported file holds compile options, which MLX 0.31 lacks.")
        return first, self._at

    def _shape_and_dtype(self) -> int:
        """→ the bytes of such an array."""
        shape = self._shape()
        self._skip(DTYPE_BYTES)
        return math.prod(shape) * self._data[self._at - 1]

    def _shape(self) -> list[int]:
        return [self._number(4) for _ in range(self._number(8))]

    def _list(self, item: Callable[[], object]) -> None:
        for _ in range(self._number(8)):
            item()

    def _string(self) -> bytes:
        length = self._number(8)
        self._skip(length)
        return self._data[self._at - length : self._at]

    def _number(self, size: int) -> int:
        self._skip(size)
        return int.from_bytes(self._data[self._at - size : self._at], "little")

    def _skip(self, size: int) -> None:
        if not 0 <= size <= len(self._data) - self._at:
            raise ValueError("The exported file is not of the form that this version of MLX has.")
        self._at += size
