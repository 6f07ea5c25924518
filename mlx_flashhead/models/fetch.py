"""Fetches models from the Hugging Face Hub: whole folders, and single tensors of their files."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
from filelock import FileLock, Timeout
from huggingface_hub import constants, errors
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from ..common.repositories import redact
from ..index.files import FILE_NAME
from .compat.mlx_lm import DEFAULT_ALLOW_PATTERNS, download

HOME_VARIABLE = "MLX_FLASHHEAD_HOME"


def home() -> Path:
    """Where FlashHeads and finer heads are cached; ValueError of a user who does not exist."""
    folder = Path(os.path.expanduser(os.environ.get(HOME_VARIABLE) or "~/.cache/mlx_flashhead"))
    if folder.parts[0].startswith("~"):
        reason = f"The home directory in {folder} is not known"
        raise ValueError(f"{reason}: set {HOME_VARIABLE} to a folder.")
    return folder


def lock_of(place: Path) -> FileLock:
    """The lock of a place of the home, taken if it is free; OSError if it cannot be."""
    lock = FileLock(home() / "locks" / f"{place.name}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    with suppress(Timeout):
        lock.acquire(timeout=0)
    return lock


def resolve(path_or_repo: str, revision: str | None = None, files: list[str] | None = None) -> Path:
    """The local folder of a model: itself, or its download of ``files``, patterns of names, from
    the Hugging Face Hub; ValueError if neither exists."""
    if not path_or_repo:
        raise ValueError("The name of the model is empty: give a folder or a repository.")
    path = Path(os.path.expanduser(path_or_repo))
    if path.is_dir():
        if revision is not None:
            said = f"{path_or_repo} is a folder, which has no revision {revision!r}: leave it out."
            raise ValueError(said)
        return path
    if path.exists():
        raise ValueError(f"{path_or_repo} is a file: name its folder instead.")
    if len(path.parts) > 2 or path.is_absolute() or path_or_repo.startswith((".", "~")):
        raise ValueError(f"There is no folder {path_or_repo}: check the path of the model.")
    with _hub_errors(path_or_repo, revision):
        patterns = files or [*DEFAULT_ALLOW_PATTERNS, FILE_NAME]
        return download(path_or_repo, revision=revision, allow_patterns=patterns)


@contextmanager
def _hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """A block in which errors of the Hub's client, not of the disk, become a ValueError."""
    try:
        yield
    except Exception as error:  # the client raises many unrelated types
        disk_error = isinstance(error, OSError) and error.errno is not None
        if disk_error or type(error) is ValueError:
            raise
        missing = f"There is no folder {name!r} here, and"
        nobody = (
            f"{missing} the Hugging Face Hub cannot be reached: check the network and the name."
        )
        if constants.HF_HUB_OFFLINE:
            nobody = (
                f"{missing} it was not downloaded before: check the name, or unset HF_HUB_OFFLINE."
            )
        sentences = {
            errors.GatedRepoError: f"{name} is gated: ask for access on {constants.ENDPOINT}/{name}"
            ", then log in with `hf auth login`.",
            errors.RepositoryNotFoundError: f"{missing} no such repository on the Hugging Face "
            "Hub: check the name, or log in with `hf auth login` if it is private.",
            errors.RevisionNotFoundError: f"{name} has no revision {revision!r}: see its page.",
            errors.RemoteEntryNotFoundError: f"{name} lacks a file of its weights: choose another.",
            errors.OfflineModeIsEnabled: nobody,
            errors.HFValidationError: f"{missing} it cannot be a repository: give a folder or "
            "OWNER/NAME.",
            errors.LocalEntryNotFoundError: nobody,
            Exception: f"{missing} the Hugging Face Hub does not give it ({reason(error)}): check "
            "the name and the network.",
        }
        sentence = next(said for kind, said in sentences.items() if isinstance(error, kind))
        raise ValueError(sentence) from None  # the error's own text may hold the token


def reason(error: BaseException) -> str:
    """The error's message as one short line without secrets."""
    return shorten(redact(str(error)), 400, placeholder=" …").rstrip(".:") or type(error).__name__


# Single tensors, fetched by ranges of bytes: the header of a safetensors file says where each lies.

INDEX, SINGLE, ENDING = "model.safetensors.index.json", "model.safetensors", ".safetensors"
LARGEST_HEADER = 100_000_000  # bytes, as the format's own library has it
SILENCE = 30.0  # seconds without a byte, after which the network is down
ANSWER_SECONDS = 10.0  # in which the Hub answers, if it can be reached
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)  # in JSON


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: a path on this machine, or a file of a repository."""

    name: str
    repo_id: str | None = None

    def __str__(self) -> str:
        return f"{self.name} of {self.repo_id}" if self.repo_id else self.name

    def stream(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` to ``end``, as many as there are; ValueError from the Hub."""
        if self.repo_id is None:
            with open(self.name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(min(start, size))
                yield file.read(max(0, min(end, size) - start))
            return
        with _hub_errors(self.repo_id):
            if constants.HF_HUB_OFFLINE:
                raise errors.OfflineModeIsEnabled("offline")
            url = huggingface_hub.hf_hub_url(self.repo_id, self.name)
            headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
            with get_session().stream("GET", url, headers=headers, timeout=SILENCE) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    raise ValueError("the server sends whole files alone")
                yield from response.iter_bytes()  # as they come: a lost connection loses none

    def tensors(self) -> dict[str, "Tensor"]:
        """The tensors of the header; ValueError if it is not one."""
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
        except DAMAGE:
            said = f"{self} is damaged or no safetensors file: choose another source."
            raise ValueError(said) from None
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
        return self.end - self.start

    @property
    def readable(self) -> bool:
        """Whether its dtype is known and its place holds its shape."""
        size = _DTYPES[self.dtype].size if self.dtype in _DTYPES else 0
        return self.nbytes > 0 and self.nbytes == size * np.prod(self.shape, dtype=object)

    def array(self, content: Any, n_rows: int) -> mx.array:
        raw = np.frombuffer(content, np.uint32 if self.dtype in ("F32", "U32") else np.uint16)
        return mx.array(raw.reshape(n_rows, *self.shape[1:])).view(_DTYPES[self.dtype])

    def rows(self, ids: list[int]) -> mx.array:
        size = self.nbytes // self.shape[0]
        starts = (self.start + i * size for i in ids)
        content = b"".join(piece for at in starts for piece in self.file.stream(at, at + size))
        return self.array(content, len(ids))

    def fetch(self, folder: Path, key: str, bar: tqdm) -> np.memmap:
        """Its bytes; of a repository fetched into a file of ``folder``, where one that has ended
        early continues. ValueError if it ends early."""
        if self.file.repo_id is None:
            bar.update(self.nbytes)
            return np.memmap(self.file.name, mode="r", offset=self.start, shape=(self.nbytes,))
        with _hub_errors(self.file.repo_id):
            url = huggingface_hub.hf_hub_url(self.file.repo_id, self.file.name)
            version = huggingface_hub.get_hf_file_metadata(url).etag
        about = f"{self.file}, {self.name}, {version}"
        part = folder / f".{key}.{hashlib.sha256(about.encode()).hexdigest()[:16]}.part"
        with part.open("ab") as file:
            done = file.tell()
            bar.update(min(done, self.nbytes))
            if done < self.nbytes:
                for piece in self.file.stream(self.start + done, self.end):
                    file.write(piece)
                    bar.update(len(piece))
            if file.tell() != self.nbytes:
                raise ValueError(f"{self.file} ended early: start again, which continues.")
        return np.memmap(part, mode="r", shape=(self.nbytes,))


def tensor_files(source: str) -> Iterator[TensorFile]:
    """The safetensors files of a source, those of a head first; ValueError if there are none."""
    path = Path(os.path.expanduser(source))
    if path.exists():
        files = sorted(path.glob("*" + ENDING)) if path.is_dir() else [path]
        yield from (TensorFile(str(file)) for file in files)
        if not files:
            raise ValueError(f"{path} holds no safetensors file: choose another source.")
        return
    with _hub_errors(source):
        for name in _names(source):
            copy = huggingface_hub.try_to_load_from_cache(source, name)
            if not isinstance(copy, str) and not hub_is_reachable():
                raise errors.LocalEntryNotFoundError(f"{name} of {source} is not in the cache")
            yield TensorFile(copy) if isinstance(copy, str) else TensorFile(name, source)


def hub_is_reachable() -> bool:
    """Whether the Hub answers, asked once for each address of it. The Hub's client would try for
    half a minute, with a warning each time."""
    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


@cache
def _answers(address: str) -> bool:
    try:
        get_session().head(address, timeout=ANSWER_SECONDS)
    except Exception:  # the client raises many unrelated types
        return False
    return True


def small_file(repo_id: str, name: str) -> str:
    """The path of a repository's file in the Hub's cache, fetched if it can be."""
    offline = not hub_is_reachable()
    return huggingface_hub.hf_hub_download(repo_id, name, local_files_only=offline)


def _names(repo_id: str) -> list[str]:
    try:
        index = small_file(repo_id, INDEX)
    except errors.EntryNotFoundError:
        return [SINGLE]
    try:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(places, key=lambda name: not ("embed" in name or "head" in name))
        return list(dict.fromkeys(str(places[name]) for name in names))
    except DAMAGE:
        raise ValueError(f"{INDEX} of {repo_id} is damaged: choose another source.") from None
