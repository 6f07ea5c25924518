"""A FlashHead under the loads of mlx-lm and mlx-vlm, for programs that do not know it."""

import json
import os
import sys
from collections.abc import Callable
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import mlx.core as mx

from ..common.command import sentence
from ..decoding.batch import VerifiedBatchGenerator
from ..decoding.generation import verified_loop, vlm_steps
from ..decoding.policy import decoding_mode
from ..head.flash_head import FlashHead
from ..models.compat import patching
from ..models.compat.mlx_lm import load_tokenizer
from ..models.fetch import resolve
from ..models.install import get_flash_head
from ..models.origin import local_origin
from .head_options import VARIABLE, HeadOptions
from .load import attach_head
from .sources import explicit_or_bundled_head

OWN_STEPS = 4  # a prompt's last token is a step, too, and a loop of ours may follow
DENSE_LOOP = (
    "dense: this program's loop cannot be verified; --no-verify uses FlashHead's own choices"
)


def patch_library(library: str) -> None:
    """From now on the loads of mlx-lm or mlx-vlm attach a FlashHead, if they can, with the options
    in the environment. A mistake in these is a warning."""
    try:
        patches = _patches()
    except (ValueError, TypeError) as error:
        print(f"Without FlashHead: {sentence(error)}", file=sys.stderr)
        return
    if library == "mlx_lm":
        patching.patch_mlx_lm(patches.load, patches.load_model, patches.loop, patches.batches)
    else:
        patching.patch_mlx_vlm(patches.load, patches.vlm_loop)


@cache  # once per process
def _patches() -> "_Patches":
    return _Patches(HeadOptions(**json.loads(os.environ[VARIABLE])))


class _Patches:
    """What takes the places of the libraries' functions."""

    def __init__(self, options: HeadOptions):
        self._options = options
        self._uses: WeakKeyDictionary[FlashHead, _Use] = WeakKeyDictionary()
        self._warned = False

    def _attach(
        self, model: Any, tokenizer_of: Callable[[], Any], path: Any, revision: str | None = None
    ) -> None:
        options = self._options
        try:
            # mlx_vlm.generate names a revision of a folder too
            revision = None if Path(path).expanduser().is_dir() else revision
            folder = resolve(str(path), revision)  # the libraries download no FlashHead
            stored = explicit_or_bundled_head(folder, options)
            head = attach_head(model, tokenizer_of(), stored, folder, options)
            assert head is not None  # only DENSE leaves it out
            name = local_origin(folder).known_as
            clusters = f"{head.n_probes:,} of {head.n_clusters:,} clusters"
            options.say(f"With FlashHead: {name}, {clusters} scored per token.")
            self._uses[head] = _Use(head, name, options)
        except (ValueError, OSError) as error:
            if not self._warned:
                options.say(f"Without FlashHead: {sentence(error)}")
            self._warned = True

    def _verified_use(self, model: Any) -> "_Use | None":
        head = get_flash_head(model) if self._options.verify else None
        return None if head is None else self._uses.get(head)

    def load(self, original: Any) -> Any:
        @wraps(original)
        def load(path_or_hf_repo: Any, *arguments: Any, **named: Any) -> Any:
            loaded = original(path_or_hf_repo, *arguments, **named)
            if patching.caller_generates():
                revision = named.get("revision")
                self._attach(loaded[0], lambda: loaded[1], path_or_hf_repo, revision)
            return loaded

        return load

    def load_model(self, original: Any) -> Any:
        @wraps(original)
        def load_model(model_path: Any, *arguments: Any, **named: Any) -> Any:
            loaded = original(model_path, *arguments, **named)
            folder, ends = Path(model_path), loaded[1].get("eos_token_id")
            self._attach(loaded[0], partial(load_tokenizer, folder, eos_token_ids=ends), folder)
            return loaded

        return load_model

    def loop(self, original: Any) -> Any:
        @wraps(original)
        def steps(prompt: Any, model: Any, *arguments: Any, **named: Any) -> Any:
            use = self._verified_use(model)
            loop = verified_loop(model, original.__name__) if self._options.verify else None
            if loop is None:
                return original(prompt, model, *arguments, **named)
            if use is not None:
                use.announce(decoding_mode(model))
            return loop(prompt, model, *arguments, **named)

        return steps

    def batches(self, original: Any) -> Any:
        verified_use = self._verified_use

        class RunBatchGenerator(VerifiedBatchGenerator):
            def __new__(cls, model: Any, *arguments: Any, **named: Any) -> Any:
                use = verified_use(model)
                if use is None or patching.caller_changes_batches():
                    return original(model, *arguments, **named)
                use.announce(decoding_mode(model))
                return super().__new__(cls)

        return RunBatchGenerator

    def vlm_loop(self, original: Any) -> Any:
        @wraps(original)
        def steps(input_ids: Any, model: Any, pixel_values: Any, mask: Any, **named: Any) -> Any:
            use = self._verified_use(model)
            prompt = input_ids, model, pixel_values, mask
            loop = None if use is None else vlm_steps(original, *prompt, named)
            if use is None or loop is None:
                return original(*prompt, **named)
            use.announce(decoding_mode(model))
            return loop

        return steps


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
