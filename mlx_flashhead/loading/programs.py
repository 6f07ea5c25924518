"""A FlashHead under the loads of mlx-lm and mlx-vlm, for programs that do not know it."""

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, partial, wraps
from inspect import BoundArguments, signature
from pathlib import Path
from typing import Any, TypeVar
from weakref import finalize

from ..common.command import printable, sentence
from ..common.interrupts import INTERRUPTED
from ..decoding.drafting import drafted_tokens
from ..decoding.loop import verified_tokens, why_mlx_lms_own
from ..decoding.phase import Mode
from ..decoding.proposer import Proposer
from ..decoding.settings import DecodingSettings
from ..decoding.vlm_text import vlm_tokens
from ..interop.replace import Wrap, put_all_in_place
from ..models.compat.mlx_lm import load_tokenizer, make_prompt_cache
from ..models.fetch import hub_sentence, resolve
from ..models.install import detach, get_flash_head
from ..models.loading import check_format
from ..models.origin import local_origin
from ..models.trained_drafter import CONFIG, TrainedDrafter, is_trained_drafter, read_config
from ..models.trust import is_recognised
from ..models.vlm import is_vlm
from .background import LEFT, PREPARING, Build
from .batches import batch_class
from .drafts import DraftOptions, load_draft
from .head_options import BUILD, LATER, VARIABLE, HeadOptions
from .load import attach_head
from .sources import explicit_head
from .use import BUILDING, Use, check_before_sigterm

Decision = TypeVar("Decision")
Take = Callable[[Any, BoundArguments], Iterator[Any] | None]  # a loop that decodes in place of one

_plain: ContextVar[bool] = ContextVar("plain", default=False)  # within a function of mlx-lm's
# Modules that load a model and do not generate: they convert it, train it, measure its layers.
WITHOUT_TEXT = {
    "mlx_lm.cache_prompt", "mlx_lm.fuse", "mlx_lm.lora", "mlx_lm.quant.awq", "mlx_lm.quant.dwq",
    "mlx_lm.quant.dynamic_quant", "mlx_lm.quant.gptq", "mlx_vlm.lora", "mlx_vlm.train",
}  # fmt: skip
ONLY_GREEDY = Mode.dense("with mlx-vlm only greedy text is verified")


def patch_library(library: str) -> None:
    """From now on the loads of mlx-lm or mlx-vlm attach a FlashHead, if they can.

    The options are in the environment.

    Args:
        library: "mlx_lm" or "mlx_vlm".
    """
    put_all_in_place(_patches().wraps[library])


@cache  # once per process
def _patches() -> "_Patches":
    options = HeadOptions(**json.loads(os.environ[VARIABLE]))
    if options.check:
        check_before_sigterm()
    return _Patches(options)


@contextmanager
def plainly() -> Iterator[None]:
    """A block, or a function, whose loads get no FlashHead: it goes on with the dense model."""
    before = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(before)


def process_generates() -> bool:
    """Whether this process has imported no module without text, and runs none."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    running = "" if spec is None else spec.name
    # mlx-lm itself imports this one, whose function is called plainly
    return running != "mlx_lm.convert" and not WITHOUT_TEXT & {running, *sys.modules}


class _FirstUse:
    """A program's use of a model whose FlashHead is built while the program writes nothing.

    When the process ends, what is left of the build is done at a terminal. A program that ends by
    an error, or by Ctrl-C, leaves it for the next use.

    Args:
        use: Says what there is to say, and knows when the program has used the model.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path, options: HeadOptions, use: Use):
        self.use = use
        telling = replace(options, tell=use.say)
        self.build = Build(model, tokenizer, folder, telling, lambda: use.is_quiet)
        atexit.register(self._end)

    def _end(self) -> None:
        if self.build.has_ended or self.build.closed:
            return
        at_terminal = sys.stderr.isatty()
        if self.build.stored is None and at_terminal and not hasattr(sys, "last_type"):
            self.use.say(PREPARING, at_once=True)
            try:
                self.build.wait()
            except KeyboardInterrupt:
                self.use.say(LEFT, at_once=True)
            except Exception as error:  # the model goes on with its normal head next time
                self.use.say(f"Without FlashHead: {sentence(error)}", at_once=True)
        self.build.leave()
        if self.build.stored is not None:
            self.use.say("FlashHead is ready for next time.", at_once=True)
        elif not at_terminal:  # a script waits for its end
            self.use.say(
                "FlashHead is not built yet, and goes on next time: --build-first builds it before "
                "the first text, and `mlx_flashhead.cache --build MODEL` now.",
                at_once=True,
            )


def _what_is_wrong(name: str, error: Exception) -> str | None:
    """What a user can do about a model that does not load; None where the error says so."""
    folder = Path(name).expanduser()
    if not folder.exists():
        return hub_sentence(error, name)
    try:
        check_format(folder)
    except ValueError as problem:
        return str(problem)
    return None


def _use_of_head(model: Any) -> Use | None:
    """The use that gets the calls of a model's FlashHead; None if there is none."""
    head = get_flash_head(model)
    if head is None:
        return None
    use = getattr(head.projection, "__self__", None)
    return use if isinstance(use, Use) else None


class _Patches:
    """What takes the places of the libraries' functions.

    Attributes:
        wraps: For each library, and each name of it that is replaced, what makes the replacement.
    """

    def __init__(self, options: HeadOptions):
        self.wraps: dict[str, dict[str, Wrap]] = {
            "mlx_lm": {
                "mlx_lm.utils.load": self.load,
                "mlx_lm.utils.load_model": self.load_model,
                "mlx_lm.utils.sharded_load": plainly(),
                "mlx_lm.convert.convert": plainly(),
                "mlx_lm.generate.generate_step": partial(self.loop, self.text_loop),
                "mlx_lm.generate.speculative_generate_step": partial(self.loop, self.drafted_loop),
                "mlx_lm.generate.BatchGenerator": self.batches,
            },
            "mlx_vlm": {
                "mlx_vlm.utils.load": self.load,
                "mlx_vlm.generate.ar.generate_step": partial(self.loop, self.vlm_loop),
            },
        }
        self._options = options
        self._warned = False
        self._builds: dict[int, _FirstUse] = {}  # by the id of a model without a FlashHead
        self._drafters: dict[int, TrainedDrafter] = {}  # by the id of a model
        self._tokenizer: Any = None  # of the latest model

    def _attach(
        self, model: Any, tokenizer_of: Callable[[], Any], path: Any, revision: str | None = None
    ) -> None:
        if _plain.get() or not process_generates():
            return
        options = self._options
        before = get_flash_head(model)
        try:
            # mlx_vlm.generate names a revision of a folder too
            revision = None if Path(path).expanduser().is_dir() else revision
            folder = resolve(str(path), revision)  # the libraries download no FlashHead
            stored = explicit_head(options, folder)
            if is_vlm(model) and options.missing == LATER:
                options = replace(options, missing=BUILD)
            tokenizer = tokenizer_of()
            self._tokenizer = tokenizer
            drafter = self._drafter_of(model, folder)
            head = attach_head(model, tokenizer, stored, folder, options)
            use = Use(local_origin(folder).known_as, options, drafter)
            if head is None:
                self._builds[id(model)] = _FirstUse(model, tokenizer, folder, options, use)
                finalize(model, self._end_build, id(model)).atexit = False
            else:
                use.take(head)
        except KeyboardInterrupt:
            options.say("Interrupted: the next use of the model tries again.")
            sys.exit(INTERRUPTED)
        except Exception as error:  # whatever it is, the program goes on as without this package
            self._say_without(error)
            if get_flash_head(model) is not before:
                detach(model)

    def _drafter_of(self, model: Any, folder: Path) -> TrainedDrafter | None:
        """The trained drafter that the options name for a model; None, and a line, without it."""
        options = self._options
        if is_vlm(model) or not (options.draft_model or options.mtp):
            return None
        drafting = DraftOptions(options.draft_model, options.mtp)
        try:
            drafting.check(str(folder))
            name = options.draft_model
            # loading a model would come here again
            if name and not is_trained_drafter(read_config(resolve(name, files=[CONFIG]))):
                raise ValueError(
                    f"{name} is a model of its own: name it to the program, which drafts with it."
                )
            drafter: TrainedDrafter = drafting.load(model, folder, options, trust_remote_code=False)
        except (ValueError, OSError) as error:
            options.say(f"Without drafts: {sentence(error)}")
            return None
        self._drafters[id(model)] = drafter
        finalize(model, self._drafters.pop, id(model), None).atexit = False
        return drafter

    def _end_build(self, key: int) -> None:
        build = self._builds.pop(key, None)
        if build is not None:
            build.build.close()

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
        use = self._use_of_build(model)
        if use is None and self._options.verify:
            use = _use_of_head(model)
        if use is not None:
            use.begin()
        return use

    def _use_of_build(self, model: Any) -> Use | None:
        """The use of a model whose FlashHead is being built. One that is ready is put on it."""
        first_use = self._builds.get(id(model))
        if first_use is None:
            return None
        built = first_use.build.take_over(model)
        if built is not None:
            first_use.use.take(built)
        if first_use.build.under_way:
            return first_use.use
        self._end_build(id(model))
        return None

    def load(self, original: Any) -> Any:
        @wraps(original)
        def load(path_or_hf_repo: Any, *arguments: Any, **named: Any) -> Any:
            try:
                with plainly():
                    loaded = original(path_or_hf_repo, *arguments, **named)
            except Exception as error:
                name = str(path_or_hf_repo)
                if (drafter := self._trained_drafter(name)) is not None:
                    return drafter, self._tokenizer
                reason = _what_is_wrong(name, error)
                if reason is not None:  # which stands below the traceback
                    error.add_note(printable(f"mlx_flashhead.run: {reason}"))
                    error.__suppress_context__ = True  # the Hub's own errors, one behind the other
                    error.__cause__ = None
                raise
            self._attach(loaded[0], lambda: loaded[1], path_or_hf_repo, named.get("revision"))
            return loaded

        return load

    def _trained_drafter(self, name: str) -> TrainedDrafter | None:
        """The trained drafter of this name, which mlx-lm cannot load; None if it is none."""
        try:
            config = read_config(resolve(name, files=[CONFIG]))
        except ValueError:
            return None
        return load_draft(name)[0] if is_trained_drafter(config) else None

    def load_model(self, original: Any) -> Any:
        @wraps(original)
        def load_model(model_path: Any, *arguments: Any, **named: Any) -> Any:
            loaded = original(model_path, *arguments, **named)
            folder = Path(model_path)
            ends = loaded[1].get("eos_token_id")
            self._attach(loaded[0], partial(load_tokenizer, folder, eos_token_ids=ends), folder)
            return loaded

        return load_model

    def loop(self, take: Take, original: Any) -> Any:
        """A library's loop of a text, which decides at its first token who decodes."""
        parameters = signature(original)

        @wraps(original)
        def steps(*arguments: Any, **named: Any) -> Iterator[Any]:
            call = parameters.bind(*arguments, **named)
            loop = self._decided(take, original, call)
            yield from loop or original(*arguments, **named)

        return steps

    def text_loop(self, original: Any, call: BoundArguments) -> Iterator[Any] | None:
        """The loop that decodes in the place of mlx-lm's; None if that one does."""
        options = call.arguments
        model = options["model"]
        use = self._use_of(model)
        own = why_mlx_lms_own(model)
        if own is not None:
            return None if use is None else use.follow(original(**options), own)
        drafter = self._drafters.get(id(model))
        if drafter is not None and options.get("input_embeddings") is None:
            return self._guessed(drafter, options, use)
        if use is None:
            return None
        mode = use.mode_of(model)
        looks_up = self._options.lookup != "off"
        if mode == BUILDING or not (mode.is_verified or looks_up):
            return use.follow(original(**options), mode)
        proposer = Proposer(model, DecodingSettings(lookup=self._options.lookup))
        return verified_tokens(**options, proposer=proposer, announce=use.announce)

    def _guessed(
        self, drafter: TrainedDrafter, options: dict[str, Any], use: Use | None
    ) -> Iterator[Any]:
        """A text of mlx-lm's loop, with a drafter."""
        model = options["model"]
        proposer = Proposer(model, DecodingSettings(lookup=self._options.lookup))
        given = {"num_draft_tokens": self._options.num_draft_tokens} | options
        limit = given.pop("max_kv_size", None)
        given["prompt_cache"] = given.get("prompt_cache") or make_prompt_cache(model, limit)
        announce = None if use is None else use.announce
        steps = drafted_tokens(**given, draft_model=drafter, proposer=proposer, announce=announce)
        with closing(steps):
            for token, logprobs, _ in steps:
                yield token, logprobs

    def drafted_loop(self, original: Any, call: BoundArguments) -> Iterator[Any] | None:
        """With a draft model the target is dense: it is the draft's FlashHead that is used."""
        options = call.arguments
        model = options["model"]
        draft_model = options["draft_model"]
        if isinstance(draft_model, TrainedDrafter):
            return self._drafted(draft_model, options)
        draft = self._use_of(draft_model)
        if draft is None or options.get("logits_processors"):
            return None
        use = self._use_of(model) or draft
        own = why_mlx_lms_own(model)
        if own is not None:
            return draft.follow(use.follow(original(**options), own))
        # while the draft's FlashHead is being built its drafts are dense, and the text is the same
        is_built = get_flash_head(draft_model) is not None
        if is_built and not is_recognised(draft_model):
            return None
        proposer = Proposer(model, DecodingSettings(lookup=self._options.lookup))
        steps = drafted_tokens(**options, proposer=proposer, announce=use.announce)
        return draft.follow(use.follow(steps))

    def _drafted(self, drafter: TrainedDrafter, options: dict[str, Any]) -> Iterator[Any]:
        """A text with a trained drafter that was named to the program.

        It fails where that is another model's: no loop of mlx-lm could take the drafter.
        """
        model = options["model"]
        drafter.check_target(model)
        proposer = Proposer(model, DecodingSettings(lookup=self._options.lookup))
        use = self._use_of(model)
        announce = None if use is None else use.announce
        yield from drafted_tokens(**options, proposer=proposer, announce=announce)

    def batches(self, original: Any) -> Any:
        """mlx-lm's ``BatchGenerator``, which decides at its first use who decodes."""
        return batch_class(partial(self._decided, self._use_of))

    def vlm_loop(self, original: Any, call: BoundArguments) -> Iterator[Any] | None:
        """The loop in the place of mlx-vlm's, verified where it is greedy."""
        model = call.arguments["model"]
        use = self._use_of(model)
        if use is None:
            return None
        mode = use.mode_of(model)
        loop = None
        if mode.is_verified:
            mode = ONLY_GREEDY
            ids, _, pixel_values, mask = call.args
            loop = vlm_tokens(original, ids, model, pixel_values, mask, call.kwargs, use.announce)
        return loop or use.follow(original(*call.args, **call.kwargs), mode)
