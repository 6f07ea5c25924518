"""Finds and loads models by mlx-lm, and installs a stored FlashHead on them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import huggingface_hub
import mlx.nn as nn
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..head.flash_head import FlashHead
from ..index.files import FILE_NAME, FlashHeadIndex, is_companion
from ..index.fit import check_fit
from ..index.redaction import redact
from .compat.utils import DEFAULT_ALLOW_PATTERNS, download, load, load_adapters
from .install import install
from .locate import find_head


def resolve(path_or_repo: str, revision: str | None = None, files: list[str] | None = None) -> Path:
    """The local folder of a model: itself, or its download from the Hugging Face Hub.

    Args:
        path_or_repo: The folder or the repository.
        revision: Branch, tag or commit of the repository.
        files: Patterns of what to download; default: the whole checkpoint.

    Raises:
        ValueError: If neither the folder nor the repository exists.
    """
    if not str(path_or_repo):
        raise ValueError("The name of the model is empty: give a folder or a repository.")
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{path_or_repo} is a folder, which has no revision {revision!r}: leave it out."
            )
        return path
    if path.exists():
        raise ValueError(f"{path_or_repo} is a file: name its folder instead.")
    if len(path.parts) > 2 or path.is_absolute() or str(path_or_repo).startswith((".", "~")):
        raise ValueError(f"There is no folder {path_or_repo}: check the path of the model.")
    try:
        return download(
            str(path_or_repo),
            revision=revision,
            allow_patterns=files or [*DEFAULT_ALLOW_PATTERNS, FILE_NAME],
        )
    except Exception as error:  # the Hub's client raises many unrelated types
        # the error's own text may hold the token
        raise ValueError(_not_given(str(path_or_repo), revision, error)) from None


def _not_given(name: str, revision: str | None, error: Exception) -> str:
    """A sentence on a repository that cannot be downloaded."""
    missing = f"There is no folder {name!r} here, and"
    if isinstance(error, GatedRepoError):
        page = f"{huggingface_hub.constants.ENDPOINT}/{name}"
        return f"{name} is gated: ask for access on {page}, then log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{missing} no such repository on the Hugging Face Hub: check the name, or log in with "
            "`hf auth login` if it is private."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"The repository {name} has no revision {revision!r}: its page lists them."
    if isinstance(error, HFValidationError):
        return f"{missing} it cannot be a repository: give a folder or OWNER/NAME."
    if isinstance(error, LocalEntryNotFoundError):
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return (
                f"{missing} it was not downloaded before: check the name, or unset HF_HUB_OFFLINE."
            )
        return f"{missing} the Hugging Face Hub cannot be reached: check the network and the name."
    return (
        f"{missing} the Hugging Face Hub does not give it ({reason(error)}): check the name and "
        "the network."
    )


def reason(error: Exception) -> str:
    """The error's message as one short line without secrets."""
    return shorten(redact(str(error)), 400, placeholder=" …").rstrip(".:") or type(error).__name__


def load_dense(folder: Path, **kwargs: Any):
    """``mlx_lm.load`` of a local folder: the dense model, its tokenizer and its configuration.

    Raises:
        ValueError: If mlx-lm cannot load it, in one sentence.
    """
    if is_companion(folder):
        raise ValueError(
            f"{folder} is a FlashHead without its model: give it as --flash-head, and the model it "
            "was made for as --model."
        )
    adapter_path = kwargs.pop("adapter_path", None)
    with loading(folder):
        loaded: Any = load(str(folder), return_config=True, **kwargs)
    model, tokenizer, config = loaded
    if adapter_path is not None:
        model = _adapted(model, adapter_path)
    return model, tokenizer, config


def _adapted(model: nn.Module, adapter_path: str) -> nn.Module:
    """The model with LoRA adapters, as ``mlx_lm.load`` puts them on it.

    Raises:
        ValueError: If there are none, or they do not fit the model.
    """
    try:
        model = load_adapters(model, adapter_path)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The adapters in {adapter_path} cannot be put on this model ({reason(error)}): check "
            "--adapter-path."
        ) from error
    model.eval()
    return model


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Within the block mlx-lm loads ``folder``, and its errors become one sentence.

    Raises:
        ValueError: If mlx-lm fails.
    """
    try:
        yield
    except SystemExit as error:
        if error.code != 1:  # the user ended the program
            raise
        # mlx-lm's code of some architectures exits where a package is missing
        raise ValueError(
            f"mlx-lm cannot load the model in {folder}, for the reason printed above: install the "
            "missing package, or use another model."
        ) from error
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        remedy = "check or fetch it again"
        if "trust_remote_code" in str(error):
            remedy = "if you trust its code, add --trust-remote-code"
        raise ValueError(
            f"mlx-lm cannot load the model in {folder} ({reason(error)}): {remedy}."
        ) from error


def install_index(
    model: nn.Module,
    index: FlashHeadIndex,
    *,
    n_probes: int | None = None,
    backend: str | None = None,
    source: str = FILE_NAME,
    say: Callable[[str], None] = lambda _: None,
) -> FlashHead:
    """Installs a stored FlashHead on a model whose rows it was made from, or near ones.

    Args:
        model: A dense mlx-lm model.
        index: The FlashHead.
        n_probes: Clusters scored per token; default: the number that the index names.
        backend: "metal", "mlx" or None to choose.
        source: Source of the index, for messages.
        say: Called with a sentence if the rows are near ones.

    Raises:
        ValueError: If the model has other rows, or an argument is not valid.
    """
    location = find_head(model)
    near = check_fit(index, location.rows(), source)
    if near is not None:
        say(near)
    return install(
        model,
        index.token_ids,
        index.centroids,
        n_probes=index.config.n_probes if n_probes is None else n_probes,
        eos_token_ids=index.config.eos_token_ids,
        backend=backend,
        location=location,
    )
