"""A FlashHead under the loads of mlx-lm and mlx-vlm, for programs that do not know it."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar
from weakref import finalize

from ..common.command import printable, sentence
from ..common.interrupts import INTERRUPTED
from ..decoding.drafting import drafted_steps
from ..decoding.loop import REPLACED, verified_steps
from ..decoding.policy import policy_of
from ..decoding.proposer import Proposer
from ..decoding.settings import DecodingSettings
from ..decoding.vlm_text import vlm_steps
from ..head.flash_head import FlashHead
from ..interop import libraries
from ..models.compat.mlx_lm import load_tokenizer
from ..models.compat.recognised import mlx_lm_is_as_imported
from ..models.fetch import hub_sentence, resolve
from ..models.install import detach, get_flash_head, is_recognised
from ..models.origin import local_origin
from ..models.vlm import is_vlm
from .background import BuildBeside
from .batches import batch_class
from .head_options import BUILD, LATER, VARIABLE, HeadOptions
from .load import attach_head
from .sources import explicit_or_bundled_head
from .use import BUILDING, Use, check_before_sigterm

Decision = TypeVar("Decision")

ONLY_GREEDY = "dense: with mlx-vlm only greedy text is verified"


def patch_library(library: str) -> None:
    """From now on the loads of mlx-lm or mlx-vlm attach a FlashHead, if they can.

    The options are in the environment. A mistake in them is a warning.

    Args:
        library: "mlx_lm" or "mlx_vlm".
    """
    try:
        patches = _patches()
        if library == "mlx_lm":
            libraries.patch_mlx_lm(patches.load, patches.load_model, patches.loop, patches.batches)
        else:
            libraries.patch_mlx_vlm(patches.load, patches.vlm_loop)
    except Exception as error:  # whatever it is, the program goes on as without this package
        print(f"Without FlashHead: {sentence(error)}", file=sys.stderr)


@cache  # once per process
def _patches() -> "_Patches":
    options = HeadOptions(**json.loads(os.environ[VARIABLE]))
    if options.check:
        check_before_sigterm()
    return _Patches(options)


class _Patches:
    """What takes the places of the libraries' functions."""

    def __init__(self, options: HeadOptions):
        self._options = options
        self._warned = False
        self._builds: dict[int, BuildBeside] = {}  # by the id of a model without a FlashHead

    def _attach(
        self, model: Any, tokenizer_of: Callable[[], Any], path: Any, revision: str | None = None
    ) -> None:
        options = self._options
        before = get_flash_head(model)
        try:
            # mlx_vlm.generate names a revision of a folder too
            revision = None if Path(path).expanduser().is_dir() else revision
            folder = resolve(str(path), revision)  # the libraries download no FlashHead
            stored = explicit_or_bundled_head(folder, options)
            if is_vlm(model) and options.missing == LATER:
                options = replace(options, missing=BUILD)
            tokenizer = tokenizer_of()
            head = attach_head(model, tokenizer, stored, folder, options)
            use = Use(local_origin(folder).known_as, options)
            if head is None:
                self._builds[id(model)] = BuildBeside(model, tokenizer, folder, options, use)
                finalize(model, self._end_build, id(model)).atexit = False
            else:
                self._begin_use(use, head)
        except KeyboardInterrupt:
            options.say("Interrupted: the next use of the model tries again.")
            sys.exit(INTERRUPTED)
        except Exception as error:  # whatever it is, the program goes on as without this package
            self._say_without(error)
            if get_flash_head(model) is not before:
                detach(model)

    def _end_build(self, key: int) -> None:
        build = self._builds.pop(key, None)
        if build is not None:
            build.close()

    def _begin_use(self, use: Use, head: FlashHead) -> None:
        if not policy_of(head).dense:  # which is said with the first text
            clusters = f"{head.n_probes:,} of {head.n_clusters:,} clusters"
            self._options.say(f"With FlashHead: {use.name}, {clusters} scored per token.")
        use.take(head)

    def _say_without(self, error: Exception) -> None:
        if not self._warned:
            self._options.say(f"Without FlashHead: {sentence(error)}")
        self._warned = True

    def _decided(self, decide: Callable[..., Decision], *arguments: Any) -> Decision | None:
        """What a function decides about a text; None, and a line, where it fails."""
        try:
            return decide(*arguments)
        except Exception as error:  # the text is then decoded as without this package
            self._say_without(error)
            return None

    def _use_of(self, model: Any) -> Use | None:
        """What is said of a text that begins; None for a model that is not recognised."""
        use = self._known_use(model)
        if use is not None:
            use.begin()
        return use

    def _known_use(self, model: Any) -> Use | None:
        build = self._builds.get(id(model))
        if build is not None:
            built = build.take_over(model)
            if build.is_building:
                return build.use
            self._end_build(id(model))
            if built is not None:
                self._begin_use(build.use, built)
        head = get_flash_head(model) if self._options.verify else None
        owner = None if head is None else getattr(head.projection, "__self__", None)
        return owner if isinstance(owner, Use) else None

    def load(self, original: Any) -> Any:
        @wraps(original)
        def load(path_or_hf_repo: Any, *arguments: Any, **named: Any) -> Any:
            try:
                loaded = original(path_or_hf_repo, *arguments, **named)
            except Exception as error:
                name = str(path_or_hf_repo)
                known = Path(name).expanduser().exists()
                reason = None if known else hub_sentence(error, name)
                if reason is not None:  # which stands below the traceback
                    error.add_note(printable(f"mlx_flashhead.run: {reason}"))
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
            folder = Path(model_path)
            ends = loaded[1].get("eos_token_id")
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
            loop = None if options is None else self._decided(take, original, options)
            yield from original(*arguments, **named) if loop is None else loop

        return steps

    def _steps(self, original: Any, options: dict[str, Any]) -> Iterator[Any] | None:
        model = options["model"]
        use = self._use_of(model)
        if use is None:
            return None
        mode = use.mode_of(model)
        if not mlx_lm_is_as_imported():
            mode = REPLACED
        looks_up = self._options.lookup != "off" and mode != "unverified"
        if mode in (REPLACED, BUILDING) or (mode != "verified" and not looks_up):
            return use.follow(original(**options), mode)
        proposer = Proposer(model, DecodingSettings(lookup=self._options.lookup))
        return verified_steps(**options, proposer=proposer, announce=use.announce)

    def _drafted(self, original: Any, options: dict[str, Any]) -> Iterator[Any] | None:
        """With a draft model the target is dense: it is the draft's FlashHead that is used."""
        model = options["model"]
        draft_model = options["draft_model"]
        draft = self._use_of(draft_model)
        if draft is None or options.get("logits_processors"):
            return None
        use = self._use_of(model) or draft
        if draft.is_waiting or not mlx_lm_is_as_imported():
            mode = BUILDING if draft.is_waiting else REPLACED
            return draft.follow(use.follow(original(**options), mode))
        if not is_recognised(draft_model):
            return None
        proposer = Proposer(model, DecodingSettings(lookup=self._options.lookup))
        steps = drafted_steps(**options, proposer=proposer, announce=use.announce)
        return draft.follow(use.follow(steps))

    def batches(self, original: Any) -> Any:
        """mlx-lm's ``BatchGenerator``, which decides at its first use who decodes."""
        return batch_class(partial(self._decided, self._use_of))

    def vlm_loop(self, original: Any) -> Any:
        """mlx-vlm's loop of a text, verified where it is greedy."""

        @wraps(original)
        def steps(
            input_ids: Any, model: Any, pixel_values: Any, mask: Any, **named: Any
        ) -> Iterator[Any]:
            prompt = (input_ids, model, pixel_values, mask)
            loop = self._decided(self._vlm_steps, original, prompt, named)
            yield from original(*prompt, **named) if loop is None else loop

        return steps

    def _vlm_steps(
        self, original: Any, prompt: tuple[Any, Any, Any, Any], named: dict[str, Any]
    ) -> Iterator[Any] | None:
        model = prompt[1]
        use = self._use_of(model)
        if use is None:
            return None
        mode = use.mode_of(model)
        loop = None
        if mode == "verified":
            mode = ONLY_GREEDY
            loop = vlm_steps(original, *prompt, named, use.announce)
        return use.follow(original(*prompt, **named), mode) if loop is None else loop
