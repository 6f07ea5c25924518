"""Loads what drafts for a model: a smaller one, or a drafter that was trained with it.

No draft changes a text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..decoding.random_state import random_key
from ..models.compat.mlx_lm import load_tokenizer
from ..models.fetch import reason, resolve
from ..models.install import get_flash_head
from ..models.own_drafter import load_own_drafter
from ..models.trained_drafter import (
    TrainedDrafter,
    check_drafter,
    is_trained_drafter,
    load_trained_drafter,
    read_config,
)
from .head_options import DENSE, HeadOptions
from .load import load_with_head

# MLX's random state while something is loaded: what is drawn for its weights is replaced, and the
# state of the caller's text stays as it is.
UNUSED = (0, 0)
# Without a model's weights and code.
TOKENIZER_FILES = ["*.json", "*.txt", "*.jinja", "*.tiktoken", "tokenizer.model"]


@dataclass(frozen=True)
class DraftOptions:
    """What drafts, as a user chooses.

    Attributes:
        model: The folder or repository of a smaller model, or of a trained drafter.
        mtp: Where the model's own MTP layer is; True: in its original.
        probes: Clusters scored for each draft of a smaller model.
    """

    model: str | None = None
    mtp: str | Path | bool | None = None
    probes: int | None = None

    def check(self, target: str) -> None:
        """Checks what drafts for a target, before anything is loaded; raises as :func:`load`."""
        if self.model is not None:
            check_draft(self.model, target)

    def load(
        self, target: nn.Module, folder: Path, options: HeadOptions, *, trust_remote_code: bool
    ) -> nn.Module | TrainedDrafter | None:
        """What drafts for a model that is loaded; None if nothing does.

        Args:
            target: The model.
            folder: Its folder.
            options: Say how progress is shown.
            trust_remote_code: Run a smaller model's own Python code.

        Raises:
            ValueError: If it cannot be had, or was trained with another model.
        """
        if self.mtp:
            say = options.say
            with random_key(UNUSED):
                return load_own_drafter(
                    target, folder, self.mtp, say=say, progress=options.progress
                )
        if self.model is None:
            return None
        drafter: nn.Module | TrainedDrafter
        drafter, _ = load_draft(
            self.model, draft_probes=self.probes, trust_remote_code=trust_remote_code
        )
        if isinstance(drafter, TrainedDrafter):
            drafter.check_target(target)
        return drafter


def load_draft(
    path_or_hf_repo: str,
    *,
    mtp_of: nn.Module | None = None,
    draft_probes: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Loads what drafts for a model: a smaller one, or a drafter that was trained with it.

    A smaller model comes with its FlashHead if it has one. None is built. The target verifies each
    draft, so few probes will do: by default a tenth of the head's bytes (docs/drafts.md).

    Args:
        path_or_hf_repo: Folder or Hugging Face repository of a smaller model, or of a trained
            drafter: an MTP layer, or an assistant of Gemma 4. The latter need mlx-vlm.
        mtp_of: A model that is loaded, whose own MTP layer is wanted: the path is its own then.
        draft_probes: Clusters scored for each draft of a smaller model.
        trust_remote_code: Run a smaller model's own Python code.

    Returns:
        ``(model, tokenizer)``. A trained drafter has the tokens of its target, and None as its
        tokenizer.

    Raises:
        ValueError: If the model does not exist, its FlashHead is damaged, it has none and probes
            are chosen, or such a drafter cannot draft for models of mlx-lm.
    """
    folder = resolve(path_or_hf_repo)
    with random_key(UNUSED):
        return _load_from(folder, path_or_hf_repo, mtp_of, draft_probes, trust_remote_code)


def _load_from(
    folder: Path,
    path_or_hf_repo: str,
    mtp_of: nn.Module | None,
    draft_probes: int | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    if mtp_of is not None:
        return load_own_drafter(mtp_of, folder, say=HeadOptions().say), None
    if is_trained_drafter(read_config(folder)):
        if draft_probes is not None:
            raise ValueError(
                f"{path_or_hf_repo} drafts with its target's head: leave `draft_probes` out."
            )
        return load_trained_drafter(folder, path_or_hf_repo), None
    model, tokenizer, _ = load_with_head(
        folder,
        HeadOptions(missing=DENSE, n_probes=draft_probes, drafts=True),
        trust_remote_code=trust_remote_code,
    )
    if draft_probes is not None and get_flash_head(model) is None:
        raise ValueError(f"{path_or_hf_repo} has no FlashHead: leave `draft_probes` out.")
    return model, tokenizer


def check_draft(draft: str, target: str) -> None:
    """Checks that what drafts has the vocabulary of its target, before either is loaded.

    Args:
        draft: Folder or Hugging Face repository of a draft model, or of a trained drafter.
        target: Folder or Hugging Face repository of the target.

    Raises:
        ValueError: If it has another one, if a drafter was trained with another model, or if one of
            the models does not exist or is damaged.
    """
    folders = [resolve(name, files=TOKENIZER_FILES) for name in (draft, target)]
    config, target_config = map(read_config, folders)
    if is_trained_drafter(config):
        check_drafter(config, draft, target_config, target)
        return
    if not isinstance(config.get("model_type"), str):
        raise ValueError(
            f"`draft_model` {draft} is neither a model nor a drafter, since no config.json there "
            "says what it is (model_type): give the folder of one."
        )
    sizes = [
        _vocab_size(folder, name) for folder, name in zip(folders, (draft, target), strict=True)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`draft_model` {draft} has another vocabulary than {target} ({sizes[0]:,} and "
            f"{sizes[1]:,} tokens): give a smaller model of the same family."
        )


def _vocab_size(folder: Path, name: str) -> int:
    try:
        return int(load_tokenizer(folder).vocab_size)
    except Exception as error:
        # Classes of tokenizers, and damaged files, raise any error.
        raise ValueError(
            f"The tokenizer of {name} cannot be loaded ({reason(error)}): check or fetch it again."
        ) from error
