"""A FlashHead under the loads of mlx-lm and mlx-vlm, for programs that do not know it."""

import multiprocessing
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from ..common.command import sentence
from ..lossless.generation import lossless_steps
from ..models.compat.mlx_lm import load_tokenizer
from ..models.compat.patched_load import Load, caller_generates, patch_programs
from ..models.fetch import resolve
from ..publishing.origin import local_origin
from .attach import attach_head
from .sources import HeadOptions, bundled_head, explicit_head


def patch_load(options: HeadOptions) -> None:
    """From now on the loads of mlx-lm and mlx-vlm attach a FlashHead to a model, if they can.

    Programs of theirs that convert or train a model get the dense one.

    Raises:
        ValueError: If the FlashHead that the user names cannot be read.
    """
    chosen = explicit_head(options)
    warned = False

    def attach_to(model: Any, tokenizer_of: Callable[[], Any], folder: Path) -> None:
        nonlocal warned
        origin = local_origin(folder)
        try:
            stored = chosen or bundled_head(folder, options)
            head = attach_head(model, tokenizer_of(), stored, origin, options)
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
            if not caller_generates():
                return original(path_or_hf_repo, *arguments, **named)
            try:
                # mlx_vlm.generate names a revision of a folder too
                is_folder = Path(path_or_hf_repo).expanduser().is_dir()
                revision = None if is_folder else named.get("revision")
                # neither library downloads the FlashHead of a repository
                folder = resolve(str(path_or_hf_repo), revision)
            except ValueError:
                return original(path_or_hf_repo, *arguments, **named)  # with its own error
            loaded = original(path_or_hf_repo, *arguments, **named)
            attach_to(loaded[0], lambda: loaded[1], folder)
            return loaded

        return load

    def wrap_model(original: Load) -> Load:
        @wraps(original)
        def load_model(model_path: Any, *arguments: Any, **named: Any) -> Any:
            loaded = original(model_path, *arguments, **named)
            folder = Path(model_path)
            ends = loaded[1].get("eos_token_id")
            attach_to(loaded[0], partial(load_tokenizer, folder, eos_token_ids=ends), folder)
            return loaded

        return load_model

    patch_programs(wrap, wrap_model, _with_check)


class _InNewProcesses:
    """Patches the loads in a spawned process, as soon as it is unpickled there."""

    def __init__(self, options: HeadOptions):
        self._options = options

    def __setstate__(self, state: dict[str, HeadOptions]) -> None:
        vars(self).update(state)  # for its own processes
        patch_load(self._options)


def patch_new_processes(options: HeadOptions) -> None:
    """From now on :func:`patch_load` is called in each process that multiprocessing spawns.

    A process is given the settings of the one that starts it, before the function that it runs.
    """
    process: Any = multiprocessing.current_process()
    process._config["mlx_flashhead"] = _InNewProcesses(options)


def _with_check(original: Load) -> Load:
    """A loop of mlx-lm with the dense model's choices."""

    @wraps(original)
    def steps(prompt: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        loop = lossless_steps(model, original.__name__) or original
        return loop(prompt, model, *arguments, **options)

    return steps
