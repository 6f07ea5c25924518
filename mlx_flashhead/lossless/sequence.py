"""One sequence in progress: how its tokens are chosen, those that are not verified yet, and its
caches as they were."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from ..head.draw import DrawSettings, position_key
from ..head.steps import Proposal
from .sampler import (
    GREEDY,
    Processor,
    Sampler,
    SamplerFunction,
    Trust,
    draw_settings,
    fresh_seed,
    preserves_margins,
    trust,
)

AHEAD = 96  # tokens by which a cache may be ahead of the accepted ones, at most


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


def begin(processors: Iterable[Processor] | None) -> None:
    """Calls ``begin`` of the processors that have one: a text begins."""
    for processor in processors or ():
        if hasattr(processor, "begin"):
            processor.begin()


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
    def dense(self) -> bool:
        return self.proposal is None

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
    """A sequence: its prompt, its accepted tokens, and the pending ones after them.

    Args:
        sampler: The package's, another function of log-probabilities (1, V), or None, which takes
            the likeliest token.
        processors: Functions of the tokens (n,) and logits (1, V), applied in order.
        prompt: Tokens before the text, which the processors see, too.
        logprobs: Whether log-probabilities are wanted.
        batched: Whether it is generated beside others. Then mlx-lm's samplers draw with a seed of
            the sequence instead of MLX's random state, which the sequences would share.
        limit: Tokens after which it ends; -1 for no limit.
        tokens: Accepted tokens of a text that is continued.
    """

    def __init__(
        self,
        sampler: Sampler | SamplerFunction | None,
        processors: Iterable[Processor] = (),
        prompt: list[int] | None = None,
        *,
        logprobs: bool = False,
        batched: bool = False,
        limit: int = -1,
        tokens: list[int] | None = None,
        uid: int = 0,
    ):
        self.sampler, self.processors = sampler, list(processors)
        self.prompt, self.tokens = list(prompt or ()), list(tokens or ())
        self.logprobs, self.limit, self.uid = logprobs, limit, uid
        self.pending: list[PendingToken] = []
        self.n_begun = self.n_yielded = len(self.tokens)  # tokens that the caller has
        self.n_cached = 0  # tokens of the text in the caches
        self.rejected = False  # whether the caches hold another token in the last one's place
        self.snapshot: Any = None  # the caches at an accepted token
        self.trust = trust(sampler, self.processors)
        self.seed = 0
        # How its tokens are drawn; None where only the sampler itself knows.
        self.settings: DrawSettings | None = draw_settings(sampler)
        # Whether the sampler draws from MLX's random state, in the order of the tokens. Then it
        # keeps the state around each draw of an accepted token.
        self.uses_random_state = False
        self.random_states: list[mx.array | None] = []
        if isinstance(sampler, Sampler):
            if not sampler.settings.greedy:
                self.seed = sampler.new_seed()
        elif self.settings is None or not self.settings.greedy:
            if batched and self.settings is not None:
                self.sampler = sampler = Sampler(self.settings, seed=fresh_seed())
                self.seed = sampler.new_seed()
            else:
                self.uses_random_state = True
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

    @property
    def draw(self) -> tuple[DrawSettings, tuple[int, int]]:
        """The settings and the key of the next token's draw."""
        return self.draw_at(self.n_chosen)

    def draw_at(self, index: int) -> tuple[DrawSettings, tuple[int, int]]:
        return self.settings or GREEDY, position_key(self.seed, index)

    def context(self, index: int, latest: mx.array | None = None) -> mx.array:
        """The tokens before place ``index`` of the text, (n,) uint32, for the processors.

        ``latest`` (1,) is the last of them where it is not read yet.
        """
        known = [p.token for p in self.pending if p.token is not None]
        tokens = mx.array(
            (self.prompt + self.tokens + known)[: len(self.prompt) + index], mx.uint32
        )
        return tokens if latest is None else mx.concatenate([tokens, latest.astype(mx.uint32)])

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
        if self.settings is not None and self.settings.greedy:
            return mx.argmax(logprobs, axis=-1)
        if isinstance(self.sampler, Sampler):
            return self.sampler.choose(logits, self.seed, index)
        assert self.sampler is not None
        return self.sampler(logprobs)

    def choose(
        self, logits: mx.array, index: int, context: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """The token (1,) that the model's logits (1, V) choose at place ``index`` of the text, and
        log-probabilities (V,). Calls the sampler and each processor once."""
        if self.processors and context is None:
            context = self.context(index)
        logits = self.process(logits, context)
        logprobs = normalized(logits)
        return self.pick(logits, logprobs, index), logprobs.squeeze(0)

    def accept(self) -> PendingToken:
        """Moves the first pending token to the accepted ones."""
        pending = self.pending.pop(0)
        assert pending.token is not None
        self.tokens.append(pending.token)
        if self.uses_random_state:
            self.random_states.append(pending.random_state)
        return pending


def normalized(logits: mx.array) -> mx.array:
    """Log-probabilities as mlx-lm's loops make them: (R, V) → (R, V)."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def keeps_bounds(sequence: Sequence) -> bool:
    """Whether bounds of the logits bound the processed ones, and the draw is known."""
    return sequence.trust is Trust.EXACT and all(map(preserves_margins, sequence.processors))


# A model's caches as they were after an earlier token. Those that cannot be trimmed are copied,
# which costs nothing: arrays never change in MLX.


@dataclass(frozen=True)
class Snapshot:
    n_tokens: int  # of the text, in the caches
    layers: list[Any]  # a copy of each layer's cache; None for one that can be trimmed to here
    offsets: list[int | None]  # the length of each layer's cache, where it is known

    @classmethod
    def take(cls, cache: list[Any], n_tokens: int, quantized_from: int | None = None) -> "Snapshot":
        """The caches of one sequence as they are; ValueError if one cannot be copied."""
        layers = copied_layers(cache, quantized_from)
        return cls(n_tokens, layers, [length_of(layer) for layer in cache])


def copied_layers(cache: list[Any], quantized_from: int | None = None) -> list[Any]:
    """A copy of each layer's cache; None for one that can be trimmed. mlx-lm quantizes a cache of
    the length ``quantized_from``. ValueError if a cache cannot be copied."""
    return [None if trims(layer, quantized_from) else _copied(layer) for layer in cache]


def rollback(
    cache: list[Any],
    snapshot: Snapshot,
    tokens: list[int],
    *,
    n_cached: int,
    n_right: int,
    target: int,
    replay: Callable[[list[int]], None],
) -> None:
    """Brings a sequence's caches to its first ``target`` tokens, in place.

    Args:
        cache: The caches of all layers.
        snapshot: At or before the target, and at or before ``n_right``.
        tokens: The accepted tokens.
        n_cached: Tokens that the caches hold now.
        n_right: Those of them that are the accepted ones.
        target: Tokens to hold, fewer or more than now.
        replay: Feeds a token, a list of one, to the model.
    """
    if n_cached == target == n_right:
        return
    start = snapshot.n_tokens
    if all(layer is None for layer in snapshot.layers):
        start = min(target, n_right)
    for i, layer in enumerate(snapshot.layers):
        if layer is not None:
            cache[i] = _copied(layer)
            continue
        length, before = length_of(cache[i]), snapshot.offsets[i]
        ahead = n_cached - start
        if length is not None and before is not None:  # a step that failed has fed some layers
            ahead = length - before - (start - snapshot.n_tokens)
        if ahead > 0:
            cache[i].trim(ahead)
    for place in range(start, target):
        replay(list(tokens[place : place + 1]))


def length_of(layer: Any) -> int | None:
    """Tokens in a layer's cache; None where it does not say."""
    offset = getattr(layer, "offset", None)
    return offset if isinstance(offset, int) else None


def trims(layer: Any, quantized_from: int | None = None, ahead: int = AHEAD) -> bool:
    """Whether a cache can be trimmed now and ``ahead`` tokens later."""
    parts = getattr(layer, "caches", None)
    if parts is not None:
        return all(trims(part, quantized_from, ahead) for part in parts)
    if not hasattr(layer, "is_trimmable") or not layer.is_trimmable():
        return False
    if hasattr(layer, "chunk_size"):  # forgets what is before its chunk
        return False
    offset = length_of(layer)
    if offset is None:  # of a batch
        offset = int(getattr(layer, "_offset", getattr(layer, "_idx", 0)))
    window = getattr(layer, "max_size", None)
    if window is not None and offset + ahead >= window:
        return False
    if quantized_from is None or not hasattr(layer, "to_quantized"):
        return True
    return offset + ahead < quantized_from


def _copied(layer: Any) -> Any:
    try:
        return copy.deepcopy(layer)
    except Exception as error:
        raise ValueError(
            f"A cache of the type {type(layer).__name__} can neither be trimmed nor copied, so "
            "choices cannot be verified with it: use verify=False or dense=True."
        ) from error
