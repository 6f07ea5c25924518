"""mlx-lm's ``BatchGenerator`` for programs that know nothing of FlashHead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import update_wrapper
from inspect import signature
from typing import Any

from ..common.command import sentence
from ..decoding.batch import VerifiedBatchGenerator
from ..decoding.proposer import Proposer
from ..decoding.settings import DecodingSettings
from ..models.compat import mlx_lm as compat
from ..models.compat import other_programs
from .use import Use

# Attributes that a program may set between two texts.
NUMBERS = (
    "max_tokens", "completion_batch_size", "prefill_batch_size", "prefill_step_size", "max_kv_size",
)  # fmt: skip
CHANGED = "dense: this program changes mlx-lm's batches"


class _Texts:
    """The texts of our batch, where a program looks for those of mlx-lm's."""

    def __init__(self, verified: VerifiedBatchGenerator):
        self._verified = verified

    @property
    def uids(self) -> list[int]:
        return self._verified.uids()

    def __len__(self) -> int:
        return len(self.uids)

    def extract_cache(self, idx: int) -> list[Any]:
        uid = self.uids[idx]
        caches: list[Any] = self._verified.extract_cache([uid])[uid][0]
        return caches


@dataclass
class _State:
    """What a generator of a program keeps besides mlx-lm's attributes.

    Attributes:
        options: The keywords that it was made with.
        as_made: Its attributes when mlx-lm had made it.
        verified: What decodes in its place; None if mlx-lm's own does.
        used: The keywords of ``verified``.
        own: The texts that mlx-lm's own decodes.
        use: What is said of the model's texts; None for a model that is not recognised.
        mode: How the texts of mlx-lm's own are decoded.
    """

    options: dict[str, Any]
    as_made: dict[str, Any]
    verified: VerifiedBatchGenerator | None = None
    used: dict[str, Any] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    use: Use | None = None
    mode: str = ""

    def choose(self, generator: Any, use: Use | None, *, unchanged: bool) -> None:
        """Chooses what decodes the texts that are added from now on."""
        numbers = {name: getattr(generator, name) for name in NUMBERS}
        options = self.options | numbers
        self.use = use
        self.mode = "" if use is None else use.mode_of(generator.model)
        if self.mode == "verified" and not (unchanged and self._is_as_made(generator)):
            self.mode = CHANGED
        if self.verified is not None and (self.mode != "verified" or options != self.used):
            self.verified.close()
            self.verified = None
        if self.mode == "verified" and self.verified is None and use is not None:
            try:
                proposer = Proposer(generator.model, DecodingSettings(lookup=use.lookup))
                self.verified = VerifiedBatchGenerator(
                    generator.model, proposer=proposer, announce=use.announce, **options
                )
                self.used = options
            except Exception as error:  # mlx-lm's own would have decoded
                self.mode = f"dense: {sentence(error)}".removesuffix(".")

    def _is_as_made(self, generator: Any) -> bool:
        """Whether a program has set no attribute that mlx-lm reads, but for some numbers."""
        values = vars(generator)
        for name, value in self.as_made.items():
            private = name.startswith("_")
            if not private and name not in NUMBERS and values.get(name, self) is not value:
                return False
        added = values.keys() - self.as_made.keys() - {"_flash"}
        return not any(hasattr(compat.BatchGenerator, name) for name in added)

    def step(self, step: Callable[[], Any]) -> Any:
        """A step of mlx-lm's own, whose tokens are announced."""
        use = self.use
        if use is None:
            return step()
        with use.announcing():
            responses = step()
        for response in responses[1] if isinstance(responses, tuple) else responses:
            use.announce(self.mode)
            if response.finish_reason is not None:
                self.own.discard(response.uid)
        return responses


class _BatchGenerator(compat.BatchGenerator):
    """What has mlx-lm's name under `mlx_flashhead.run`; :func:`batch_class` makes it."""

    _use_of: Callable[[Any], Use | None]

    def __init__(self, model: Any, **options: Any):
        super().__init__(model, **options)
        self._flash = _State(options, dict(vars(self)))

    def _choose(self) -> _State:
        """What decodes the texts that are added now: while others are in progress, as those."""
        state = self._flash
        in_progress = state.own or (state.verified is not None and state.verified.uids())
        if not in_progress:
            cls = type(self)
            unchanged = cls in _as_made and vars(cls) == _as_made[cls]
            unchanged = unchanged and other_programs.batches_are_as_imported(self.model)
            state.choose(self, self._use_of(self.model), unchanged=unchanged)
            verified = state.verified
            batch = state.as_made["_generation_batch"] if verified is None else _Texts(verified)
            self._generation_batch = batch
        return state

    def insert_segments(self, *arguments: Any, **options: Any) -> Any:
        state = self._choose()
        verified = state.verified
        if verified is None:
            uids = super().insert_segments(*arguments, **options)
            state.own.update(uids)
            return uids
        parameters = signature(compat.BatchGenerator.insert_segments)
        named = parameters.bind(self, *arguments, **options).arguments
        del named["self"]
        named["logits_processors"] = other_programs.adapted(named.get("logits_processors"))
        verified.n_inserted = self._uid_count
        uids = verified.insert_segments(**named)
        self._uid_count = verified.n_inserted
        return uids

    def next(self) -> Any:
        verified = self._flash.verified
        return self._flash.step(super().next) if verified is None else verified.next()

    def next_generated(self) -> Any:
        verified = self._flash.verified
        if verified is None:
            return self._flash.step(super().next_generated)
        return verified.next_generated()

    def extract_cache(self, uids: Any) -> Any:
        verified = self._flash.verified
        return super().extract_cache(uids) if verified is None else verified.extract_cache(uids)

    def remove(self, uids: Any, return_prompt_caches: bool = False) -> Any:
        verified = self._flash.verified
        if verified is not None:
            return verified.remove(uids, return_prompt_caches)
        self._flash.own.difference_update(uids)
        return super().remove(uids, return_prompt_caches)

    @contextmanager
    def stats(self, *arguments: Any) -> Iterator[Any]:
        verified = self._choose().verified
        with super().stats(*arguments) if verified is None else verified.stats() as stats:
            yield stats

    @property
    def prompt_cache_nbytes(self) -> int:
        verified = self._flash.verified
        return super().prompt_cache_nbytes if verified is None else verified.prompt_cache_nbytes

    def close(self) -> None:
        state = getattr(self, "_flash", None)
        if state is not None and state.verified is not None:
            state.verified.close()
        super().close()


# mlx-openai-server asks for its parameters
update_wrapper(_BatchGenerator.__init__, compat.BatchGenerator.__init__)

_as_made: dict[type, dict[str, Any]] = {}  # what :func:`batch_class` has made, with its attributes


def batch_class(use_of: Callable[[Any], Use | None]) -> type:
    """Makes a ``BatchGenerator`` of mlx-lm that decodes as :class:`VerifiedBatchGenerator`.

    Where a program has changed mlx-lm's batches, or an attribute of the generator, the generator
    is mlx-lm's own. Which of the two decodes is chosen when a text is added and none is in
    progress.

    Args:
        use_of: What is said of a model's texts; None for a model that is not recognised.
    """
    original: Any = compat.BatchGenerator
    named = {name: getattr(original, name) for name in ("__doc__", "__module__", "__qualname__")}
    made = type(original.__name__, (_BatchGenerator,), named | {"_use_of": staticmethod(use_of)})
    _as_made[made] = dict(vars(made))
    return made
