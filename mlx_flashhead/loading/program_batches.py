"""mlx-lm's ``BatchGenerator`` for programs that know nothing of FlashHead."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

from ..common.command import sentence
from ..decoding.batch import VerifiedBatchGenerator
from ..decoding.phase import NO_HEAD, VERIFIED, Mode
from ..decoding.proposer import Proposer
from ..decoding.sampling import Processor, SamplerFunction
from ..decoding.settings import DecodingSettings
from ..models.compat import inner_batch, other_programs
from ..models.compat import mlx_lm as compat
from .use import Use

# Attributes that a program may set between two texts.
NUMBERS = (
    "max_tokens", "completion_batch_size", "prefill_batch_size", "prefill_step_size", "max_kv_size",
)  # fmt: skip
FUNCTIONS = [
    name
    for name, value in vars(compat.BatchGenerator).items()
    if callable(value) or isinstance(value, property)
]
CHANGED_BATCHES = Mode.dense("this program changes mlx-lm's batches")


class _DecodedTexts:
    """The texts of our batch, where vllm-mlx 0.6.0 looks for those of mlx-lm's."""

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


class _BatchGenerator(inner_batch.SteppedBatchGenerator):
    """What has mlx-lm's name under `mlx_flashhead.run`; :func:`batch_class` makes it.

    What decodes is chosen when a text is added and none is in progress.

    Attributes:
        _use_of: Returns what is said of a model's texts; None for one that is not recognised.
        _use: What is said of these texts.
        _mode: How mlx-lm's own decodes its texts.
        _verified: Decodes in the place of mlx-lm's own.
        _options: Those of ``_verified``.
        _own: The texts that mlx-lm's own decodes.
    """

    _use_of: Callable[[Any], Use | None]
    _use: Use | None = None
    _mode: Mode = NO_HEAD
    _verified: VerifiedBatchGenerator | None = None
    _options: dict[str, Any]

    def __init__(self, model: Any, **options: Any):
        super().__init__(model, **options)
        self._given = options
        self._as_made = (self.sampler, self.logits_processors)
        self._own_batch = inner_batch.decoded_texts(self)
        self._own: set[int] = set()

    def _choose(self) -> VerifiedBatchGenerator | None:
        """What decodes the texts that are added now: while others are in progress, as those."""
        verified = self._verified
        if self._own or (verified is not None and verified.uids()):
            return verified
        options = self._given | {name: getattr(self, name) for name in NUMBERS}
        use = self._use_of(self.model)
        self._use = use
        self._mode = NO_HEAD
        if use is not None:
            self._mode = use.mode_of(self.model)
        if self._mode == VERIFIED and not self._is_mlx_lms():
            self._mode = CHANGED_BATCHES
        if verified is not None and (self._mode != VERIFIED or options != self._options):
            verified.close()
            verified = None
        if self._mode == VERIFIED and verified is None and use is not None:
            try:
                proposer = Proposer(self.model, DecodingSettings(lookup=use.lookup))
                verified = VerifiedBatchGenerator(
                    self.model,
                    proposer=proposer,
                    announce=use.announce,
                    drafter=use.drafter,
                    num_draft_tokens=use.n_drafts,
                    **options,
                )
            except Exception as error:
                # mlx-lm's own decodes them, as without this package.
                self._mode = Mode.dense(sentence(error).removesuffix("."))
        self._verified = verified
        self._options = options
        shown = self._own_batch
        if verified is not None:
            shown = _DecodedTexts(verified)
        inner_batch.set_decoded_texts(self, shown)
        return verified

    def _is_mlx_lms(self) -> bool:
        """Whether a program has left the functions of mlx-lm's batches, and its arguments."""
        for name in FUNCTIONS:
            ours = getattr(_BatchGenerator, name)
            if name in vars(self) or getattr(type(self), name) is not ours:
                return False
        as_made = self._as_made == (self.sampler, self.logits_processors)
        return as_made and other_programs.batches_are_as_imported(self.model)

    def insert_segments(  # type: ignore[override]
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int] | None = None,
        caches: list[list[Any] | None] | None = None,
        all_tokens: list[list[int]] | None = None,
        samplers: list[SamplerFunction | None] | None = None,
        logits_processors: list[Sequence[Processor] | None] | None = None,
        *stops: Any,
        **named_stops: Any,
    ) -> list[int]:
        """Adds texts. The name of their stops is the one that mlx-lm's version has."""
        verified = self._choose()
        insert: Any = super().insert_segments
        if verified is not None:
            insert = verified.insert_segments
            logits_processors = other_programs.adapted(logits_processors)
            inner_batch.number_from(verified, inner_batch.next_uid(self))
        uids: list[int] = insert(
            segments,
            max_tokens,
            caches,
            all_tokens,
            samplers,
            logits_processors,
            *stops,
            **named_stops,
        )
        if verified is None:
            self._own.update(uids)
        else:
            inner_batch.number_from(self, inner_batch.next_uid(verified))
        return uids

    def step(self) -> Any:
        use = self._use
        if self._verified is not None:
            return self._verified.next()
        if use is None:
            return super().step()
        with use.announcing():
            prompts, texts = super().step()
        for response in texts:
            use.announce(self._mode)
            if response.finish_reason is not None:
                self._own.discard(response.uid)
        return prompts, texts

    def next_generated(self) -> Any:
        if self._verified is not None:
            return self._verified.next_generated()
        return super().next_generated()

    def extract_cache(self, uids: list[int]) -> Any:
        if self._verified is not None:
            return self._verified.extract_cache(uids)
        return super().extract_cache(uids)

    def remove(self, uids: list[int], return_prompt_caches: bool = False) -> Any:
        self._own.difference_update(uids)
        if self._verified is not None:
            return self._verified.remove(uids, return_prompt_caches)
        return super().remove(uids, return_prompt_caches)

    @contextmanager
    def stats(self, *arguments: Any) -> Iterator[Any]:
        verified = self._choose()
        block = super().stats
        if verified is not None:
            block = verified.stats
            arguments = ()
        with block(*arguments) as stats:
            yield stats

    @property
    def prompt_cache_nbytes(self) -> int:
        if self._verified is not None:
            return self._verified.prompt_cache_nbytes
        return super().prompt_cache_nbytes

    def close(self) -> None:
        if self._verified is not None:
            self._verified.close()
        super().close()


# mlx-openai-server asks for its parameters.
update_wrapper(_BatchGenerator.__init__, compat.BatchGenerator.__init__)


def batch_class(use_of: Callable[[Any], Use | None]) -> type:
    """Makes a ``BatchGenerator`` of mlx-lm that decodes as :class:`VerifiedBatchGenerator`.

    Where a program has changed mlx-lm's batches, or an attribute of the generator, the generator
    is mlx-lm's own.

    Args:
        use_of: What is said of a model's texts; None for a model that is not recognised.
    """
    original: Any = compat.BatchGenerator
    named = {name: getattr(original, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(original.__name__, (_BatchGenerator,), named | {"_use_of": staticmethod(use_of)})
