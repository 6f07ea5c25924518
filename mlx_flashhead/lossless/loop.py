"""The loop for one text: mlx-lm's own, started again where a check chooses another token."""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.cache import make_prompt_cache
from ..models.compat.generate import generate_step, generation_stream, maybe_quantize_kv_cache
from .pace import Pace
from .proposals import Proposer
from .text import ForeignSampler, Processor, Text
from .way_back import Mark, go_back, kept, length_of

Tokens = Generator[tuple[int, mx.array | None], None, None]


def checked_steps(
    prompt: mx.array,
    model: nn.Module,
    stream: Any = generation_stream,
    *,
    proposer: Proposer,
    max_tokens: int = 256,
    sampler: ForeignSampler | None = None,
    logits_processors: Sequence[Processor] | None = None,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    logprobs: bool = True,
    context: Sequence[int] = (),
    n_begun: int = 0,
    **options: Any,
) -> Tokens:
    """mlx-lm's ``generate_step`` with the choices of the dense model.

    Args:
        prompt: (n,) token ids.
        proposer: Chooses the tokens.
        max_tokens: Tokens to generate; -1: no limit.
        sampler: The package's, or another's; default: the best token.
        prompt_cache: Caches, which hold the confirmed tokens at the end.
        max_kv_size: Size of the caches that are made if there are none.
        logprobs: Whether the log-probabilities are wanted.
        context: Tokens that the cache holds already, for the processors.
        n_begun: How many of the last of all these tokens are of this text, which is continued.
        **options: More keywords of ``generate_step``.

    Yields:
        A token, and log-probabilities (V,) if they are wanted.

    Raises:
        ValueError: If a cache can neither be trimmed nor kept, or as ``generate_step``.
    """
    cache = make_prompt_cache(model, max_kv_size) if prompt_cache is None else prompt_cache
    tokens = [*context, *cast(list[int], prompt.tolist())]
    before, begun = tokens[: len(tokens) - n_begun], tokens[len(tokens) - n_begun :]
    processors = logits_processors or ()
    text = Text(sampler, processors, before, logprobs, limit=max_tokens, tokens=begun)
    run = _Run(model, stream, cache, text, proposer, options)
    try:
        yield from run.tokens(prompt, list(context))
    finally:
        if prompt_cache is not None and text.mark is not None:
            run.go_back(text.n_given)


class _Run:
    """One text from its prompt to its end."""

    def __init__(
        self,
        model: nn.Module,
        stream: Any,
        cache: list[Any],
        text: Text,
        proposer: Proposer,
        options: dict[str, Any],
    ):
        self._model, self._stream, self._cache = model, stream, cache
        self._text, self._proposer, self._options = text, proposer, options
        self._pace = Pace(proposer, self._marks)

    def tokens(self, prompt: mx.array, context: list[int]) -> Tokens:
        """The confirmed tokens, each with its log-probabilities."""
        text, options = self._text, dict(self._options)
        start, before = prompt, context
        while text.n_given != text.limit:
            with closing(self._steps(start, before, options)) as steps:
                yield from self._until_refused(steps)
            if text.n_given == text.limit:
                return
            self.go_back(text.n_given - 1)
            for name in ("input_embeddings", "prompt_progress_callback"):
                options.pop(name, None)
            *before, last = text.prompt + text.tokens
            start = mx.array([last], dtype=mx.uint32)

    def _steps(self, start: mx.array, before: list[int], options: dict[str, Any]) -> Generator:
        """mlx-lm's loop, from the tokens in the cache on."""
        text, proposer = self._text, self._proposer
        hooks = proposer.hooks(text, before)
        take = hooks["sampler"]
        proposer.texts = None  # the prompt's last position is dense, and so is the first one here

        def sampler(logprobs: mx.array) -> mx.array:
            token = take(logprobs)
            proposer.texts = [text]
            return token

        return generate_step(
            start,
            self._model,
            self._stream,
            max_tokens=-1,
            prompt_cache=self._cache,
            **options | hooks | {"sampler": sampler},
        )

    def _until_refused(self, steps: Generator) -> Tokens:
        """The tokens up to one that a check has chosen instead of the proposal."""
        text = self._text
        while not text.refused:
            with self._proposer.in_place():
                token, _ = next(steps)
            text.read(token)
            for _, positions in self._pace.confirmed([text], [text]):
                for position in positions:
                    text.n_given += 1
                    yield cast(int, position.token), position.logprobs
                    if text.n_given == text.limit:
                        return

    def _marks(self, texts: Sequence[Text]) -> list[Mark]:
        starts = self._options.get("quantized_kv_start", 0)
        layers = kept(self._cache, None if self._options.get("kv_bits") is None else starts)
        return [Mark(self._text.n_held, layers, [length_of(layer) for layer in self._cache])]

    def go_back(self, wanted: int) -> None:
        """Brings the caches to the text's first ``wanted`` tokens."""
        go_back(self._cache, self._text.mark, self._text, wanted, self._feed)

    def _feed(self, token: list[int]) -> None:
        """Feeds a confirmed token to the model, as mlx-lm's loop has done before."""
        options = self._options
        with mx.stream(self._stream):
            self._model(mx.array([token], dtype=mx.uint32), cache=self._cache)
            maybe_quantize_kv_cache(
                self._cache,
                options.get("quantized_kv_start", 0),
                options.get("kv_group_size", 64),
                options.get("kv_bits"),
            )
            mx.eval([layer.state for layer in self._cache])
