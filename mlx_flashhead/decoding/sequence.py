"""One sequence in progress: its accepted tokens, and the pending ones after them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from ..head.draw import DrawSettings, position_key
from ..head.steps import Proposal
from .caches import Snapshot
from .sampler import (
    Processor,
    Sampler,
    SamplerFunction,
    draw_settings,
    normalized,
    trust,
)


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
