"""A FlashHead under the loads of mlx-lm and mlx-vlm, for programs that do not know it."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Any

from ..common.command import sentence
from ..lossless.generation import verified_loop
from ..models.compat.mlx_lm import load_tokenizer
from ..models.compat.patched_load import Load, caller_generates, patch_programs
from ..models.fetch import resolve
from ..models.origin import local_origin
from .attach import attach_head
from .sources import HeadOptions, bundled_head, explicit_head

VARIABLE = "MLX_FLASHHEAD_RUN"  # read by hook/sitecustomize.py


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
        try:
            stored = chosen or bundled_head(folder, options)
            head = attach_head(model, tokenizer_of(), stored, folder, options)
            assert head is not None  # only DENSE leaves it out
            options.say(
                f"With FlashHead: {local_origin(folder).known_as}, {head.n_probes:,} of "
                f"{head.n_clusters:,} clusters scored per token."
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


def environment(options: HeadOptions) -> dict[str, str]:
    """The variables with which a new Python process patches its loads, by `hook/sitecustomize`."""
    default = asdict(HeadOptions())
    values = {name: value for name, value in asdict(options).items() if value != default[name]}
    for name in {"flash_head", "fine_head"} & {*values}:
        if isinstance(values[name], str | Path) and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())  # the process may start elsewhere
    hook = str(Path(__file__).parents[1] / "hook")
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [hook, *(path for path in paths if path != hook)]
    return {"PYTHONPATH": os.pathsep.join(paths), VARIABLE: json.dumps(values)}


def patch_from_environment() -> None:
    """`patch_load` with the options in the environment; a mistake in them is one warning."""
    try:
        patch_load(HeadOptions(**json.loads(os.environ[VARIABLE])))
    except (ValueError, TypeError, OSError) as error:
        print(f"Without FlashHead: {sentence(error)}", file=sys.stderr)


def _with_check(original: Load) -> Load:
    """A loop of mlx-lm with the dense model's choices."""

    @wraps(original)
    def steps(prompt: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        loop = verified_loop(model, original.__name__) or original
        return loop(prompt, model, *arguments, **options)

    return steps
