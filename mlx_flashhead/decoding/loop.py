"""The loop of one text: its prompt is read, then the decoder makes its tokens."""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn

from ..models.compat import mlx_lm as compat
from ..models.compat.recognised import mlx_lm_is_as_imported
from ..models.training import may_drop_out
from .caches import OwnCaches, are_known
from .decoder import Decoder
from .guessing.guesser import Guesser
from .guessing.guesses import Guesses, check_lookup, guesses_of
from .phase import DISTURBED, REPLACED, TRAINED, UNKNOWN_CACHE, Mode, Phase
from .proposer import Proposer
from .sampling import Processor, Sampler, SamplerFunction
from .text import PendingToken, Text, mode_of

# Tokens after which unused memory is freed, as in mlx-lm's loop.
CLEAR_EVERY = 256
# Tokens, log-probabilities (V,), and whether each token was guessed.
GuessedTokens = Generator[tuple[int, mx.array | None, bool], None, None]


def verified_tokens(
    prompt: mx.array,
    model: nn.Module,
    stream: Any = compat.generation_stream,
    *,
    proposer: Proposer,
    max_tokens: int = 256,
    sampler: Sampler | SamplerFunction | None = None,
    logits_processors: Iterable[Processor] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = compat.QUANTIZED_KV_START,
    prompt_progress_callback: Callable[[int, int], object] | None = None,
    input_embeddings: mx.array | None = None,
    logprobs: bool = True,
    context: Iterable[int] = (),
    n_begun: int = 0,
    prefill: Callable[..., Iterable[Any]] | None = None,
    guesser: Guesser | None = None,
    announce: Callable[[Mode], object] | None = None,
) -> Generator[tuple[int, mx.array | None], None, None]:
    """Does what mlx-lm's ``generate_step`` does, with the dense model's choices.

    It yields tokens and log-probabilities (V,). What cannot be verified is decoded by the normal
    (dense) head, or the unverified one. At the end ``prompt_cache`` holds the prompt and the tokens
    handed out, between two tokens too where it can be trimmed, and MLX's random state is what
    mlx-lm would have left (`docs/lossless.md`).

    Some text is left to mlx-lm's own loop (:func:`why_mlx_lms_own`). That loop takes no ``context``
    and no ``prefill``: with these the normal head decodes such a text here.

    Args:
        prompt: Tokens (n,) of any integer dtype, which processors get as they are.
        model: Any model of mlx-lm.
        proposer: Proposes the tokens, and has the settings.
        max_tokens: Tokens of the text; -1 is no limit.
        logprobs: Whether log-probabilities are wanted; else None may come in their place.
        context: Tokens that ``prompt_cache`` holds already, and that processors see.
        n_begun: How many of these and of the prompt belong to a text that is continued.
        prefill: Another loop that reads the prompt, with mlx-lm's keywords.
        guesser: Guesses the next tokens beside a lookup, such as a draft model.
        announce: Called for each token with how it was decoded.

    The other arguments are those of ``generate_step``.

    Raises:
        ValueError: As mlx-lm, or if a lookup is asked for that this model cannot have.
    """
    context = list(context)
    why_own = why_mlx_lms_own(model)
    if why_own is not None and not context and prefill is None:
        yield from _mlx_lms_tokens(
            prompt,
            model,
            stream,
            announce,
            why_own,
            max_tokens=max_tokens,
            sampler=sampler,
            logits_processors=logits_processors,
            max_kv_size=max_kv_size,
            prompt_cache=prompt_cache,
            prefill_step_size=prefill_step_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            prompt_progress_callback=prompt_progress_callback,
            input_embeddings=input_embeddings,
        )
        return
    shared = prompt_cache is not None
    cache = prompt_cache
    if cache is None:
        cache = compat.make_prompt_cache(model, max_kv_size)
    _take_from_earlier(cache)
    quantization = _Quantization(quantized_kv_start, kv_group_size, kv_bits)
    feed = quantization.feeding(model)

    # 1) The prompt is read. Its last logits choose the first token.
    known = [*context, *cast(list[int], prompt.tolist())]
    before = known[: len(known) - n_begun]
    text = Text(
        sampler,
        logits_processors,
        _seen(before, prompt, bool(context)),
        logprobs=logprobs,
        limit=max_tokens,
        tokens=known[len(before) :],
        why_dense=_why_dense(cache, why_own),
    )
    check_lookup(proposer, cache)
    layers = quantization.at_first_token(cache, len(known))
    guesses = guesses_of(proposer, context, guesser, quantization.first, layers=layers)
    caches = OwnCaches(cache, feed, quantization.first)
    decoder = Decoder(proposer, caches)
    progress = prompt_progress_callback or _no_progress
    with mx.stream(stream):
        logits = _read_prompt(
            model,
            prompt,
            lambda tokens, embeddings: feed(tokens, cache, embeddings),
            cache,
            proposer=proposer,
            guesses=guesses,
            embeddings=input_embeddings,
            step_size=prefill_step_size,
            progress=progress,
            loop=prefill,
        )
        decoder.start([text], cache, logits)
    decoder.take_guesses(text, guesses)
    n_prompt = _length(prompt, input_embeddings)
    if max_tokens == 0:
        progress(n_prompt, n_prompt)
    handover = _Handover(decoder, text, caches, stream, shared)
    try:
        while text.n_yielded != text.limit:
            # 2) The decoder makes tokens until some are accepted.
            pending = handover.next_token()
            n_given = text.n_yielded - n_begun
            if n_given == 1:
                progress(n_prompt, n_prompt)
            if announce is not None:
                announce(mode_of(text, n_given))
            # 3) The caller gets one, and may use the caches, draw, or change the processors.
            handover.show()
            yield cast(int, pending.token), pending.logprobs
            handover.resume()
            if n_given % CLEAR_EVERY == 1:
                mx.clear_cache()
    finally:
        handover.end()


class _Quantization(NamedTuple):
    """How mlx-lm quantizes the caches of a text.

    Attributes:
        start: The length from which it does so.
        group_size: Values that share a scale.
        bits: Of a value; None if it does not.
    """

    start: int
    group_size: int
    bits: int | None

    @property
    def first(self) -> int | None:
        """The first length with quantized caches; None if there is none."""
        return None if self.bits is None else self.start

    def feeding(self, model: nn.Module) -> Callable[..., mx.array]:
        """A function that feeds a model.

        It gets tokens (1, n), the caches of the layers, and embeddings (1, n, D) that are in the
        place of the tokens' own, and returns logits (1, n, V).
        """

        def feed(
            tokens: mx.array, layers: list[Any], embeddings: mx.array | None = None
        ) -> mx.array:
            embedded = {}
            if embeddings is not None:
                embedded["input_embeddings"] = embeddings
            logits: mx.array = model(tokens, cache=layers, **embedded)
            compat.maybe_quantize_kv_cache(layers, *self)
            return logits

        return feed

    def at_first_token(self, cache: list[Any], n_known: int) -> list[Any]:
        """Caches as a text has them at its first token, after the tokens known before."""
        layers = list(cache)
        if self.bits is not None and n_known > self.start:
            compat.maybe_quantize_kv_cache(layers, 0, self.group_size, self.bits)
        return layers


def _why_dense(cache: Any, why_own: Mode | None) -> Mode | None:
    """Why no token of a text can be verified, as far as its caches and mlx-lm show."""
    return why_own if are_known(cache) else UNKNOWN_CACHE


def _no_progress(n_read: int, n_prompt: int) -> None:
    """Takes note of nothing."""


def _length(prompt: mx.array, embeddings: mx.array | None) -> int:
    """The positions of a prompt, by its embeddings if there are any."""
    return len(prompt) if embeddings is None else len(embeddings)


def _seen(before: list[int], prompt: mx.array, has_context: bool) -> mx.array | None:
    """The tokens before a text that processors get; None if there are none.

    Args:
        before: All tokens before it.
        prompt: (n,), those that are read for it.
        has_context: Whether its caches hold others.
    """
    if has_context:
        seen = mx.array(before, prompt.dtype)
    elif compat.PROCESSORS_SEE_PROMPT:
        seen = prompt
    else:
        seen = prompt[-1:]
    return seen if len(seen) else None


def why_mlx_lms_own(model: nn.Module) -> Mode | None:
    """Why mlx-lm's own loop must decode a text of a model; None if it need not.

    A model that is being trained draws numbers in each of its calls. And what has replaced
    functions of mlx-lm is for its own loop, which looks them up.
    """
    if may_drop_out(model):
        return TRAINED
    if not mlx_lm_is_as_imported():
        return REPLACED
    return None


def _mlx_lms_tokens(
    prompt: mx.array,
    model: nn.Module,
    stream: Any,
    announce: Callable[[Mode], object] | None,
    mode: Mode,
    **options: Any,
) -> Generator[tuple[int, mx.array | None], None, None]:
    """The text of mlx-lm's own loop, announced as ``mode``."""
    progress = options.pop("prompt_progress_callback") or _no_progress
    tokens: Any = compat.generate_step(
        prompt, model, stream=stream, prompt_progress_callback=progress, **options
    )
    with closing(tokens):
        for token in tokens:
            if announce is not None:
                announce(mode)
            yield token


def _read_prompt(
    model: nn.Module,
    prompt: mx.array,
    feed: Callable[[mx.array, mx.array | None], mx.array],
    cache: list[Any],
    *,
    proposer: Proposer,
    guesses: Guesses | None,
    embeddings: mx.array | None,
    step_size: int,
    progress: Callable[[int, int], object],
    loop: Callable[..., Iterable[Any]] | None = None,
) -> mx.array:
    """Reads a prompt chunk by chunk as mlx-lm's loop does, or has another loop read it.

    Args:
        model: The model.
        prompt: Tokens (n,).
        feed: Runs the model: tokens (1, n), and embeddings (1, n, D) if there are any.
        cache: The caches of its layers.
        proposer: Says which head makes the logits.
        guesses: Hear the prompt.
        embeddings: (n, D), in the place of the tokens' own.
        step_size: Tokens that are read at once.
        progress: Called with the number of tokens read so far, and of all, as by mlx-lm.
        loop: A loop that takes mlx-lm's keywords, and knows the prompt.

    Returns:
        The dense logits (1, V) of the last position, lazy.

    Raises:
        ValueError: As from mlx-lm, if there is nothing to read, or prompt and embeddings do not fit
            together.
    """
    states: list[mx.array] | None = None
    if guesses is not None and guesses.wants_states:
        states = []

    def read(start: int, end: int) -> mx.array:
        own = None
        if embeddings is not None:
            own = embeddings[start:end][None]
        tokens = prompt[start:end]
        logits = feed(tokens[None], own)
        heard = None
        if states:
            heard = states.pop()[0]
        if guesses is not None:
            guesses.hear(cast(list[int], tokens.tolist()), heard)
        return logits

    if loop is not None:
        with proposer.reading():
            logits = _read_by(loop, cache)
        if guesses is not None:
            guesses.hear(cast(list[int], prompt.tolist()))
        return logits
    _check(model, prompt, embeddings)
    total = _length(prompt, embeddings)
    done = 0
    progress(done, total)
    with proposer.reading(states):
        while total - done > 1:
            end = done + min(step_size, total - done - 1)
            read(done, end)
            mx.eval([layer.state for layer in cache])
            done = end
            progress(done, total)
            mx.clear_cache()
        return read(done, total)[:, -1, :]


def _check(model: nn.Module, prompt: mx.array, embeddings: mx.array | None) -> None:
    if embeddings is None:
        if len(prompt) == 0:
            raise ValueError("Either input_embeddings or prompt (or both) must be provided.")
    elif not compat.does_model_support_input_embeddings(model):
        raise ValueError("Model does not support input embeddings.")
    elif len(prompt) > 0 and len(prompt) != len(embeddings):
        raise ValueError(
            f"When providing input_embeddings, their sequence length ({len(embeddings)}) must "
            f"match the sequence length of the prompt ({len(prompt)}), or the prompt must be empty."
        )


def _read_by(loop: Callable[..., Iterable[Any]], cache: list[Any]) -> mx.array:
    """The logits (1, V) of a prompt's last position, which a loop hands to a processor."""
    taken: list[mx.array] = []

    def take(_: mx.array, logits: mx.array) -> mx.array:
        taken.append(logits)
        return logits

    def any_token(logprobs: mx.array) -> mx.array:
        return mx.zeros(logprobs.shape[:-1], mx.uint32)

    # With a limit of 0 it reads the prompt and calls these once.
    for _ in loop(prompt_cache=cache, logits_processors=[take], sampler=any_token, max_tokens=0):
        pass
    return taken[-1]


def with_guesses(
    tokens: Generator[tuple[int, mx.array | None], None, None], proposer: Proposer
) -> GuessedTokens:
    """The tokens and log-probabilities of a loop, and whether each token was guessed.

    It is ``from_draft`` of mlx-lm's responses. The loop ends with this generator.
    """
    n_guessed = 0
    with closing(tokens):
        for token, logprobs in tokens:
            guessed = proposer.n_guessed.total() > n_guessed
            n_guessed = proposer.n_guessed.total()
            yield token, logprobs, guessed


# A layer's cache, and the text that is ahead in it while its caller has the latest token.
_ahead_in: WeakKeyDictionary[Any, "_Handover"] = WeakKeyDictionary()


def _take_from_earlier(cache: Any) -> None:
    """Has the texts that are ahead in these caches leave them as their callers have the tokens."""
    for handover in {_ahead_in[layer] for layer in cache if layer in _ahead_in}:
        handover.bring_back()


class _Handover:
    """A text between its decoder and its caller.

    Args:
        decoder: Makes its tokens.
        text: The text.
        caches: Its caches.
        stream: On which it is decoded.
        shared: Whether the caller has the caches, too.
    """

    def __init__(
        self,
        decoder: Decoder,
        text: Text,
        caches: OwnCaches,
        stream: Any,
        shared: bool,
    ):
        self._decoder = decoder
        self._text = text
        self._caches = caches
        self._stream = stream
        self._shared = shared
        # Whether the caller has the latest token, and may do what it wants.
        self._shown = False
        # Layers that stay ahead meanwhile.
        self._ahead_in: list[Any] = []

    def next_token(self) -> PendingToken:
        with mx.stream(self._stream):
            while not self._text.ready:
                self._decoder.round()
        return self._decoder.hand_out(self._text)

    def show(self) -> None:
        """Leaves everything to the caller as mlx-lm's loop would leave it at this token.

        Caches that cannot be trimmed stay ahead, until the text ends or another one begins in them.
        """
        text = self._text
        if self._shared and text.ahead:
            n_ahead = text.n_cached - text.n_yielded
            if not self._caches.show(n_ahead, text.marks[0]):
                self._ahead_in = list(self._caches.layers)
                _ahead_in.update(dict.fromkeys(self._ahead_in, self))
        self._shown = True

    def resume(self) -> None:
        """Goes on, with what the caller has changed since :meth:`show`."""
        text = self._text
        as_shown = self._take_caches()
        if text.ahead and not (as_shown and text.undisturbed):
            with mx.stream(self._stream):
                self._decoder.settle([text], caches_changed=not as_shown)
            text.enter(Phase.DENSE, why=DISTURBED)
        self._shown = False

    def end(self) -> None:
        """Leaves the caches and MLX's random state as at the token handed out last."""
        if self._take_caches() and self._shared and self._text.ahead:
            self.bring_back()
        if not self._shown:
            self._text.leave_state()
        with mx.stream(self._stream):
            self._decoder.leave_guesses(self._text)

    def bring_back(self) -> None:
        """Rolls the caches back to the token handed out last."""
        with mx.stream(self._stream):
            self._decoder.handed_out_cache(self._text)

    def _take_caches(self) -> bool:
        for layer in self._ahead_in:
            if _ahead_in.get(layer) is self:
                del _ahead_in[layer]
        self._ahead_in = []
        return self._caches.resume()
