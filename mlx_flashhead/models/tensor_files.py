"""Single tensors of safetensors files, on this machine or on the Hub, read by ranges of bytes.

A safetensors file says in its header where each tensor lies, so one tensor of a repository is
fetched without the rest of the model.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from .fetch import hub_sentence

INDEX, SINGLE, ENDING = "model.safetensors.index.json", "model.safetensors", ".safetensors"
LARGEST_HEADER = 100_000_000  # bytes, as the format's own library has it
PIECE = 1 << 20  # bytes that are read at once
SILENCE = 30.0  # seconds without a byte, after which the network is down
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: of a repository, or on this machine."""

    name: str
    repo_id: str | None = None
    path: Path | None = None

    def __str__(self) -> str:
        return f"{self.name} of {self.repo_id}" if self.repo_id else self.name

    def stream(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` to ``end`` in pieces; ValueError if they cannot be had."""
        if self.path is not None:
            with self.path.open("rb") as file:
                file.seek(start)
                while start < end and (piece := file.read(min(PIECE, end - start))):
                    start += len(piece)
                    yield piece
            return
        assert self.repo_id is not None
        with _hub_errors(self.repo_id):
            if constants.HF_HUB_OFFLINE:
                raise OfflineModeIsEnabled("offline")
            url = huggingface_hub.hf_hub_url(self.repo_id, self.name)
            headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
            with get_session().stream("GET", url, headers=headers, timeout=SILENCE) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    raise ValueError("the server sends whole files alone")
                yield from response.iter_bytes()  # as they come: a lost connection loses none

    def tensors(self) -> dict[str, "Tensor"]:
        """The tensors of the header; ValueError if it is not one."""
        try:
            size = int.from_bytes(b"".join(self.stream(0, 8)), "little")
            if not 2 <= size <= LARGEST_HEADER:
                raise TypeError
            header = json.loads(b"".join(self.stream(8, 8 + size)))
            header.pop("__metadata__", None)
            return {name: _tensor(self, name, 8 + size, about) for name, about in header.items()}
        except (
            json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError,
            RecursionError, OverflowError,
        ):  # fmt: skip
            raise ValueError(
                f"{self} is damaged or no safetensors file: choose another source."
            ) from None

    def version(self) -> str:
        """What changes with the file's content."""
        if self.repo_id is None:
            return str(self.path)
        with _hub_errors(self.repo_id):
            url = huggingface_hub.hf_hub_url(self.repo_id, self.name)
            return str(huggingface_hub.get_hf_file_metadata(url).etag)


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
        return self.end - self.start

    @property
    def readable(self) -> bool:
        """Whether its dtype is known and its place holds its shape."""
        size = _DTYPES[self.dtype].size if self.dtype in _DTYPES else 0
        return self.nbytes > 0 and self.nbytes == size * np.prod(self.shape, dtype=object)

    def array(self, content: Any, n_rows: int) -> mx.array:
        """The bytes of some rows as an array."""
        raw = np.frombuffer(content, np.uint32 if self.dtype in ("F32", "U32") else np.uint16)
        return mx.array(raw.reshape(n_rows, *self.shape[1:])).view(_DTYPES[self.dtype])

    def rows(self, ids: list[int]) -> mx.array:
        """Some rows, each read by itself."""
        size = self.nbytes // self.shape[0]
        starts = (self.start + i * size for i in ids)
        content = b"".join(b"".join(self.file.stream(at, at + size)) for at in starts)
        return self.array(content, len(ids))

    def fetch(self, folder: Path, key: str, bar: tqdm) -> np.memmap:
        """Its bytes, fetched into a file of ``folder`` if they are a repository's.

        A fetch that has ended early continues there. ValueError if it ends early again.
        """
        if self.file.path is not None:
            bar.update(self.nbytes)
            return np.memmap(self.file.path, mode="r", offset=self.start, shape=(self.nbytes,))
        about = f"{self.file}, {self.name}, {self.file.version()}"
        part = folder / f".{key}.{hashlib.sha256(about.encode()).hexdigest()[:16]}.part"
        with part.open("ab") as file:
            done = file.tell()
            bar.update(min(done, self.nbytes))
            if done < self.nbytes:
                for piece in self.file.stream(self.start + done, self.end):
                    file.write(piece)
                    bar.update(len(piece))
            done = file.tell()
        if done != self.nbytes:
            raise ValueError(f"{self.file} ended early: start again, which continues.")
        return np.memmap(part, mode="r", shape=(self.nbytes,))


def _tensor(file: TensorFile, name: str, first: int, about: dict[str, Any]) -> Tensor:
    start, end = (first + int(offset) for offset in about["data_offsets"])
    return Tensor(file, name, str(about["dtype"]), tuple(map(int, about["shape"])), start, end)


def files_of(source: str) -> Iterator[TensorFile]:
    """The safetensors files of a file, a folder or a repository, those of a head first.

    Raises:
        ValueError: If there are none.
    """
    path = Path(source)
    with suppress(RuntimeError):  # of a user who does not exist
        path = path.expanduser()
    if path.is_file():
        yield TensorFile(str(path), path=path)
        return
    if path.is_dir():
        files = sorted(path.glob("*" + ENDING))
        yield from (TensorFile(str(file), path=file) for file in files)
        if not files:
            raise ValueError(f"{path} holds no safetensors file: choose another source.")
        return
    with _hub_errors(source):
        for name in _names(source):
            copy = huggingface_hub.try_to_load_from_cache(source, name)
            is_here = isinstance(copy, str)
            yield TensorFile(name, path=Path(str(copy))) if is_here else TensorFile(name, source)


def _names(repo_id: str) -> list[str]:
    """The files of a repository's weights, those that hold a head first."""
    try:
        index = huggingface_hub.hf_hub_download(repo_id, INDEX)
    except EntryNotFoundError as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        if offline and not huggingface_hub.try_to_load_from_cache(repo_id, SINGLE):
            raise
        return [SINGLE]
    try:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(places, key=lambda name: not ("embed" in name or "head" in name))
        return list(dict.fromkeys(str(places[name]) for name in names))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{INDEX} of {repo_id} is damaged: choose another source.") from None


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """A block in which errors of the Hub's client become a ValueError of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and not isinstance(error, EntryNotFoundError):  # of the disk
            raise
        raise ValueError(hub_sentence(repo_id, None, error)) from None
    except Exception as error:  # the client raises many unrelated types
        if type(error) is ValueError:
            raise
        raise ValueError(hub_sentence(repo_id, None, error)) from None
