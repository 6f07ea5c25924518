"""A FlashHead under ``mlx_lm.load`` and ``mlx_vlm.load``, for programs that do not know it."""

from functools import wraps
from pathlib import Path
from typing import Any

from ..common.command import sentence
from ..lossless.generation import checks
from ..models.compat.patched_load import Load, wrap_generate_step, wrap_load
from ..models.compat.vlm.patched_load import wrap_load as wrap_vlm_load
from ..models.fetch import resolve
from ..publishing.origin import local_origin
from .attach import attach_head
from .look_up import HeadOptions, head_beside, named_head


def patch_load(options: HeadOptions) -> None:
    """From now on ``load`` of mlx-lm and mlx-vlm attaches a FlashHead to a model, if it can.

    Args:
        options: The choices for it.

    Raises:
        ValueError: If the FlashHead that the user names cannot be read.
    """
    chosen = named_head(options)
    warned = False

    def attach_to(model: Any, tokenizer: Any, folder: Path) -> None:
        nonlocal warned
        origin = local_origin(folder)
        try:
            stored = chosen or head_beside(folder, options)
            head = attach_head(model, tokenizer, stored, origin, options)
            assert head is not None  # only DENSE leaves it out
            options.say(
                f"With FlashHead: {origin.known_as}, {head.n_probes:,} of {head.n_clusters:,} "
                "clusters scored per token."
            )
        except (ValueError, OSError) as error:
            if not warned:
                options.say(f"Without FlashHead: {sentence(error)}")
            warned = True

    def wrap(original: Load) -> Load:
        @wraps(original)
        def load(path_or_hf_repo: Any, *arguments: Any, **named: Any) -> Any:
            try:
                # mlx_vlm.generate names a revision of a folder too
                is_folder = Path(path_or_hf_repo).expanduser().is_dir()
                revision = None if is_folder else named.get("revision")
                # neither library downloads the FlashHead of a repository
                folder = resolve(str(path_or_hf_repo), revision)
            except ValueError:
                return original(path_or_hf_repo, *arguments, **named)  # with its own error
            loaded = original(path_or_hf_repo, *arguments, **named)
            attach_to(loaded[0], loaded[1], folder)
            return loaded

        return load

    wrap_load(wrap)
    wrap_generate_step(_with_check)
    wrap_vlm_load(wrap)


def _with_check(original: Load) -> Load:
    """``generate_step`` with the dense model's choices, for models with a FlashHead."""

    @wraps(original)
    def generate_step(prompt: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        steps = checks(model)
        return (steps or original)(prompt, model, *arguments, **options)

    return generate_step
