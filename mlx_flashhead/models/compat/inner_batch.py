"""What is read, set and overridden within mlx-lm's ``BatchGenerator``.

Read in mlx-lm 0.31.3 and 0.32.2 (``mlx_lm.generate``). Of the names that are not public:

- ``_uid_count`` is the number of the next text.
- ``_unprocessed_sequences`` are the texts of which nothing was read, in the order of `Waiting`.
- ``_prompt_batch`` are the prompts that are being read, a ``PromptProcessingBatch``.
- ``_generation_batch`` are the texts that are being decoded, a ``GenerationBatch``.
- ``_next`` takes a step, in ``next`` and ``next_generated``.
- ``_old_wired_limit`` is what ``close`` puts back, also when ``__init__`` has failed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from .mlx_lm import BatchGenerator


class Waiting(NamedTuple):
    """A text of which nothing was read, in mlx-lm's order.

    Attributes:
        uid: Its number.
        segments: The tokens of its prompt, in parts.
        max_tokens: How many tokens it may have.
        cache: Its caches, one for each layer.
        held: The tokens in the caches.
        sampler: Its sampler.
        processors: Its logits processors.
        stops: Its stop sequences, of 0.31 a state machine.
    """

    uid: int
    segments: list[list[int]]
    max_tokens: int
    cache: Any
    held: list[int]
    sampler: Any
    processors: Any
    stops: Any


class ClosableBatchGenerator(BatchGenerator):
    """mlx-lm's ``BatchGenerator``, which is closed even if it could not be made."""

    _old_wired_limit: int | None = None


class SteppedBatchGenerator(BatchGenerator):
    """mlx-lm's ``BatchGenerator``, whose inner step has a public name."""

    def _next(self) -> Any:
        return self.step()

    def step(self) -> Any:
        """Takes a step. Returns the responses of prompts and of texts."""
        return super()._next()


def next_uid(generator: Any) -> int:
    """The number of the text that is inserted next."""
    uid: int = generator._uid_count
    return uid


def number_from(generator: Any, uid: int) -> None:
    """Has the text that is inserted next get a number."""
    generator._uid_count = uid


def waiting_texts(generator: Any) -> Iterator[Waiting]:
    """The texts of which nothing was read."""
    return map(Waiting._make, generator._unprocessed_sequences)


def set_prompts(generator: Any, prompts: Any) -> None:
    """Puts an empty batch in the place of the one in which prompts are read."""
    generator._prompt_batch = prompts


def decoded_texts(generator: Any) -> Any:
    """The batch of the texts that are being decoded."""
    return generator._generation_batch


def set_decoded_texts(generator: Any, texts: Any) -> None:
    """Puts something in the place of the batch of the texts that are being decoded."""
    generator._generation_batch = texts
