"""One text in progress: how its tokens are chosen, and those that wait for their check."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from ..head.draw import DrawSettings, position_key
from ..head.steps import Proposal
from ..models.compat.sample_utils import greedy_sampler
from .sampler import Sampler, fresh_seed

Processor = Callable[[Any, mx.array], mx.array]
ForeignSampler = Callable[[mx.array], mx.array]

GREEDY = DrawSettings()


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


def begin(processors: Sequence[Processor] | None) -> None:
    """Tells processors that a text begins, those that have a ``begin``."""
    for processor in processors or ():
        if hasattr(processor, "begin"):
            processor.begin()


@dataclass(eq=False)
class Position:
    proposal: Proposal | None = None  # None where the dense logits chose the token
    row: int = 0  # of the proposal
    random_state: mx.array | None = None  # MLX's, before another's sampler was called
    logprobs: mx.array | None = None  # (V,) of the dense logits, where wanted and known
    token: int | None = None  # as soon as it is read

    @property
    def dense(self) -> bool:
        return self.proposal is None

    @property
    def risk(self) -> float:
        """The estimated chance that the dense logits choose another token; waits for it."""
        if self.proposal is None:
            return 0.0
        return cast(list[float], self.proposal.risk.tolist())[self.row]

    def proposed(self, name: str) -> mx.array:
        """The position's row of an array of its proposal: (1, ...)."""
        array: mx.array = getattr(self.proposal, name)
        return array[self.row : self.row + 1]


@dataclass(eq=False)
class Text:
    # The package's, or another's function of log-probabilities (1, V); None takes the best token.
    sampler: Sampler | ForeignSampler | None
    processors: Sequence[Processor] = ()  # of the tokens (n,) and logits (1, V), in their order
    prompt: list[int] = field(default_factory=list)  # before the text, for the processors
    logprobs: bool = False  # whether they are wanted
    # Whether other texts are generated at the same time. Then a sampler of others draws from a
    # random state of each position instead of MLX's own.
    beside_others: bool = False
    limit: int = -1  # tokens after which it ends
    tokens: list[int] = field(default_factory=list)  # confirmed ones
    waiting: list[Position] = field(default_factory=list)  # after them, in order
    n_held: int = 0  # tokens in the caches
    refused: bool = False  # whether the caches hold another token in the last one's place
    mark: Any = None  # the caches at a confirmed token, for the way back
    uid: int = 0  # its number for a batch's caller

    def __post_init__(self):
        if self.sampler is greedy_sampler:
            self.sampler = None
        self.processors = list(self.processors)
        self.n_given = len(self.tokens)  # tokens that the caller has
        self.seed = 0
        # The settings of its draws, None where these do not describe its sampler.
        self.settings: DrawSettings | None = GREEDY if self.sampler is None else None
        # Whether its sampler draws from MLX's random state, which a check has to put back.
        self.replays = False
        if isinstance(self.sampler, Sampler):
            if self.sampler.plain:
                self.settings = self.sampler.settings
            if not self.sampler.settings.greedy:
                self.seed = self.sampler.text_seed()
        elif self.sampler is not None:
            self.replays = not self.beside_others
            self.seed = fresh_seed() if self.beside_others else 0
        self.needs_logits = bool(self.processors) or self.settings is None  # of all tokens
        if not self.tokens:
            begin(self.processors)

    @property
    def n_chosen(self) -> int:
        return len(self.tokens) + len(self.waiting)

    @property
    def n_read(self) -> int:
        """Waiting positions whose token is known: all but those that are being computed."""
        return sum(position.token is not None for position in self.waiting)

    def key(self, index: int) -> tuple[int, int]:
        return position_key(self.seed, index)

    def process(self, logits: mx.array, index: int = 0, tokens: mx.array | None = None) -> mx.array:
        """The logits (1, V) after the processors, which may write into them, for the token at place
        ``index`` of the text, or after the ``tokens`` (n,) uint32."""
        if self.processors and tokens is None:
            later = [position.token for position in self.waiting[: index - len(self.tokens)]]
            before = self.prompt + self.tokens[:index] + later
            tokens, logits = mx.array(before, dtype=mx.uint32), mx.array(logits)
        for processor in self.processors:
            logits = processor(tokens, logits)
        return logits

    def pick(self, logits: mx.array, logprobs: mx.array, index: int) -> mx.array:
        """The token (1,) uint32 that processed logits (1, V) choose. ``logprobs`` are the same,
        normalized as mlx-lm's loops do."""
        settings = self.settings
        if settings is not None and settings.greedy:
            return mx.argmax(logprobs, axis=-1)
        if isinstance(self.sampler, Sampler):
            return self.sampler.choose(logits, self.seed, index)
        assert self.sampler is not None
        own_state = mx.array(self.key(index), dtype=mx.uint32) if self.beside_others else None
        with random_state(own_state):
            return self.sampler(logprobs)

    def choose(self, logits: mx.array, index: int) -> tuple[mx.array, mx.array]:
        """The token (1,) that the model's logits (1, V) choose, and log-probabilities (V,)."""
        logits = self.process(logits, index)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self.pick(logits, logprobs, index), logprobs.squeeze(0)

    def read(self, token: int) -> None:
        """Notes the token of the first position that has none yet."""
        self.waiting[self.n_read].token = token
        self.n_held = len(self.tokens) + self.n_read

    def confirm(self) -> Position:
        """Moves the first waiting position to the confirmed tokens."""
        position = self.waiting.pop(0)
        assert position.token is not None
        self.tokens.append(position.token)
        return position
