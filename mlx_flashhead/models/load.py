"""Loads FlashHead checkpoints: mlx-lm loads the model, then the FlashHead is installed on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.nn as nn
import mlx_lm

from ..head.flash_head import FlashHead
from ..index.files import FILE_NAME, FlashHeadIndex, has_flash_head, read_index
from ..index.redaction import redact
from .compat.utils import DEFAULT_ALLOW_PATTERNS, download
from .install import install, installed_head
from .locate import find_head

# A draft model's probes, as a share of its own number.
DRAFT_SHARE = 1 / 4


def resolve(path_or_repo: str, revision: str | None = None, files: list[str] | None = None) -> Path:
    """The local folder of a model: itself, or its download from the Hugging Face Hub.

    Args:
        path_or_repo: The folder or the repository.
        revision: Branch, tag or commit of the repository.
        files: Patterns of what to download; default: the whole checkpoint.

    Raises:
        ValueError: If neither the folder nor the repository exists.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path_or_repo} is a file: name the model's folder instead.")
    if len(path.parts) > 2 or path.is_absolute() or str(path_or_repo).startswith((".", "~")):
        raise ValueError(f"There is no folder {path_or_repo}: check the path of the model.")
    try:
        return download(
            str(path_or_repo),
            revision=revision,
            allow_patterns=files or [*DEFAULT_ALLOW_PATTERNS, FILE_NAME],
        )
    except Exception as error:  # the Hub's client raises many unrelated types
        raise ValueError(
            f"There is no folder {path_or_repo!r} here, and the Hugging Face Hub does not give it "
            f"({reason(error)}): check the name and the network."
        ) from None  # the error's own text may hold the token


def reason(error: Exception) -> str:
    """The error's message as one short line without secrets."""
    return shorten(redact(str(error)), 400, placeholder=" …").rstrip(".:") or type(error).__name__


def load(
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    n_probes: int | None = None,
    backend: str | None = None,
):
    """Loads a FlashHead checkpoint; takes ``mlx_lm.load``'s arguments and two more.

    Args:
        path_or_hf_repo: A local folder or a Hugging Face repository.
        tokenizer_config: Passed to the tokenizer.
        model_config: Overrides of the model's configuration.
        adapter_path: LoRA adapters of the body; an adapted head must be fused first.
        lazy: Load the body's weights when they are first used.
        return_config: Also return the model's configuration.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Allow the repository's own Python code.
        n_probes: Clusters scored per token; default: the number chosen at conversion.
        backend: "metal", "mlx" or None to choose.

    Returns:
        ``(model, tokenizer)``, with the configuration as a third item if asked for.

    Raises:
        ValueError: If the model does not exist or is not a FlashHead checkpoint, if its FlashHead
            is damaged or belongs to other rows, or if an argument is not valid.
    """
    folder = resolve(path_or_hf_repo, revision)
    index = read_index(folder)
    model, tokenizer, config = load_dense(
        folder,
        tokenizer_config=tokenizer_config,
        model_config=model_config,
        adapter_path=adapter_path,
        lazy=lazy,
        trust_remote_code=trust_remote_code,
    )
    install_index(model, index, n_probes=n_probes, backend=backend)
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def load_draft(
    path_or_hf_repo: str, *, n_probes: int | None = None, trust_remote_code: bool = False
):
    """Loads a draft model, with its FlashHead if it has one.

    The target verifies each draft, so fewer probes cost no exactness. By default a head drafts with
    a quarter of its own number.

    Args:
        path_or_hf_repo: A local folder or a Hugging Face repository.
        n_probes: Clusters that its FlashHead scores per token.
        trust_remote_code: Allow the repository's own Python code.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        ValueError: As in :func:`load`. Also if a number of probes is given without a FlashHead.
    """
    folder = resolve(path_or_hf_repo)
    if not has_flash_head(folder):
        if n_probes is not None:
            raise ValueError(
                f"{path_or_hf_repo} has no FlashHead, so it drafts without probes: leave "
                "--draft-probes out."
            )
        return load_dense(folder, trust_remote_code=trust_remote_code)[:2]
    model, tokenizer = load(str(folder), trust_remote_code=trust_remote_code, n_probes=n_probes)
    if n_probes is None:
        head = installed_head(model)
        head.n_probes = max(1, round(head.n_probes * DRAFT_SHARE))
    return model, tokenizer


def load_dense(folder: Path, **kwargs: Any):
    """``mlx_lm.load`` of a local folder: the dense model, its tokenizer and its configuration.

    Raises:
        ValueError: If mlx-lm cannot load it, in one sentence.
    """
    with loading(folder):
        return mlx_lm.load(str(folder), return_config=True, **kwargs)


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
) -> FlashHead:
    """Installs a stored FlashHead on the model whose rows it was made from.

    Raises:
        ValueError: If the model has other rows, or an argument is not valid.
    """
    location = find_head(model)
    if location.rows().fingerprint() != index.config.fingerprint:
        raise ValueError(
            f"{FILE_NAME} belongs to other rows than this model's {location.path!r}: the model was "
            "changed after its conversion, so convert it again with mlx_flashhead.convert."
        )
    return install(
        model,
        index.token_ids,
        index.centroids,
        n_probes=index.config.n_probes if n_probes is None else n_probes,
        eos_token_ids=index.config.eos_token_ids,
        backend=backend,
        location=location,
    )
