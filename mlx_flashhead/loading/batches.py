"""mlx-lm's ``BatchGenerator`` for programs that know nothing of FlashHead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..decoding.batch import VerifiedBatchGenerator
from ..models.compat import mlx_lm as compat

# Of mlx-lm, with the functions that they have as imported: a program may replace some.
CLASSES = (compat.BatchGenerator, compat.PromptProcessingBatch, compat.GenerationBatch)
_as_imported = [(cls, dict(vars(cls))) for cls in CLASSES]
OPTIONS = {
    "max_tokens", "stop_tokens", "sampler", "logits_processors", "completion_batch_size",
    "prefill_batch_size", "prefill_step_size", "max_kv_size", "stream",
}  # fmt: skip

# Takes the announcements of a model's texts; None where the model is not recognised.
Announce = Callable[[str], Any]


def batch_class(announcer_of: Callable[[Any], Announce | None]) -> type:
    """A ``BatchGenerator`` of mlx-lm that decodes as :class:`VerifiedBatchGenerator` where
    everything is recognised at its first use, and as ever otherwise: where its model is another
    one, or the program has subclassed it or replaced a function in it or in the classes that it
    uses."""
    original: Any = compat.BatchGenerator

    class BatchGenerator(original):
        def __init__(self, model: Any, *arguments: Any, **options: Any):
            super().__init__(model, *arguments, **options)
            self._options = options if not arguments else None
            self._verified: VerifiedBatchGenerator | None = None
            self._decided = False
            self._as_made = {"_as_made", *vars(self)}

        def _verifies(self) -> VerifiedBatchGenerator | None:
            """What decodes in its place, if everything is recognised."""
            if self._decided:
                return self._verified
            self._decided = True
            announce = announcer_of(self.model)
            if announce is not None and self._as_mlx_lm_has_it():
                self._verified = VerifiedBatchGenerator(
                    self.model, announce=announce, **(self._options or {})
                )
            elif announce is not None:
                announce("dense: this program changes mlx-lm's batches")
            return self._verified

        def _as_mlx_lm_has_it(self) -> bool:
            if type(self) is not BatchGenerator or set(vars(BatchGenerator)) != own_names:
                return False
            if set(vars(self)) != self._as_made or self._options is None:
                return False
            return self._options.keys() <= OPTIONS and all(
                dict(vars(cls)) == known for cls, known in _as_imported
            )

        def insert_segments(self, *arguments: Any, **options: Any) -> Any:
            verified = self._verifies()
            own = super().insert_segments if verified is None else verified.insert_segments
            return own(*arguments, **options)

        def next(self) -> Any:
            verified = self._verifies()
            return super().next() if verified is None else verified.next()

        def next_generated(self) -> Any:
            verified = self._verifies()
            return super().next_generated() if verified is None else verified.next_generated()

        def extract_cache(self, uids: Any) -> Any:
            verified = self._verifies()
            return super().extract_cache(uids) if verified is None else verified.extract_cache(uids)

        def remove(self, uids: Any, return_prompt_caches: bool = False) -> Any:
            verified = self._verifies()
            own = super().remove if verified is None else verified.remove
            return own(uids, return_prompt_caches)

        @contextmanager
        def stats(self, *arguments: Any) -> Iterator[Any]:
            verified = self._verifies()
            own = super().stats(*arguments) if verified is None else verified.stats()
            with own as stats:
                yield stats

        @property
        def prompt_cache_nbytes(self) -> int:
            if self._verified is None:
                return int(super().prompt_cache_nbytes)
            return self._verified.prompt_cache_nbytes

        def close(self) -> None:
            verified = getattr(self, "_verified", None)
            if verified is not None:
                verified.close()
            super().close()

    BatchGenerator.__doc__ = original.__doc__
    BatchGenerator.__module__ = original.__module__
    BatchGenerator.__qualname__ = original.__qualname__
    own_names = set(vars(BatchGenerator))
    return BatchGenerator
