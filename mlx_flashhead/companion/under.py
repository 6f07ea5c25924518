"""A FlashHead under ``mlx_lm.load``, for programs that do not know FlashHead."""

import sys
from functools import wraps
from pathlib import Path
from typing import Any

from ..models.compat.load import Load, wrap_load
from ..models.load import resolve
from ..publishing.origin import local_origin
from .attach import BUILD, REFUSE, install_found, teller
from .look_up import given, inside


def put_under_load(
    *, flash_head: str | Path | None = None, build: bool = True, n_probes: int | None = None
) -> None:
    """From now on ``mlx_lm.load`` attaches a FlashHead to the models that it loads, if it can.

    Args:
        flash_head: A folder or a Hugging Face repository of a FlashHead.
        build: Build one if there is none.
        n_probes: Clusters scored per token; default: the FlashHead's own number.

    Raises:
        ValueError: If the given FlashHead cannot be read.
    """
    found = given(flash_head)
    say = teller(True)
    warned = False

    def attach_to(model: Any, tokenizer: Any, folder: Path) -> None:
        nonlocal warned
        try:
            install_found(
                model,
                tokenizer,
                found or inside(folder, say),
                local_origin(folder),
                n_probes=n_probes,
                backend=None,
                missing=BUILD if build else REFUSE,
                progress=True,
                say=say,
            )
        except (ValueError, OSError) as error:
            if not warned:
                print(f"Without FlashHead: {error}", file=sys.stderr, flush=True)
            warned = True

    def wrap(original: Load) -> Load:
        @wraps(original)
        def load(path_or_hf_repo: Any, *arguments: Any, **options: Any) -> Any:
            try:
                # mlx-lm does not download the index of a repository
                folder = resolve(str(path_or_hf_repo), options.get("revision"))
            except ValueError:
                return original(path_or_hf_repo, *arguments, **options)  # with its own error
            loaded = original(path_or_hf_repo, *arguments, **options)
            attach_to(loaded[0], loaded[1], folder)
            return loaded

        return load

    wrap_load(wrap)
