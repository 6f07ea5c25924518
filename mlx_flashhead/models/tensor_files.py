"""Single tensors of safetensors files: on this machine, or fetched from the Hugging Face Hub.

The header of a file says where each tensor lies, and the Hub sends ranges of bytes. What it sends
is not taken on trust: another range, or more than was asked for, is refused and not kept.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
from huggingface_hub import constants, errors
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from .fetch import BadAnswerError, hub_errors, hub_is_reachable, small_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ENDING = ".safetensors"
LARGEST_HEADER = constants.SAFETENSORS_MAX_HEADER_LENGTH  # bytes, as the Hub's client has it
SILENCE = 30.0  # seconds without a byte, after which the network is down
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}
# What reading a damaged header raises.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: a path on this machine, or a file of a repository."""

    name: str
    repo_id: str | None = None

    def __str__(self) -> str:
        return f"{self.name} of {self.repo_id}" if self.repo_id else self.name

    def stream(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` to ``end``, as many as there are.

        Raises:
            BadAnswerError: If the Hub sends another range, or more than this one.
            ValueError: If it does not answer, or the connection is lost.
        """
        if self.repo_id is None:
            with open(self.name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(min(start, size))
                yield file.read(max(0, min(end, size) - start))
            return
        with hub_errors(self.repo_id):
            yield from self._fetched(start, end)

    def _fetched(self, start: int, end: int) -> Iterator[bytes]:
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled("offline")
        url = huggingface_hub.hf_hub_url(self.repo_id or "", self.name)
        headers = build_hf_headers() | {
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",  # an answer that is packed has no known length
        }
        with get_session().stream("GET", url, headers=headers, timeout=SILENCE) as response:
            hf_raise_for_status(response)
            sent = response.headers.get("Content-Range", "")
            if response.status_code != 206 or not sent.startswith(f"bytes {start}-"):
                raise BadAnswerError(
                    f"The Hugging Face Hub sends {sent or 'all'} of {self} for the bytes from "
                    f"{start:,} on: try again later, or choose another source."
                )
            n_left = end - start
            for piece in response.iter_bytes():  # as they come: a lost connection loses none
                n_left -= len(piece)
                if n_left < 0:
                    raise BadAnswerError(
                        f"The Hugging Face Hub sends more of {self} than it was asked for: try "
                        "again later, or choose another source."
                    )
                yield piece

    def tensors(self) -> dict[str, "Tensor"]:
        """The tensors of the header by name; ValueError if it is none, or is too large."""
        first = 8 + int.from_bytes(b"".join(self.stream(0, 8)), "little")
        content = b"".join(self.stream(8, first)) if 10 <= first <= LARGEST_HEADER else b""
        tensors = {}
        try:
            header = json.loads(content)
            header.pop("__metadata__", None)
            for name, about in header.items():
                start, end = (first + int(offset) for offset in about["data_offsets"])
                shape = tuple(map(int, about["shape"]))
                tensors[name] = Tensor(self, name, str(about["dtype"]), shape, start, end)
        except _DAMAGE:
            kind = f"damaged or no safetensors file (headers have up to {LARGEST_HEADER:,} bytes)"
            raise ValueError(f"{self} is {kind}: choose another source.") from None
        return tensors


@dataclass(frozen=True)
class Tensor:
    """A matrix in a file, by its place."""

    file: TensorFile
    name: str
    dtype: str  # in the format's words, such as "BF16"
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return self.end - self.start

    @property
    def readable(self) -> bool:
        """Whether its dtype is known and its place holds its shape."""
        size = _DTYPES[self.dtype].size if self.dtype in _DTYPES else 0
        return self.nbytes > 0 and self.nbytes == size * np.prod(self.shape, dtype=object)

    def array(self, content: Any, n_rows: int) -> mx.array:
        """Rows (n_rows, …) of its dtype, from their bytes."""
        raw = np.frombuffer(content, np.uint32 if self.dtype in ("F32", "U32") else np.uint16)
        return mx.array(raw.reshape(n_rows, *self.shape[1:])).view(_DTYPES[self.dtype])

    def rows(self, ids: list[int]) -> mx.array:
        """The rows (n, …) of these numbers from the file; ValueError if it ends before them."""
        size = self.nbytes // self.shape[0]
        starts = (self.start + i * size for i in ids)
        content = b"".join(piece for at in starts for piece in self.file.stream(at, at + size))
        if len(content) < len(ids) * size:
            raise ValueError(f"{self.file} ends before its rows: choose another source.")
        return self.array(content, len(ids))

    def fetch(self, folder: Path, key: str, bar: tqdm) -> np.memmap:
        """Its bytes, (nbytes,) uint8.

        Those of a repository are fetched into a file of ``folder``, whose name begins with ``key``.
        A file that has ended early is continued by the next call. One of a bad answer is deleted.

        Raises:
            BadAnswerError: If the Hub sends another range, or more than this one.
            ValueError: If the bytes end early.
        """
        if self.file.repo_id is None:
            bar.update(self.nbytes)
            return np.memmap(self.file.name, mode="r", offset=self.start, shape=(self.nbytes,))
        part = folder / self._part_name(key, self.file.repo_id)
        try:
            n_done = self._fill(part, bar)
        except BadAnswerError:
            part.unlink(missing_ok=True)
            raise
        if n_done < self.nbytes:
            raise ValueError(f"{self.file} ended early: start again, which continues.")
        return np.memmap(part, mode="r", shape=(self.nbytes,))

    def _part_name(self, key: str, repo_id: str) -> str:
        """The name of the file of its bytes, another one for each version of the repository."""
        with hub_errors(repo_id):
            url = huggingface_hub.hf_hub_url(repo_id, self.file.name)
            version = huggingface_hub.get_hf_file_metadata(url).etag
        about = f"{self.file}, {self.name}, {version}"
        return f".{key}.{hashlib.sha256(about.encode()).hexdigest()[:16]}.part"

    def _fill(self, part: Path, bar: tqdm) -> int:
        """Appends to a file what it lacks. Returns the number of bytes that are there."""
        with part.open("ab") as file:
            if file.tell() > self.nbytes:  # it is of no use
                file.truncate(0)
                file.seek(0)
            n_done = file.tell()
            bar.update(n_done)
            if n_done < self.nbytes:
                for piece in self.file.stream(self.start + n_done, self.end):
                    file.write(piece)
                    bar.update(len(piece))
            return file.tell()


def tensor_files(source: str) -> Iterator[TensorFile]:
    """The safetensors files of a source, those of a head first; ValueError if there are none."""
    path = Path(os.path.expanduser(source))
    if path.exists():
        files = sorted(path.glob("*" + ENDING)) if path.is_dir() else [path]
        yield from (TensorFile(str(file)) for file in files)
        if not files:
            raise ValueError(f"{path} holds no safetensors file: choose another source.")
        return
    with hub_errors(source):
        for name in _names(source):
            copy = huggingface_hub.try_to_load_from_cache(source, name)
            if not isinstance(copy, str) and not hub_is_reachable():
                raise errors.LocalEntryNotFoundError(f"{name} of {source} is not in the cache")
            yield TensorFile(copy) if isinstance(copy, str) else TensorFile(name, source)


def _names(repo_id: str) -> list[str]:
    """The names of a repository's safetensors files."""
    try:
        index = small_file(repo_id, INDEX)
    except errors.EntryNotFoundError:
        return [SINGLE]
    try:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(places, key=lambda name: not ("embed" in name or "head" in name))
        return list(dict.fromkeys(str(places[name]) for name in names))
    except _DAMAGE:
        raise ValueError(f"{INDEX} of {repo_id} is damaged: choose another source.") from None
