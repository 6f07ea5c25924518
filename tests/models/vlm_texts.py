"""mlx-vlm's generator of many texts at once, with the face of mlx-lm's."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_vlm.generate.ar import BatchGenerator
from mlx_vlm.utils import StoppingCriteria

from mlx_flashhead.models.libraries import embeddings


class TextGenerator:
    """Generates from token ids alone; sequences of one token each end a text."""

    def __init__(self, model: Any, stop_tokens: Any, sampler: Any, **options: Any):
        ends = [token for (token,) in stop_tokens]
        # a stand-in, since the generator adds to the stop tokens of the tokenizer that it is given
        tokenizer = SimpleNamespace(stopping_criteria=StoppingCriteria(ends))
        self._model = model
        self._generator = BatchGenerator(
            model.language_model, tokenizer, sampler=sampler, **options
        )

    def insert(self, prompts: list[list[int]], max_tokens: list[int]) -> None:
        given = [embeddings(self._model, mx.array([prompt])) for prompt in prompts]
        self._generator.insert(prompts, max_tokens, prompt_kwargs=given)

    def next_generated(self) -> list[Any]:
        """The next token of each text that is being written."""
        while self._generator.has_work:
            _, responses = self._generator.next()
            if responses:
                return responses
        return []

    def close(self) -> None:
        self._generator.close()
