"""A FlashHead under the loads of mlx-lm and mlx-vlm, for programs that do not know it."""

import multiprocessing
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from ..lossless.generation import checks
from ..models.compat.patched_load import (
    Load,
    caller_generates,
    wrap_generate_step,
    wrap_load,
    wrap_load_model,
    wrap_vlm_load,
)
from ..models.compat.utils import load_tokenizer
from ..models.fetch import resolve
from ..publishing.origin import local_origin
from .attach import BUILD, REFUSE, install_found, teller
from .look_up import given, inside


def patch_load(
    *, flash_head: str | Path | None = None, build: bool = True, n_probes: int | None = None
) -> None:
    """From now on the loads of mlx-lm and mlx-vlm attach a FlashHead to a model, if they can.

    Programs of theirs that convert or train a model get the dense one.

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

    def attach_to(model: Any, tokenizer_of: Callable[[], Any], folder: Path) -> None:
        nonlocal warned
        origin = local_origin(folder)
        try:
            head = install_found(
                model,
                tokenizer_of(),
                found or inside(folder, say),
                origin,
                n_probes=n_probes,
                backend=None,
                missing=BUILD if build else REFUSE,
                progress=True,
                say=say,
            )
            assert head is not None  # only DENSE leaves it out
            say(
                f"With FlashHead: {origin.known_as}, {head.n_probes:,} of {head.n_clusters:,} "
                "clusters scored per token."
            )
        except (ValueError, OSError) as error:
            if not warned:
                print(f"Without FlashHead: {error}", file=sys.stderr, flush=True)
            warned = True

    def wrap(original: Load) -> Load:
        @wraps(original)
        def load(path_or_hf_repo: Any, *arguments: Any, **options: Any) -> Any:
            if not caller_generates():
                return original(path_or_hf_repo, *arguments, **options)
            try:
                # mlx_vlm.generate names a revision of a folder too
                is_folder = Path(path_or_hf_repo).expanduser().is_dir()
                revision = None if is_folder else options.get("revision")
                # neither library downloads the FlashHead of a repository
                folder = resolve(str(path_or_hf_repo), revision)
            except ValueError:
                return original(path_or_hf_repo, *arguments, **options)  # with its own error
            loaded = original(path_or_hf_repo, *arguments, **options)
            attach_to(loaded[0], lambda: loaded[1], folder)
            return loaded

        return load

    def wrap_model(original: Load) -> Load:
        @wraps(original)
        def load_model(model_path: Any, *arguments: Any, **options: Any) -> Any:
            loaded = original(model_path, *arguments, **options)
            folder = Path(model_path)
            ends = loaded[1].get("eos_token_id")
            attach_to(loaded[0], partial(load_tokenizer, folder, eos_token_ids=ends), folder)
            return loaded

        return load_model

    wrap_load(wrap)
    wrap_load_model(wrap_model)
    wrap_generate_step(_with_check)
    wrap_vlm_load(wrap)


class InNewProcesses:
    """Patches the loads in the processes that a program spawns, too.

    A spawned process is given the settings of the one that starts it, and this among them.

    Args:
        options: Keywords of :func:`patch_load`.
    """

    def __init__(self, options: dict[str, Any]):
        self._options = options

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[dict[str, Any]]]:
        return _patched, (self._options,)


def _patched(options: dict[str, Any]) -> InNewProcesses:
    patch_load(**options)
    return InNewProcesses(options)


def patch_new_processes(**options: Any) -> None:
    """From now on :func:`patch_load` with these keywords is called in each spawned process."""
    settings: Any = multiprocessing.current_process()
    settings._config["mlx_flashhead"] = InNewProcesses(options)


def _with_check(original: Load) -> Load:
    """``generate_step`` with the dense model's choices, for models with a FlashHead."""

    @wraps(original)
    def generate_step(prompt: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        steps = checks(model)
        return (steps or original)(prompt, model, *arguments, **options)

    return generate_step
