"""A FlashHead under the loads of mlx-lm and mlx-vlm, for programs that do not know it."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import mlx.core as mx

from ..common.command import sentence
from ..head.flash_head import FlashHead
from ..lossless.batch import VerifiedBatchGenerator
from ..lossless.generation import verified_loop, vlm_steps
from ..lossless.policy import decoding_mode
from ..models.compat.mlx_lm import load_tokenizer
from ..models.compat.patching import caller_changes_batches, caller_generates, patch_programs
from ..models.fetch import resolve
from ..models.install import get_flash_head
from ..models.origin import local_origin
from .load import attach_head
from .sources import HeadOptions, bundled_head, explicit_head

VARIABLE = "MLX_FLASHHEAD_RUN"  # read by hook/sitecustomize.py
OWN_STEPS = 4  # a prompt's last token is a step, too, and a loop of ours may follow
DENSE_LOOP = (
    "dense: this program's loop cannot be verified; --no-verify uses FlashHead's own choices"
)


def patch_load(options: HeadOptions) -> None:
    """From now on the loads of mlx-lm and mlx-vlm attach a FlashHead to a model, if they can.

    Programs of theirs that convert or train a model get the dense one. ValueError if the FlashHead
    that the user names cannot be read.
    """
    chosen = explicit_head(options)
    uses: WeakKeyDictionary[Any, _Use] = WeakKeyDictionary()
    warned = False

    def attach_to(model: Any, tokenizer_of: Callable[[], Any], folder: Path) -> None:
        nonlocal warned
        try:
            stored = chosen or bundled_head(folder, options)
            head = attach_head(model, tokenizer_of(), stored, folder, options)
            assert head is not None  # only DENSE leaves it out
            name = local_origin(folder).known_as
            options.say(
                f"With FlashHead: {name}, {head.n_probes:,} of {head.n_clusters:,} clusters scored "
                "per token."
            )
            uses[head] = _Use(head, name, options)
        except (ValueError, OSError) as error:
            if not warned:
                options.say(f"Without FlashHead: {sentence(error)}")
            warned = True

    def of_load(original: Any) -> Any:
        @wraps(original)
        def load(path_or_hf_repo: Any, *arguments: Any, **named: Any) -> Any:
            if not caller_generates():
                return original(path_or_hf_repo, *arguments, **named)
            folder = None
            with suppress(ValueError, OSError):  # the library has its own error
                # mlx_vlm.generate names a revision of a folder too
                is_folder = Path(path_or_hf_repo).expanduser().is_dir()
                revision = None if is_folder else named.get("revision")
                # neither library downloads the FlashHead of a repository
                folder = resolve(str(path_or_hf_repo), revision)
            loaded = original(path_or_hf_repo, *arguments, **named)
            if folder is not None:
                attach_to(loaded[0], lambda: loaded[1], folder)
            return loaded

        return load

    def of_load_model(original: Any) -> Any:
        @wraps(original)
        def load_model(model_path: Any, *arguments: Any, **named: Any) -> Any:
            loaded = original(model_path, *arguments, **named)
            folder, ends = Path(model_path), loaded[1].get("eos_token_id")
            attach_to(loaded[0], partial(load_tokenizer, folder, eos_token_ids=ends), folder)
            return loaded

        return load_model

    def verified_use(model: Any) -> _Use | None:
        """How a program uses a FlashHead that may be verified."""
        head = get_flash_head(model) if options.verify else None
        return None if head is None else uses.get(head)

    def of_loop(original: Any) -> Any:
        @wraps(original)
        def steps(prompt: Any, model: Any, *arguments: Any, **named: Any) -> Any:
            use = verified_use(model)
            loop = verified_loop(model, original.__name__) if options.verify else None
            if loop is None:
                return original(prompt, model, *arguments, **named)
            if use is not None:
                use.announce(decoding_mode(model))
            return loop(prompt, model, *arguments, **named)

        return steps

    def of_batches(original: Any) -> Any:
        class RunBatchGenerator(VerifiedBatchGenerator):
            def __new__(cls, model: Any, *arguments: Any, **named: Any) -> Any:
                use = verified_use(model)
                if use is None or caller_changes_batches():
                    return original(model, *arguments, **named)
                use.announce(decoding_mode(model))
                return super().__new__(cls)

        return RunBatchGenerator

    def of_vlm_loop(original: Any) -> Any:
        @wraps(original)
        def steps(input_ids: Any, model: Any, pixel_values: Any, mask: Any, **named: Any) -> Any:
            use, loop = verified_use(model), None
            if use is not None:
                loop = vlm_steps(original, input_ids, model, pixel_values, mask, named)
            if use is None or loop is None:
                return original(input_ids, model, pixel_values, mask, **named)
            use.announce(decoding_mode(model))
            return loop

        return steps

    patch_programs(of_load, of_load_model, of_loop, of_batches, of_vlm_loop)


class _Use:
    """How a program decodes with a FlashHead. The first text shows it, in one line."""

    def __init__(self, head: FlashHead, name: str, options: HeadOptions):
        self._head = ref(head)  # a program may drop its model
        self._name, self._say, self._verify = name, options.say, options.verify
        self._n_steps = 0  # of a loop that is not ours
        self._told = False
        if not options.verify:
            self.announce("unverified")
        self._interception = head.intercepted(self._project)
        self._interception.__enter__()  # for good

    def announce(self, mode: str) -> None:
        """Says, once, how the text is decoded."""
        if not self._told:
            self._say(f"Text of {self._name}: {mode}.")
        self._told = True

    def _project(self, hidden: mx.array) -> mx.array:
        head = self._head()
        assert head is not None  # it calls
        if hidden.shape[-2] == 1:
            if not self._verify:
                return head.unverified_logits(hidden)
            self._n_steps += 1
            if self._n_steps == OWN_STEPS:
                self.announce(DENSE_LOOP)
        return head.dense_logits(hidden)


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
