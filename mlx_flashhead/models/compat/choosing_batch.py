"""mlx-lm's batch generator, with another choice of tokens. All that touches its inside stands here:
``_next``, ``_generation_batch``, ``_prompt_batch``, ``_find_uids`` and ``_counters`` of mlx-lm
0.31.3 to 0.32.2, which has no hook for a head's states."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .mlx_lm import BatchGenerator, module
from .patching import replaced

IN_GENERATION = 2  # the stage of a sequence whose prompt is read

# Numbers of sequences, their latest tokens (R,) and caches → the next tokens (R,), launched, and
# log-probabilities (V,) of each, or None.
Choose = Callable[[list[int], mx.array, list[Any]], tuple[mx.array, list[mx.array | None]]]


class _GenerationBatch(module.GenerationBatch):  # type: ignore[name-defined]
    choose: Choose
    _next_tokens: Any
    _next_logprobs: Any

    def _step(self) -> tuple[list[int], list[Any]]:
        """mlx-lm's step, whose forward pass and sampling are ``choose``."""
        self._current_tokens, self._current_logprobs = self._next_tokens, self._next_logprobs
        inputs = self._current_tokens
        self._next_tokens, self._next_logprobs = self.choose(self.uids, inputs, self.prompt_cache)
        tokens = inputs.tolist()
        for held, token in zip(self.tokens, tokens, strict=True):
            held.append(token)
        return tokens, self._current_logprobs or [None] * len(tokens)


class _PromptBatch(module.PromptProcessingBatch):  # type: ignore[name-defined]
    generation_batch: type[_GenerationBatch]

    def generate(self, tokens: list[list[int]]) -> Any:
        with replaced(module, GenerationBatch=self.generation_batch):
            return super().generate(tokens)


class ChoosingBatchGenerator(BatchGenerator):
    """mlx-lm's ``BatchGenerator`` whose tokens are chosen by :meth:`choose`."""

    def __init__(self, model: nn.Module, **options: Any):
        super().__init__(model, **options)
        batch: Any = type(
            "GenerationBatch", (_GenerationBatch,), {"choose": staticmethod(self.choose)}
        )
        prompts: Any = type("PromptBatch", (_PromptBatch,), {"generation_batch": batch})
        self._generation_batch = batch.empty(self.model, self.sampler)
        self._prompt_batch = prompts.empty(
            self.model, self.sampler, prefill_step_size=self.prefill_step_size
        )

    def choose(
        self, uids: list[int], latest: mx.array, cache: list[Any]
    ) -> tuple[mx.array, list[mx.array | None]]:
        """The next tokens (R,) of sequences after their ``latest`` tokens (R,)."""
        raise NotImplementedError

    def advance(self) -> tuple[list[Any], list[Any]]:
        """mlx-lm's next step: responses of prompts, and of tokens."""
        return super()._next()

    def count(self, n_tokens: int) -> None:
        """Corrects mlx-lm's count of generated tokens."""
        self._counters.generation_tokens += n_tokens

    @property
    def generating(self) -> list[int]:
        """Numbers of the sequences whose tokens are generated, in the order of their rows."""
        return self._generation_batch.uids

    @property
    def generation_cache(self) -> list[Any]:
        return self._generation_batch.prompt_cache

    def is_generating(self, uid: int) -> bool:
        return self._find_uids([uid])[uid][0] == IN_GENERATION

    def caches_of(self, uid: int) -> tuple[list[Any], list[int]]:
        """A sequence's own caches, and the tokens in them as mlx-lm counts them."""
        cache, tokens = super().extract_cache([uid])[uid]
        return list(cache), tokens

    def drop(self, uid: int) -> None:
        super().remove([uid])


class StateMachineStops:
    """0.31's state machine of a sequence, in the place of 0.32's ``StopSequences``.

    After :meth:`advance` it has 0.31's ``match_sequence`` and ``current_state`` of the token.
    """

    def __init__(self, machine: Any):
        self._machine, self._state = machine, machine.make_state()
        self.match_sequence: Any = None
        self.current_state: Any = None

    def matcher(self) -> "StateMachineStops":
        return StateMachineStops(self._machine)

    def advance(self, token: int) -> bool:
        """Whether the text ends with a token."""
        found = self._machine.match(self._state, token)
        self._state, self.match_sequence, self.current_state = found
        return self.match_sequence is not None and self.current_state is None
