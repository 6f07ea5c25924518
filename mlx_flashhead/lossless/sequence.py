"""One sequence in progress: its sampler and processors, and whether their choices can be verified;
its unverified tokens; and its caches as they were."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import mlx.core as mx

from ..head.draw import Draws, DrawSettings, draw_all, position_key, threshold
from ..head.steps import Proposal
from ..models.compat.mlx_lm import is_mlx_lm_processor, mlx_lm_sampler_settings, sample_utils

MOST_TOKENS = 2**31 - 1  # more than any vocabulary has
AHEAD = 96  # tokens by which a cache may be ahead of the accepted ones, at most

Processor = Callable[[Any, mx.array], mx.array]  # tokens (n,), logits (1, V) → logits (1, V)
SamplerFunction = Callable[[mx.array], mx.array]  # log-probabilities (1, V) → token (1,)


def current_random_state() -> mx.array:
    """MLX's random state, (2,) uint32. Lazy."""
    return mx.random.state[0]  # type: ignore[index]


def set_random_state(state: mx.array) -> None:
    """Makes ``state`` (2,) uint32 MLX's random state. Waits for it."""
    high, low = cast(list[int], state.tolist())
    mx.random.seed(high << 32 | low)


@contextmanager
def random_state(state: mx.array | None) -> Iterator[None]:
    """Within the block MLX's random state is ``state``; with None it stays as it is."""
    if state is None:
        yield
        return
    before = current_random_state()
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(before)


def normalized(logits: mx.array) -> mx.array:
    """Log-probabilities as mlx-lm's loops make them: (R, V) → (R, V)."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Trust(Enum):
    """What may be done with a sequence's sampler and processors."""

    EXACT = "exact"  # bounds hold: a choice is certain, or it is decided by its own logits
    REPLAYABLE = "replayable"  # pure: called again, on logits that are rounded otherwise
    UNKNOWN = "unknown"  # called once a token, in order: decoded by the normal (dense) head


def trust(sampler: Any, processors: Iterable[Processor] = ()) -> Trust:
    """Whether the choices of a sampler and processors can be verified.

    A caller marks a function of its arguments alone with an attribute ``pure = True``, and a
    processor that also keeps the order of a token's logits (a larger logit never becomes the
    smaller one, whatever the other tokens' are) with ``preserves_margins = True``.
    """
    changing: list[Any] = [each for each in processors if not preserves_margins(each)]
    if draw_settings(sampler) is None:
        changing.append(sampler)
    if not changing:
        return Trust.EXACT
    pure = all(getattr(function, "pure", False) for function in changing)
    return Trust.REPLAYABLE if pure else Trust.UNKNOWN


def preserves_margins(processor: Any) -> bool:
    """Whether bounds of a logit are bounds after this processor, too."""
    return getattr(processor, "preserves_margins", False) or is_mlx_lm_processor(processor)


def draw_settings(sampler: Any) -> DrawSettings | None:
    """The settings that describe a sampler's draws; None where none do."""
    if sampler is None:
        return DrawSettings()
    if isinstance(sampler, Sampler):
        return sampler.settings if sampler.plain else None
    settings = mlx_lm_sampler_settings(sampler)
    return None if settings is None else DrawSettings(**settings)


@dataclass(eq=False)
class Sampler:
    """Draws tokens from logits; :func:`make_sampler` says what its values mean."""

    settings: DrawSettings
    min_tokens_to_keep: int = 1
    xtc: tuple[float, float, list[int]] = (0.0, 0.1, [])  # probability, threshold, special tokens
    seed: int | None = None
    position: int = field(default=0, init=False)  # of the next call
    _text_seed: int | None = field(default=None, init=False, repr=False)  # of these calls

    @property
    def plain(self) -> bool:
        """Whether :class:`Draws` describe its draws: without XTC and a least number of tokens."""
        keeps_more = self.settings.min_p > 0 and self.min_tokens_to_keep > 1
        return self.settings.greedy or not (self.xtc[0] or keeps_more)

    def new_seed(self) -> int:
        """The seed for a new text. Evaluates two numbers of MLX's random state if it has none."""
        if self.seed is not None:
            return self.seed
        high, low = cast(list[int], mx.random.randint(0, 2**31 - 1, shape=(2,)).tolist())
        return high << 31 | low

    def choose(self, logits: mx.array, seed: int, position: int) -> mx.array:
        """The token of a position: logits (1, V) → (1,) uint32. Lazy."""
        logits, s = logits.astype(mx.float32), self.settings
        if s.greedy:
            return mx.argmax(logits, axis=-1)
        key, n_tokens = position_key(seed, position), logits.shape[-1]
        if self.plain:
            return draw_all(logits, [(s, key)])
        # top-p and min-p, of which mlx-lm 0.31 cannot keep a least number, then XTC and top-k
        top_p = Draws.of([(DrawSettings(s.temperature, s.top_p), key)])
        kept = mx.where(logits >= threshold(logits, top_p), logits, -mx.inf)
        if s.min_p:
            nth_best = mx.sort(kept, axis=-1)[:, -min(self.min_tokens_to_keep, n_tokens)]
            lowest = mx.minimum(mx.max(kept) + math.log(s.min_p), nth_best)
            kept = mx.where(kept >= lowest, kept, -mx.inf)
        top_k = s.top_k if s.top_k < n_tokens else 0
        with random_state(mx.array(key, mx.uint32)):
            sampler = sample_utils.make_sampler(s.temperature, 0.0, 0.0, 1, top_k, *self.xtc)
            return sampler(normalized(kept))

    def __call__(self, logprobs: mx.array) -> mx.array:
        """For other programs' loops: (..., V) → tokens (...), a position each, a text a row."""
        if self._text_seed is None:
            self._text_seed = self.new_seed()
        rows = logprobs.reshape(-1, 1, logprobs.shape[-1])
        seeds = range(self._text_seed, self._text_seed + len(rows))
        tokens = [self.choose(rows[i], seed, self.position) for i, seed in enumerate(seeds)]
        self.position += 1
        return mx.concatenate(tokens).reshape(logprobs.shape[:-1])


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: list[int] | None = None,
    *,
    seed: int | None = None,
) -> Sampler:
    """A sampler with the arguments of ``mlx_lm.sample_utils.make_sampler``, and a ``seed`` of every
    text; by default each text has a new one, from MLX's random state.

    It draws from mlx-lm's distribution, with noise of its own: the same seed gives other tokens
    than mlx-lm's sampler. Of equal logits at the end of a top-k all remain. Text with XTC, or min-p
    with a least number of tokens, is decoded densely. ValueError if a value is out of its range.
    """
    for name, value, lowest, highest in (
        ("temp", temp, 0, 1_000_000),
        ("top_p", top_p, 0, 1),
        ("min_p", min_p, 0, 1),
        ("min_tokens_to_keep", min_tokens_to_keep, 1, MOST_TOKENS),
        ("top_k", top_k, 0, MOST_TOKENS),
        ("xtc_probability", xtc_probability, 0, 1),
        ("xtc_threshold", xtc_threshold, 0, 0.5),
    ):
        if not lowest <= value <= highest:
            raise ValueError(f"{name} is {value}: it must be {lowest} to {highest:,}.")
    settings = DrawSettings(float(temp), float(top_p) or 1.0, float(min_p), int(top_k))
    xtc = xtc_probability, xtc_threshold, list(xtc_special_tokens or ())
    return Sampler(settings, min_tokens_to_keep, xtc, seed)


@dataclass(eq=False)
class PendingToken:
    """A token that was chosen for a sequence and is not handed out yet."""

    proposal: Proposal | None = None  # None where the dense logits chose the token
    row: int = 0  # its row in the proposal
    random_state: mx.array | None = None  # MLX's before and after the draw, (2, 2) uint32
    logprobs: mx.array | None = None  # (V,) of the dense logits, where wanted and known
    token: int | None = None  # once it is read
    risk: float = 0.0  # estimated chance that the dense logits choose another token, likewise

    @property
    def state_before(self) -> mx.array | None:
        """MLX's random state before the draw, where the sampler uses it."""
        return None if self.random_state is None else self.random_state[0]

    def read(self, token: int) -> None:
        """Notes the token, which has been computed."""
        self.token = token
        if self.proposal is not None:
            self.risk = cast(list[float], self.proposal.risk.tolist())[self.row]


class Sequence:
    """A sequence: its prompt, its accepted tokens, and the pending ones after them."""

    def __init__(
        self,
        sampler: Sampler | SamplerFunction | None,  # None takes the likeliest token
        processors: Iterable[Processor] = (),  # applied in order
        prompt: Iterable[int] = (),  # tokens before the text, which the processors see, too
        *,
        logprobs: bool = False,  # whether log-probabilities are wanted
        batched: bool = False,  # whether it is generated beside others
        limit: int = -1,  # tokens after which it ends; -1 for no limit
        tokens: Iterable[int] = (),  # accepted ones of a text that is continued
        uid: int = 0,
    ):
        self.processors, self.prompt, self.tokens = list(processors), list(prompt), list(tokens)
        self._prompt_ids = mx.array(self.prompt, mx.uint32)
        self.logprobs, self.limit, self.uid = logprobs, limit, uid
        self.pending: list[PendingToken] = []
        self.n_yielded = len(self.tokens)  # tokens that the caller has
        self.n_cached = 0  # tokens of the text in the caches
        self.rejected = False  # whether the caches hold another token in the last one's place
        self.snapshot: Snapshot | None = None  # the caches at an accepted token
        self.trust = trust(sampler, self.processors)
        # How its tokens are drawn; None where only the sampler itself knows.
        self.settings = settings = draw_settings(sampler)
        self.greedy = settings is not None and settings.greedy
        # mlx-lm's samplers draw from MLX's random state, which sequences would share
        if batched and settings and not self.greedy and not isinstance(sampler, Sampler):
            sampler = Sampler(settings)
        self.sampler, self.seed = sampler, 0
        if isinstance(sampler, Sampler) and not self.greedy:
            self.seed = sampler.new_seed()
        # whether the sampler draws from MLX's random state, in the order of the tokens
        self.uses_random_state = not self.greedy and not isinstance(sampler, Sampler)
        if not self.tokens:
            begin(self.processors)

    @property
    def needs_logits(self) -> bool:
        """Whether a choice needs the logits of all tokens."""
        return bool(self.processors) or self.uses_random_state or self.settings is None

    @property
    def n_chosen(self) -> int:
        return len(self.tokens) + len(self.pending)

    @property
    def n_read(self) -> int:
        """Pending tokens that are known: all but the one that is being computed."""
        return sum(pending.token is not None for pending in self.pending)

    def draw_at(self, index: int) -> tuple[DrawSettings, tuple[int, int]]:
        """The settings and the key of the draw at place ``index`` of the text."""
        return self.settings or DrawSettings(), position_key(self.seed, index)

    def context(self, index: int, latest: mx.array | None = None) -> mx.array | None:
        """The tokens before place ``index`` of the text, (n,) uint32, if processors read them.
        ``latest`` (1,) is the last of them where it is not read yet."""
        if not self.processors:
            return None
        known = [pending.token for pending in self.pending if pending.token is not None]
        text = mx.array((self.tokens + known)[: index - (latest is not None)], mx.uint32)
        last = [] if latest is None else [latest.astype(mx.uint32)]
        return mx.concatenate([self._prompt_ids, text, *last])

    def process(self, logits: mx.array, context: mx.array | None) -> mx.array:
        """The logits (1, V) after the processors, which may write into them."""
        if self.processors:
            logits = mx.array(logits)
        for processor in self.processors:
            logits = processor(context, logits)
        return logits

    def pick(self, logits: mx.array, logprobs: mx.array, index: int) -> mx.array:
        """The token (1,) uint32 that processed logits (1, V) choose. ``logprobs`` are the same,
        normalized as mlx-lm's loops do."""
        if self.greedy:
            return mx.argmax(logprobs, axis=-1)
        if isinstance(self.sampler, Sampler):
            return self.sampler.choose(logits, self.seed, index)
        return cast(SamplerFunction, self.sampler)(logprobs)

    def choose(
        self, logits: mx.array, index: int, latest: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """The token (1,) that the model's logits (1, V) choose at place ``index`` of the text, and
        log-probabilities (V,). Calls the sampler and each processor once."""
        logits = self.process(logits, self.context(index, latest))
        logprobs = normalized(logits)
        return self.pick(logits, logprobs, index), logprobs.squeeze(0)

    def extend(self, logits: mx.array, latest: mx.array | None = None) -> mx.array:
        """The next token (1,), chosen by the model's logits (1, V), which is pending then."""
        token, logprobs = self.choose(logits, self.n_chosen, latest)
        self.pending.append(PendingToken(logprobs=logprobs if self.logprobs else None))
        return token

    def accept(self) -> PendingToken:
        """Moves the first pending token to the accepted ones."""
        pending = self.pending.pop(0)
        self.tokens.append(cast(int, pending.token))
        return pending


def begin(processors: Iterable[Processor]) -> None:
    """Calls ``begin`` of the processors that have one: a text begins."""
    for processor in processors:
        if hasattr(processor, "begin"):
            processor.begin()


@dataclass(frozen=True)
class Snapshot:
    """A model's caches as they were after an earlier token. A copy costs nothing: arrays never
    change in MLX."""

    n_tokens: int  # of the text, in the caches
    layers: list[Any]  # a copy of each layer's cache; None for one that can be trimmed to here
    offsets: list[int | None]  # the length of each layer's cache, where it is known
    row: int | None = None  # of the sequence, in caches of a batch


def copied_layers(cache: list[Any], quantized_from: int | None = None) -> list[Any]:
    """A copy of each layer's cache; None for one that can be trimmed. mlx-lm quantizes a cache of
    the length ``quantized_from``. ValueError if a cache cannot be copied."""
    return [None if trims(layer, quantized_from) else _copied(layer) for layer in cache]


def _copied(layer: Any) -> Any:
    try:
        return copy.deepcopy(layer)
    except Exception as error:
        raise ValueError(
            f"A cache of the type {type(layer).__name__} can neither be trimmed nor copied, so "
            "choices cannot be verified with it: use verify=False or dense=True."
        ) from error


def rollback(
    cache: list[Any],
    sequence: Sequence,
    n_cached: int,
    target: int,
    replay: Callable[[mx.array], Any],
) -> None:
    """Brings a sequence's caches from ``n_cached`` tokens of its text to the first ``target``, in
    place. Its snapshot is at or before these. ``replay`` feeds a token (1, 1)."""
    snapshot, tokens = sequence.snapshot, sequence.tokens
    n_right = min(n_cached, len(tokens) - sequence.rejected)
    if snapshot is None or n_cached == target == n_right:
        return
    start = snapshot.n_tokens
    if all(layer is None for layer in snapshot.layers):
        start = min(target, n_right)
    for i, layer in enumerate(snapshot.layers):
        if layer is not None:
            cache[i] = _copied(layer if snapshot.row is None else layer.extract(snapshot.row))
            continue
        length, before = length_of(cache[i]), snapshot.offsets[i]
        ahead = n_cached - start
        if length is not None and before is not None:  # a step that failed has fed some layers
            ahead = length - before - (start - snapshot.n_tokens)
        if ahead > 0:
            cache[i].trim(ahead)
    for token in tokens[start:target]:
        replay(mx.array([[token]], dtype=mx.uint32))
        mx.eval([layer.state for layer in cache])


def length_of(layer: Any) -> int | None:
    """Tokens in a layer's cache; None where it does not say."""
    offset = getattr(layer, "offset", None)
    return offset if isinstance(offset, int) else None


def trims(layer: Any, quantized_from: int | None = None, ahead: int = AHEAD) -> bool:
    """Whether a cache can be trimmed now and ``ahead`` tokens later."""
    if hasattr(layer, "caches"):
        return all(trims(part, quantized_from, ahead) for part in layer.caches)
    if not hasattr(layer, "is_trimmable") or not layer.is_trimmable():
        return False
    if hasattr(layer, "chunk_size"):  # forgets what is before its chunk
        return False
    offset = length_of(layer)
    if offset is None:  # of a batch
        offset = int(getattr(layer, "_offset", getattr(layer, "_idx", 0)))
    limits = [getattr(layer, "max_size", None)]  # a rotating cache is trimmed within its window
    if hasattr(layer, "to_quantized"):
        limits.append(quantized_from)
    return all(limit is None or offset + ahead < limit for limit in limits)
