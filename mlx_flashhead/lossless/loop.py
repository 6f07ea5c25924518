"""The loop for one text: mlx-lm's own, started again where a check chooses another token."""

from collections.abc import Generator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.cache import make_prompt_cache
from ..models.compat.generate import generate_step, generation_stream, maybe_quantize_kv_cache
from .check import Check
from .pace import Pace
from .proposals import Proposer
from .text import ForeignSampler, Position, Processor, Text
from .way_back import Mark, go_back, mark

MOST_READ = 64  # tokens that may wait while a check is computed


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
) -> Generator[tuple[int, mx.array | None], None, None]:
    """mlx-lm's ``generate_step`` with the choices of the dense model.

    Args:
        prompt: (n,) token ids.
        model: The model.
        stream: MLX's stream.
        proposer: Chooses the tokens.
        max_tokens: Tokens to generate; -1: no limit.
        sampler: The package's, or another's; default: the best token.
        logits_processors: Functions of tokens and logits.
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
    cache = prompt_cache
    if cache is None:
        cache = make_prompt_cache(model, max_kv_size)
    tokens = [*context, *cast(list[int], prompt.tolist())]
    begun = len(tokens) - n_begun
    text = Text(sampler, logits_processors or (), tokens[:begun], logprobs, tokens=tokens[begun:])
    run = _Run(model, stream, cache, text, proposer, options)
    try:
        yield from run.positions(prompt, max_tokens, list(context))
    finally:
        if prompt_cache is not None:
            run.leave()


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
        self._pace = Pace(proposer.most_waiting, timed=not proposer.in_step)
        self._n_held = 0  # tokens of the text in the cache
        self._n_given = len(text.tokens)  # tokens of the text that the caller has
        self._mark: Mark | None = None  # the caches at a confirmed token
        self._checked: Mark | None = None  # the same, if the check confirms
        self._refused = False  # whether the caches hold a proposal in the last token's place
        starts = options.get("quantized_kv_start", 0)
        self._quantized_from = starts if options.get("kv_bits") is not None else None

    def positions(
        self, prompt: mx.array, max_tokens: int, context: list[int]
    ) -> Generator[tuple[int, mx.array | None], None, None]:
        """The confirmed tokens, each with its log-probabilities."""
        start, first, before = prompt, True, context
        while self._n_given != max_tokens:
            steps = self._steps(start, first, before)
            try:
                for confirmed in self._confirmed(steps, max_tokens):
                    for position in confirmed:
                        self._n_given += 1
                        yield cast(int, position.token), position.logprobs
                        if self._n_given == max_tokens:
                            return
            finally:
                steps.close()
            self._go_back(self._n_given - 1)
            self._refused = False
            tokens = self._text.prompt + self._text.tokens
            start, first, before = mx.array(tokens[-1:], dtype=mx.uint32), False, tokens[:-1]

    def leave(self) -> None:
        """Brings the cache to the tokens that the caller has."""
        if self._mark is None:
            return
        if self._refused and self._n_given == len(self._text.tokens):
            self._go_back(self._n_given - 1)
        if self._n_held != self._n_given:
            self._go_back(self._n_given)

    def _steps(self, start: mx.array, first: bool, before: list[int]) -> Generator:
        """mlx-lm's loop, from the tokens in the cache on."""
        text, proposer, options = self._text, self._proposer, dict(self._options)
        if not first:
            for name in ("input_embeddings", "prompt_progress_callback"):
                options.pop(name, None)
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
            sampler=sampler,
            logits_processors=hooks["logits_processors"],
            **options,
        )

    def _confirmed(
        self, steps: Generator, max_tokens: int
    ) -> Generator[list[Position], None, None]:
        """Confirmed positions, up to one where the check has made another choice."""
        text, proposer = self._text, self._proposer
        check: Check | None = None
        while True:
            with proposer.in_place():
                token, _ = next(steps)
            position = text.read(token)
            self._n_held = len(text.tokens) + text.n_read
            if check is not None and (check.ready or text.n_read >= MOST_READ):
                other = yield from self._outcome(check)
                check = None
                if other:
                    return
            if not proposer.check or (position.dense and text.n_read == 1):
                yield [text.confirm()]
                if proposer.check:
                    self._mark = self._marked()
                continue
            self._pace.wait(position.risk)
            last = token in proposer.ends or len(text.tokens) + text.n_read == max_tokens
            if last and check is not None:
                other = yield from self._outcome(check)
                check = None
                if other:
                    return
            if check is None and (last or self._pace.due):
                self._pace.checked()
                check = Check(proposer, [(text, text.n_read)])
                self._checked = self._marked()
                if last:  # waits, since the next step may be of no use
                    other = yield from self._outcome(check)
                    check = None
                    if other:
                        return

    def _outcome(self, check: Check) -> Generator[list[Position], None, bool]:
        """Hands out what a check confirms. Returns whether it has made another choice."""
        confirmed, other = check.confirm(self._text)
        self._refused = other
        yield confirmed
        if not other:
            self._mark = self._checked
        return other

    def _marked(self) -> Mark:
        return mark(self._cache, self._n_held, self._quantized_from)

    def _go_back(self, wanted: int) -> None:
        assert self._mark is not None
        go_back(self._cache, self._mark, self._n_held, wanted, self._feed)
        self._n_held = wanted

    def _feed(self, place: int) -> None:
        """Feeds a confirmed token to the model, as mlx-lm's loop has done before."""
        token = mx.array([self._text.tokens[place : place + 1]], dtype=mx.uint32)
        options = self._options
        with mx.stream(self._stream):
            self._model(token, cache=self._cache)
            maybe_quantize_kv_cache(
                self._cache,
                options.get("quantized_kv_start", 0),
                options.get("kv_group_size", 64),
                options.get("kv_bits"),
            )
            mx.eval([layer.state for layer in self._cache])
