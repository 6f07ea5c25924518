"""One sequence in progress: how its tokens are chosen, its unverified tokens, and its
caches as they were."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from ..head.draw import DrawSettings, position_key
from ..head.steps import Proposal
from .sampler import GREEDY, Processor, Sampler, SamplerFunction, draw_settings, trust

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
    before = current_random_state()
    if state is not None:
        set_random_state(state)
    try:
        yield
    finally:
        if state is not None:
            set_random_state(before)


def begin(processors: Iterable[Processor]) -> None:
    """Calls ``begin`` of the processors that have one: a text begins."""
    for processor in processors:
        if hasattr(processor, "begin"):
            processor.begin()


def normalized(logits: mx.array) -> mx.array:
    """Log-probabilities as mlx-lm's loops make them: (R, V) → (R, V)."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


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
        self.logprobs, self.limit, self.uid = logprobs, limit, uid
        self.pending: list[PendingToken] = []
        self.n_yielded = len(self.tokens)  # tokens that the caller has
        self.n_cached = 0  # tokens of the text in the caches
        self.rejected = False  # whether the caches hold another token in the last one's place
        self.snapshot: Snapshot | None = None  # the caches at an accepted token
        self.trust = trust(sampler, self.processors)
        # How its tokens are drawn; None where only the sampler itself knows.
        self.settings = settings = draw_settings(sampler)
        greedy = settings is not None and settings.greedy
        # mlx-lm's samplers draw from MLX's random state, which sequences would share
        if batched and settings is not None and not greedy and not isinstance(sampler, Sampler):
            sampler = Sampler(settings)
        self.sampler, self.seed = sampler, 0
        if isinstance(sampler, Sampler) and not sampler.settings.greedy:
            self.seed = sampler.new_seed()
        # Whether the sampler draws from MLX's random state, in the order of the tokens. Then it
        # keeps the state around each draw of an accepted token.
        self.uses_random_state = not greedy and not isinstance(sampler, Sampler)
        self.random_states: list[mx.array | None] = [None] * len(self.tokens)
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
        return self.settings or GREEDY, position_key(self.seed, index)

    def context(self, index: int, latest: mx.array | None = None) -> mx.array | None:
        """The tokens before place ``index`` of the text, (n,) uint32, if processors read them.

        ``latest`` (1,) is the last of them where it is not read yet.
        """
        if not self.processors:
            return None
        known = [pending.token for pending in self.pending if pending.token is not None]
        n_known = len(self.prompt) + index - (latest is not None)
        tokens = mx.array((self.prompt + self.tokens + known)[:n_known], mx.uint32)
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

    def choose(self, logits: mx.array, index: int) -> tuple[mx.array, mx.array]:
        """The token (1,) that the model's logits (1, V) choose at place ``index`` of the text, and
        log-probabilities (V,). Calls the sampler and each processor once."""
        logits = self.process(logits, self.context(index))
        logprobs = normalized(logits)
        return self.pick(logits, logprobs, index), logprobs.squeeze(0)

    def accept(self) -> PendingToken:
        """Moves the first pending token to the accepted ones."""
        pending = self.pending.pop(0)
        self.tokens.append(cast(int, pending.token))
        if self.uses_random_state:
            self.random_states.append(pending.random_state)
        return pending


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
    replay: Callable[[list[int]], None],
) -> None:
    """Brings a sequence's caches from ``n_cached`` tokens of its text to the first ``target``, in
    place. Its snapshot is at or before these. ``replay`` feeds a token, a list of one."""
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
    for place in range(start, target):
        replay(tokens[place : place + 1])


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
    window = getattr(layer, "max_size", None)
    if window is not None and offset + ahead >= window:
        return False
    quantizes = quantized_from is not None and hasattr(layer, "to_quantized")
    return not quantizes or offset + ahead < cast(int, quantized_from)
