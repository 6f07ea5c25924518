"""A FlashHead under the loads of mlx-lm and mlx-vlm, for programs that do not know it."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..common.command import printable, sentence
from ..decoding.drafting import drafted_steps
from ..decoding.loop import verified_steps
from ..decoding.policy import Proposer, decoding_mode
from ..decoding.vlm_text import vlm_steps
from ..head.flash_head import FlashHead
from ..interop import libraries
from ..interop.explanations import explain
from ..models.compat.mlx_lm import load_tokenizer
from ..models.fetch import hub_sentence, resolve
from ..models.install import get_flash_head, is_recognised
from ..models.origin import local_origin
from .batches import batch_class
from .head_options import VARIABLE, HeadOptions
from .load import attach_head
from .sources import explicit_or_bundled_head

OWN_STEPS = 4  # a prompt's last token is a step, too, and a loop of ours may follow
DENSE_LOOP = (
    "dense: this program's loop cannot be verified; --no-verify uses FlashHead's own choices"
)


def patch_library(library: str) -> None:
    """From now on the loads of mlx-lm or mlx-vlm attach a FlashHead, if they can.

    The options are in the environment. A mistake in them is a warning.

    Args:
        library: "mlx_lm" or "mlx_vlm".
    """
    try:
        patches = _patches()
    except (ValueError, TypeError) as error:
        print(f"Without FlashHead: {sentence(error)}", file=sys.stderr)
        return
    if library == "mlx_lm":
        libraries.patch_mlx_lm(patches.load, patches.load_model, patches.loop, patches.batches)
    else:
        libraries.patch_mlx_vlm(patches.load, patches.vlm_loop)


@cache  # once per process
def _patches() -> "_Patches":
    return _Patches(HeadOptions(**json.loads(os.environ[VARIABLE])))


class _Patches:
    """What takes the places of the libraries' functions."""

    def __init__(self, options: HeadOptions):
        self._options = options
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
            head.project_calls(_Use(name, options).project)
        except (ValueError, OSError) as error:
            if not self._warned:
                options.say(f"Without FlashHead: {sentence(error)}")
            self._warned = True

    def _use_of(self, model: Any) -> "_Use | None":
        """What is said of a model's texts; None if it has no FlashHead that verifies."""
        head = get_flash_head(model) if self._options.verify else None
        use = getattr(getattr(head, "projection", None), "__self__", None)
        return use if isinstance(use, _Use) else None

    def _announcer_of(self, model: Any) -> Callable[[str], None] | None:
        """Takes how texts of the model are decoded; None if they are left to mlx-lm."""
        use = self._use_of(model)
        if use is None:
            return None
        mode = decoding_mode(model)
        if mode == "verified":
            return use.announce
        use.leave(mode)
        return None

    def load(self, original: Any) -> Any:
        @wraps(original)
        def load(path_or_hf_repo: Any, *arguments: Any, **named: Any) -> Any:
            try:
                loaded = original(path_or_hf_repo, *arguments, **named)
            except Exception as error:
                _explain(error, str(path_or_hf_repo))
                raise
            if libraries.caller_generates():
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
        """One of mlx-lm's loops of a text, which decides at its first token who decodes."""
        parameters = signature(original)
        ours = {"generate_step": self._steps, "speculative_generate_step": self._drafted}
        take = ours[original.__name__]

        @wraps(original)
        def steps(*arguments: Any, **named: Any) -> Iterator[Any]:
            try:
                options = dict(parameters.bind(*arguments, **named).arguments)
            except TypeError:  # mlx-lm has a sentence for it
                options = None
            loop = None if options is None else take(options)
            yield from original(*arguments, **named) if loop is None else loop

        return steps

    def _steps(self, options: dict[str, Any]) -> Iterator[Any] | None:
        model = options["model"]
        announce = self._announcer_of(model)
        if announce is None:
            return None
        return verified_steps(**options, proposer=Proposer(model), announce=announce)

    def _drafted(self, options: dict[str, Any]) -> Iterator[Any] | None:
        """With a draft model the target is dense: it is the draft's FlashHead that is used."""
        draft = self._use_of(options["draft_model"])
        if (
            draft is None
            or options.get("logits_processors")
            or not is_recognised(options["draft_model"])
        ):
            return None
        return drafted_steps(**options, proposer=Proposer(options["model"]))

    def batches(self, original: Any) -> Any:
        """mlx-lm's ``BatchGenerator``, which decides at its first use who decodes."""
        return batch_class(self._announcer_of)

    def vlm_loop(self, original: Any) -> Any:
        """mlx-vlm's loop of a text, verified where it is greedy."""

        @wraps(original)
        def steps(
            input_ids: Any, model: Any, pixel_values: Any, mask: Any, **named: Any
        ) -> Iterator[Any]:
            announce = self._announcer_of(model)
            prompt = (input_ids, model, pixel_values, mask)
            loop = None
            if announce is not None:
                loop = vlm_steps(original, *prompt, named, announce)
                if loop is None:
                    announce("dense: with mlx-vlm only greedy text is verified")
            yield from original(*prompt, **named) if loop is None else loop

        return steps


def _explain(error: Exception, name: str) -> None:
    """Adds a line to the traceback of a program that cannot load a model."""
    if not Path(name).expanduser().exists():
        reason = hub_sentence(error, name)
        if reason is not None:
            explain(error, printable(f"mlx_flashhead.run: {reason}"))


class _Use:
    """How a program decodes with a FlashHead. It says so in a line, once for each way."""

    def __init__(self, name: str, options: HeadOptions):
        self._name = name
        self._say = options.say
        self._verify = options.verify
        self._n_steps = 0  # of a loop that is not ours
        self._left = False  # whether it was said why a loop is not ours
        self._said: set[str] = set()
        if not options.verify:
            self.announce("unverified")

    def announce(self, mode: str) -> None:
        """Says how a text is decoded, if it was not said yet."""
        if mode not in self._said:
            self._said.add(mode)
            self._say(f"Text of {self._name}: {mode}.")

    def leave(self, mode: str) -> None:
        """Says why texts are left to the program's own loop."""
        self.announce(mode)
        self._left = True

    def project(self, head: FlashHead, hidden: mx.array) -> mx.array:
        """The logits of a call that none of our loops has made."""
        if hidden.shape[-2:-1] == (1,):
            if not self._verify:
                return head.unverified_logits(hidden)
            self._n_steps += 1
            if self._n_steps == OWN_STEPS and not self._left:
                self.announce(DENSE_LOOP)
        return head.dense_logits(hidden)
