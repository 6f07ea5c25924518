"""Single tensors of safetensors files: on this machine, or on the Hugging Face Hub.

The header of a file says where each tensor lies, and the Hub sends ranges of bytes.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from .fetch import hub_errors, resolve

ENDING = ".safetensors"
INDEX = "model.safetensors.index.json"
# Bytes, as the Hub's client has it.
LARGEST_HEADER = constants.SAFETENSORS_MAX_HEADER_LENGTH
# After so many seconds without a byte the network is down.
SILENCE = 30.0
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
# What reading a damaged header raises.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: a path on this machine, or a file of a repository."""

    name: str
    repo_id: str | None = None

    def __str__(self) -> str:
        if self.repo_id is None:
            return self.name
        return f"{self.name} of {self.repo_id}"

    def stream(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` to ``end``, as many as there are.

        Raises:
            ValueError: If the Hub does not answer, or sends another range.
        """
        if self.repo_id is None:
            yield np.memmap(self.name, mode="r")[start:end].tobytes()
            return
        url = huggingface_hub.hf_hub_url(self.repo_id, self.name)
        headers = build_hf_headers()
        headers["Range"] = f"bytes={start}-{end - 1}"
        # An answer that is packed has no known length.
        headers["Accept-Encoding"] = "identity"
        stream = get_session().stream("GET", url, headers=headers, timeout=SILENCE)
        with hub_errors(self.repo_id), stream as response:
            hf_raise_for_status(response)
            sent = response.headers.get("Content-Range", "")
            if not sent.startswith(f"bytes {start}-"):
                raise ValueError(
                    f"The Hugging Face Hub sends {sent or 'all'} of {self} for the bytes from "
                    f"{start:,} on: try again later, or choose another source."
                )
            yield from response.iter_bytes()

    def matrices(self) -> list["Tensor"]:
        """Its matrices of floats; raises as :meth:`tensors`."""
        return [each for each in self.tensors() if each.is_matrix]

    def tensors(self) -> list["Tensor"]:
        """The tensors of the header; ValueError if it is none, or is too large."""
        length = b"".join(self.stream(0, 8))
        first = 8 + int.from_bytes(length, "little")
        content = b""
        if 10 <= first <= LARGEST_HEADER:
            content = b"".join(self.stream(8, first))
        try:
            header = json.loads(content)
            metadata = header.pop("__metadata__", {})
            return [Tensor(self, name, about, first, metadata) for name, about in header.items()]
        except _DAMAGE:
            raise ValueError(
                f"{self} is damaged or no safetensors file (headers have up to "
                f"{LARGEST_HEADER:,} bytes): choose another source."
            ) from None


class Tensor:
    """A tensor in a file, by its place.

    Args:
        file: The file.
        name: Its name there.
        about: What the header says of it.
        first: Where in the file the bytes of the first tensor begin.
        metadata: What the header says of the whole file.

    Attributes:
        stored_as: Its dtype in the words of safetensors.
        dtype: Its dtype as MLX's, if it is one of floats.
    """

    def __init__(
        self,
        file: TensorFile,
        name: str,
        about: dict[str, Any],
        first: int,
        metadata: dict[str, str],
    ):
        self.file = file
        self.name = name
        self.metadata = metadata
        self.stored_as = str(about["dtype"])
        self.dtype = _DTYPES.get(self.stored_as, mx.uint8)
        self.shape = tuple(map(int, about["shape"]))
        start, end = map(int, about["data_offsets"])
        self.start = first + start
        self.nbytes = end - start
        if self.is_matrix:
            self.nbytes = self.dtype.size * self.shape[0] * self.shape[1]

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of floats."""
        return self.stored_as in _DTYPES and len(self.shape) == 2

    def array(self, content: Any) -> mx.array:
        """Rows (n, D), from their bytes."""
        words: Any = np.uint16
        if self.dtype == mx.float32:
            words = np.uint32
        raw = np.frombuffer(content, words).reshape(-1, self.shape[1])
        return mx.array(raw).view(self.dtype)

    def rows(self, ids: list[int]) -> mx.array:
        """The rows (n, D) of these numbers; ValueError if the file ends before them."""
        size = self.dtype.size * self.shape[1]
        content = b""
        for i in ids:
            start = self.start + i * size
            content += b"".join(self.file.stream(start, start + size))
        if len(content) != len(ids) * size:
            raise ValueError(f"{self.file} ends before its rows: choose another source.")
        return self.array(content)

    def fetch(self, folder: Path, bar: tqdm) -> np.ndarray:
        """Its bytes, (nbytes,) uint8. Those of a repository are in a file of ``folder``, unnamed.

        Raises:
            ValueError: If they end early, or are too many.
        """
        end = self.start + self.nbytes
        if self.file.repo_id is None:
            bar.update(self.nbytes)
            return np.memmap(self.file.name, mode="r")[self.start : end]
        with TemporaryFile(dir=folder) as file:
            for piece in self.file.stream(self.start, end):
                file.write(piece)
                bar.update(len(piece))
            if file.tell() != self.nbytes:
                raise ValueError(f"{self.file} came with {file.tell():,} bytes: try again.")
            return np.memmap(file, mode="r", shape=(self.nbytes,))


def selected_tensors(source: str, select: Callable[[str], bool]) -> list[Tensor]:
    """The tensors of a folder or a repository whose names are wanted.

    Args:
        source: A folder, a repository, or a file.
        select: Says of a tensor's name whether it is.

    Raises:
        ValueError: If the files cannot be read.
    """
    # An index has the names of tensors and of their files.
    file_names = read_json(source, INDEX).get("weight_map", {})
    holding = {file_name for name, file_name in file_names.items() if select(name)}
    files = tensor_files(source)
    if holding:
        files = [file for file in files if Path(file.name).name in holding]
    selected = []
    for file in files:
        selected += [tensor for tensor in file.tensors() if select(tensor.name)]
    return selected


def read_json(source: str, name: str) -> dict[str, Any]:
    """A JSON file of a folder or a repository; empty if it is not there, or no object.

    Raises:
        ValueError: If the Hub does not answer.
    """
    path = Path(os.path.expanduser(source))
    file = path / name
    if not path.exists():
        # A single file's download would try again for 23 seconds where there is no network.
        file = resolve(source, files=[name]) / name
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def copy_tensors(tensors: list[Tensor], path: Path, bar: tqdm) -> None:
    """Writes tensors into one safetensors file, as they are.

    Those that lie side by side come in one range.

    Args:
        tensors: Of any files.
        path: The file to be written.
        bar: Hears of the bytes.

    Raises:
        ValueError: If a file of them ends early.
    """
    tensors = sorted(tensors, key=lambda tensor: (str(tensor.file), tensor.start))
    header: dict[str, Any] = {"__metadata__": tensors[0].metadata}
    ranges: list[tuple[TensorFile, int, int]] = []
    n_bytes = 0
    for tensor in tensors:
        offsets = [n_bytes, n_bytes + tensor.nbytes]
        n_bytes += tensor.nbytes
        shape = list(tensor.shape)
        header[tensor.name] = {"dtype": tensor.stored_as, "shape": shape, "data_offsets": offsets}
        start = tensor.start
        if ranges and ranges[-1][0] == tensor.file and ranges[-1][2] == start:
            start = ranges.pop()[1]
        ranges.append((tensor.file, start, tensor.start + tensor.nbytes))
    content = json.dumps(header).encode()
    with path.open("wb") as written:
        written.write(len(content).to_bytes(8, "little") + content)
        for file, start, end in ranges:
            before = written.tell()
            for piece in file.stream(start, end):
                written.write(piece)
                bar.update(len(piece))
            if written.tell() - before != end - start:
                raise ValueError(f"{file} ends before its tensors: try again.")


def tensor_files(source: str) -> list[TensorFile]:
    """The safetensors files of a folder or a repository, or a file; ValueError if there are none.

    The last one comes first: a head that is not tied is mostly there.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        files = [TensorFile(str(file)) for file in sorted(path.glob("*" + ENDING))]
    elif path.exists():
        files = [TensorFile(str(path))]
    else:
        files = _repository_files(source)
    if not files:
        raise ValueError(f"{source} holds no safetensors file: choose another source.")
    return [files[-1], *files[:-1]]


def _repository_files(repo_id: str) -> list[TensorFile]:
    """The safetensors files of a repository, those on this machine by their paths."""
    with hub_errors(repo_id):
        siblings = huggingface_hub.HfApi().model_info(repo_id).siblings or []
    files = []
    for name in sorted(file.rfilename for file in siblings):
        if name.endswith(ENDING) and "/" not in name:
            copy = huggingface_hub.try_to_load_from_cache(repo_id, name)
            if isinstance(copy, str):
                files.append(TensorFile(copy))
            else:
                files.append(TensorFile(name, repo_id))
    return files
