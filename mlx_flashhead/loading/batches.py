"""mlx-lm's ``BatchGenerator`` for programs that know nothing of FlashHead."""

import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from types import CodeType, FrameType, FunctionType
from typing import Any

from ..common.command import sentence
from ..decoding.batch import VerifiedBatchGenerator
from ..decoding.policy import decoding_mode
from ..models.compat import mlx_lm as compat
from ..models.compat import other_programs as known
from .use import Use

# Of mlx-lm, with the functions that they have as imported: a program may replace some.
CLASSES = (compat.BatchGenerator, compat.PromptProcessingBatch, compat.GenerationBatch)
_as_imported = [(cls, dict(vars(cls))) for cls in CLASSES]
_mlx_lm_file = compat.BatchGenerator.__init__.__code__.co_filename
OPTIONS = {
    "max_tokens", "stop_tokens", "sampler", "logits_processors", "completion_batch_size",
    "prefill_batch_size", "prefill_step_size", "max_kv_size", "stream",
}  # fmt: skip
# Numbers that a program may set before its first text.
NUMBERS = {
    "max_tokens", "completion_batch_size", "prefill_batch_size", "prefill_step_size", "max_kv_size",
}  # fmt: skip
METHODS = (
    "__init__", "insert_segments", "next", "next_generated", "extract_cache", "remove", "stats",
    "close",
)  # fmt: skip
# What only a program mentions that looks into the batches.
INSIDE = {"_generation_batch", "_prompt_batch", "_unprocessed_sequences", "_currently_processing"}
CHANGED = "dense: this program changes mlx-lm's batches, or looks into them"


class _Seen:
    """What a program sees that looks for a batch while ours decodes.

    It sees the texts in it, until the last of them has ended and the program gets mlx-lm's own.
    """

    def __init__(self, verified: VerifiedBatchGenerator, uids: list[int]):
        self._verified = verified
        self.uids = uids

    def __len__(self) -> int:
        return len(self.uids)

    def extract_cache(self, idx: int) -> list[Any]:
        uid = self.uids[idx]
        caches: list[Any] = self._verified.extract_cache([uid])[uid][0]
        return caches


class _Private:
    """A private name of mlx-lm's ``BatchGenerator``: notes that a program looks at it."""

    def __init__(self, name: str, original: type):
        self._name = name
        self._of_class = vars(original).get(name)

    def __get__(self, generator: Any, owner: type) -> Any:
        if generator is None:
            if self._of_class is None:
                raise AttributeError(self._name)
            return self._of_class
        if sys._getframe(1).f_code.co_filename != _mlx_lm_file:
            seen = generator._flash.looked_at(self._name)
            if seen is not None:
                return seen
        values = vars(generator)
        if self._name in values:
            return values[self._name]
        if self._of_class is None:
            raise AttributeError(self._name)
        return self._of_class.__get__(generator, owner)

    def __set__(self, generator: Any, value: Any) -> None:
        if sys._getframe(1).f_code.co_filename != _mlx_lm_file:
            generator._flash.looked_at(self._name)
        vars(generator)[self._name] = value


class _Handover:
    """Which batch decodes the texts of a generator: ours where all is recognised, or mlx-lm's own.

    It holds no generator, which would then live on until the garbage is collected.

    Args:
        use_of: What is said of a model's texts; None for a model that is not recognised.
        is_untouched: Whether the class of a generator is as :func:`batch_class` has made it.

    Attributes:
        changed: Whether a program has changed private attributes, or looked at them.
        verified: What decodes in the generator's place; None if mlx-lm's own does.
        own: The texts that mlx-lm decodes beside those of ``verified``.
    """

    def __init__(
        self, use_of: Callable[[Any], Use | None], is_untouched: Callable[[Any], bool]
    ) -> None:
        self.changed = False
        self.verified: VerifiedBatchGenerator | None = None
        self.own: set[int] = set()
        self._use_of = use_of
        self._is_untouched = is_untouched
        self._use: Any = None
        self._mode = ""  # how texts are decoded that are left to mlx-lm
        self._used: dict[str, Any] | None = None  # options of ``verified``
        self._decided = False
        self._options: dict[str, Any] | None = None
        self._as_made: dict[str, Any] = {}

    def note_made(self, generator: Any, options: dict[str, Any] | None) -> None:
        """Notes a generator as mlx-lm has made it, and its keywords; None if not all are known."""
        self._options = options
        self._as_made = {name: value for name, value in vars(generator).items() if name != "_flash"}

    def looked_at(self, name: str) -> Any:
        """Notes that a program looks at a private attribute.

        Returns what it sees, if that is not what mlx-lm has there.
        """
        self.changed = True
        verified = self.verified
        if verified is None or name not in INSIDE:
            return None
        return _Seen(verified, verified.uids() if name == "_generation_batch" else [])

    def decide(self, generator: Any) -> VerifiedBatchGenerator | None:
        """What decodes in a generator's place, which is decided at its first use."""
        if self._decided:
            return self.verified
        self._decided = True
        self._use = self._use_of(generator.model)
        if self._use is not None:
            self._mode = decoding_mode(generator.model)
            if self._mode == "verified":
                self._mode = CHANGED
                try:
                    self._begin(generator)
                except Exception as error:  # mlx-lm's own would have decoded
                    self._mode = f"dense: {sentence(error)}".removesuffix(".")
        return self.verified

    def settle(self, generator: Any) -> VerifiedBatchGenerator | None:
        """What decodes a text that is about to be added.

        It is mlx-lm's own if the program has changed something since, and no text is in progress.
        """
        verified = self.decide(generator)
        if verified is None or verified.uids():
            return verified
        if self._accepted(generator) != self._used:
            verified.close()
            self.verified = None
            self._begin(generator)
        return self.verified

    def step(self, step: Callable[[], Any]) -> Any:
        """A step of mlx-lm's own, whose tokens are announced."""
        use = self._use
        if use is None:
            return step()
        with use.announcing():
            responses = step()
        generated = responses[1] if isinstance(responses, tuple) else responses
        for response in generated:
            use.announce(self._mode)
            if response.finish_reason is not None:
                self.own.discard(response.uid)
        return responses

    def _begin(self, generator: Any) -> None:
        """Has ours decode in a generator's place, if that is as mlx-lm has made it."""
        self._used = self._accepted(generator)
        if self._used is not None:
            self.verified = VerifiedBatchGenerator(
                generator.model, announce=self._use.announce, **self._used
            )
            self.verified.n_inserted = vars(generator)["_uid_count"]

    def _accepted(self, generator: Any) -> dict[str, Any] | None:
        """A generator's options, if it is as mlx-lm has made it."""
        given = self._options
        if not self._is_untouched(generator):
            return None
        if self.changed or given is None or not given.keys() <= OPTIONS:
            return None
        if not all(known.is_known(cls, before, generator.model) for cls, before in _as_imported):
            return None
        values = vars(generator)
        numbers: dict[str, Any] = {}
        for name, before in self._as_made.items():
            if name in NUMBERS and values.get(name) != before:
                numbers[name] = values.get(name)
            elif values.get(name, self) is not before and not name.startswith("_"):
                return None
        # What has another name than mlx-lm's is nothing to it.
        added = values.keys() - self._as_made.keys()
        if any(hasattr(compat.BatchGenerator, name) for name in added):
            return None
        return given | numbers


def batch_class(use_of: Callable[[Any], Use | None]) -> type:  # noqa: C901 - counts a class in it
    """Makes a ``BatchGenerator`` of mlx-lm that decodes as :class:`VerifiedBatchGenerator`.

    It does so where everything is recognised at its first use. It is mlx-lm's own in all other
    cases: where the model is another one, or the program has subclassed it, replaced a function in
    it or in the classes that it uses, or looks at its private attributes. A program that does so
    later gets mlx-lm's own when no text is in progress.

    Args:
        use_of: What is said of a model's texts; None for a model that is not recognised.
    """
    original: Any = compat.BatchGenerator

    def is_untouched(generator: Any) -> bool:
        return type(generator) is BatchGenerator and dict(vars(BatchGenerator)) == as_made

    class BatchGenerator(original):
        def __init__(self, model: Any, *arguments: Any, **options: Any):
            self._flash = _Handover(use_of, is_untouched)
            super().__init__(model, *arguments, **options)
            self._flash.note_made(self, options if not arguments else None)
            if mentions_inside(sys._getframe(1)):
                self._flash.changed = True

        def insert_segments(self, *arguments: Any, **options: Any) -> Any:
            verified = self._flash.settle(self)
            if verified is None:
                return super().insert_segments(*arguments, **options)
            values = self.__dict__
            if known.needs_own_step(self, arguments, options):
                values["_uid_count"] = verified.n_inserted
                uids = super().insert_segments(*arguments, **options)
                verified.n_inserted = values["_uid_count"]
                self._flash.own.update(uids)
                return uids
            uids = verified.insert_segments(*arguments, **options)
            values["_uid_count"] = verified.n_inserted
            return uids

        def next(self) -> Any:
            verified = self._flash.decide(self)
            if verified is None:
                return self._flash.step(super().next)
            prompts, generated = verified.next()
            if self._flash.own:
                own_prompts, own_generated = self._flash.step(super().next)
                prompts = [*prompts, *own_prompts]
                generated = [*generated, *own_generated]
            return prompts, generated

        def next_generated(self) -> Any:
            verified = self._flash.decide(self)
            if verified is None:
                return self._flash.step(super().next_generated)
            if not self._flash.own:
                return verified.next_generated()
            generated: list[Any] = []
            while not generated and (verified.uids() or self._flash.own):
                _, generated = self.next()
            return generated

        def extract_cache(self, uids: Any) -> Any:
            verified = self._flash.decide(self)
            if verified is None:
                return super().extract_cache(uids)
            held = verified.extract_cache(uids)
            return held | super().extract_cache(uids) if self._flash.own else held

        def remove(self, uids: Any, return_prompt_caches: bool = False) -> Any:
            verified = self._flash.decide(self)
            if verified is None:
                return super().remove(uids, return_prompt_caches)
            held = verified.remove(uids, return_prompt_caches)
            if self._flash.own:
                held |= super().remove(uids, return_prompt_caches)
                self._flash.own.difference_update(uids)
            return held

        @contextmanager
        def stats(self, *arguments: Any) -> Iterator[Any]:
            verified = self._flash.decide(self)
            own = super().stats(*arguments) if verified is None else verified.stats()
            with own as stats:
                yield stats

        @property
        def prompt_cache_nbytes(self) -> int:
            own = int(super().prompt_cache_nbytes)
            verified = self._flash.verified
            return own if verified is None else own + verified.prompt_cache_nbytes

        def close(self) -> None:
            flash = getattr(self, "_flash", None)
            if flash is not None and flash.verified is not None:
                flash.verified.close()
            super().close()

    for name in METHODS:  # a program may ask for their parameters
        update_wrapper(vars(BatchGenerator)[name], vars(original)[name])
    for name in _private_names(original):
        setattr(BatchGenerator, name, _Private(name, original))
    BatchGenerator.__doc__ = original.__doc__
    BatchGenerator.__module__ = original.__module__
    BatchGenerator.__qualname__ = original.__qualname__
    as_made = dict(vars(BatchGenerator))
    return BatchGenerator


def _private_names(original: type) -> set[str]:
    """The private attributes that mlx-lm's ``BatchGenerator`` sets, and its private methods."""
    made = dis.get_instructions(original.__init__)  # type: ignore[misc]
    attributes = {step.argval for step in made if step.opname == "STORE_ATTR"}
    methods = {name for name, value in vars(original).items() if isinstance(value, FunctionType)}
    return {n for n in attributes | methods if n.startswith("_") and not n.startswith("__")}


def mentions_inside(frame: FrameType | None) -> bool:
    """Whether the module of a frame has code that names what is inside of mlx-lm's batches."""
    if frame is None:
        return False
    module = frame.f_globals
    codes = []
    caller: FrameType | None = frame
    while caller is not None and caller.f_globals is module:
        codes.append(caller.f_code)
        caller = caller.f_back
    for value in list(module.values()):
        inside = list(vars(value).values()) if isinstance(value, type) else [value]
        codes += [f.__code__ for f in inside if isinstance(f, FunctionType) and _is_of(f, module)]
    return any(_names_inside(code) for code in codes)


def _is_of(function: FunctionType, module: dict[str, Any]) -> bool:
    return function.__globals__ is module and not known.is_served(function)


def _names_inside(code: CodeType) -> bool:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):  # as for getattr
            names.add(constant)
        elif isinstance(constant, tuple):
            names.update(item for item in constant if isinstance(item, str))
        elif isinstance(constant, CodeType) and _names_inside(constant):
            return True
    return bool(INSIDE & names)
