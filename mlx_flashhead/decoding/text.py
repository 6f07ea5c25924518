"""One text in progress: its accepted tokens, the pending ones after them, and how it is drawn."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import cast

import mlx.core as mx
import numpy as np

from ..common.masks import Mask
from ..head.adjustment import ChangedTokens
from ..head.draws.draw import NO_KEY, Draw, Key
from ..head.draws.greedy import Greedy
from ..head.draws.noise import position_key
from ..head.proposal import Proposal
from .caches import TextMark
from .phase import AHEAD_OF_CALLER, FIRST, VERIFIED, Mode, Phase
from .random_state import DrawChain, set_key
from .sampling import Changes, Processor, Sampler, SamplerFunction, draw_of, normalized


@dataclass(eq=False)
class PendingToken:
    """A token that was chosen for a text and is not accepted yet.

    Attributes:
        proposal: Which has it; None where the dense logits chose the token.
        position: Its index in the proposal.
        logprobs: (V,) of the dense logits, where wanted and known.
        token: Once it is known; in a wide step what is guessed.
        is_read: Whether its round has come: only then it can be accepted.
        allowed: (⌈V/32⌉,) uint32, a bit a token, whether it could be chosen; None where all could.
        guessed: What has guessed it, so that it was computed in a wide step.
        noted: Whether the schedule has taken note of it.
        risk: The estimated chance that the dense logits choose another token, once it is read.
    """

    proposal: Proposal | None = None
    position: int = 0
    logprobs: mx.array | None = None
    token: int | None = None
    is_read: bool = False
    allowed: np.ndarray | None = None
    guessed: str = ""
    noted: bool = False
    risk: float = 0.0

    def read(self, token: int) -> None:
        """Notes the token, which has been computed."""
        self.token = token
        self.is_read = True
        if self.proposal is not None:
            self.risk = cast(list[float], self.proposal.risk.tolist())[self.position]


class Text:
    """A text: its prompt, its accepted tokens, and the pending ones after them.

    Args:
        sampler: The caller's; None takes the likeliest token.
        processors: The caller's, applied in order. A list may be changed while the text goes on.
        prompt_ids: The tokens before the text, (n,), of the dtype that processors get; None if
            processors see none of them.
        logprobs: Whether log-probabilities are wanted.
        limit: Tokens after which it ends; -1 for no limit.
        tokens: Accepted ones of a text that is continued.
        uid: Its number in a batch.
        ids_dtype: The dtype of the tokens that processors get; None for the one that mlx-lm's loop
            of one text makes of the prompt's and the sampler's.
        why_dense: Why it is dense to its end, where that is known.

    Attributes:
        pending: Chosen tokens that are not accepted yet.
        ready: Accepted ones that are not handed out.
        n_yielded: Tokens that the caller has.
        n_cached: Tokens of the text in the caches.
        rejected: Whether the caches hold another token in the last one's place.
        marks: While it is ahead. The first one is at the last token handed out, or before.
        mode: How its next tokens are decoded, since the latest round.
        why_dense: Why it is dense to its end, once that is known.
        settings: How it is drawn; None where only the sampler itself knows.
        greedy: Whether its sampler takes the likeliest token.
        draws_from_mlx: Whether it draws from MLX's random state: any sampler but the greedy ones
            and ours.
        changes: What its processors change; None where that is not known.
        unchanged: Whether they change nothing.
        phase: How far it is ahead, which :meth:`enter` changes with the next two.
        ahead: Whether its tokens may be ahead of those handed out.
        proposing: Whether the FlashHead proposes its next tokens.
        shares_sampler: Whether mlx-lm may call its sampler for several texts at once.
        vocab_size: V of its logits; 0 before any.
        joined: Its number among the texts of a batch, in the order in which they began.
    """

    def __init__(
        self,
        sampler: Sampler | SamplerFunction | None,
        processors: Iterable[Processor] | None = None,
        prompt_ids: mx.array | None = None,
        *,
        logprobs: bool = False,
        limit: int = -1,
        tokens: Iterable[int] = (),
        uid: int = 0,
        ids_dtype: mx.Dtype | None = None,
        why_dense: Mode | None = None,
    ):
        self.sampler = sampler
        self.processors = _as_given(processors)
        self._processors_at_start = tuple(self.processors)
        self.tokens = list(tokens)
        self.logprobs = logprobs
        self.limit = limit
        self.uid = uid
        self.pending: list[PendingToken] = []
        self.ready: deque[PendingToken] = deque()
        self.n_yielded = len(self.tokens)
        self.n_cached = len(self.tokens)
        self.rejected = False
        self.marks: deque[TextMark] = deque()
        self.mode: Mode = VERIFIED
        self.why_dense = why_dense
        self.settings = draw_of(sampler)
        self.greedy = self.settings is not None and self.settings.greedy
        self.draws_from_mlx = not self.greedy and type(sampler) is not Sampler
        self.changes = Changes.of(self._processors_at_start)
        self.unchanged = self.changes == Changes()
        self.phase = Phase.LEVEL
        self.ahead = False
        self.proposing = False
        self.seed = 0
        if type(sampler) is Sampler and not self.greedy:
            self.seed = sampler.new_seed()
        self.shares_sampler = True
        self.vocab_size = 0
        self.joined = 0
        # While it is ahead and draws from MLX's random state.
        self._chain: DrawChain | None = None
        self._ids_dtype = ids_dtype
        self._n_before = 0
        # Tokens before the next one as processors get them, but for those fed since.
        self._ids: mx.array | None = None
        # They are joined to the others once a processor is called.
        self._fed: list[mx.array] = []
        # As many of the prompt's last tokens as penalties need.
        self._prompt_tail: list[int] = []
        if prompt_ids is not None:
            self._begin_behind(prompt_ids)
        if not self.tokens:
            for processor in self._processors_at_start:
                if isinstance(processor, Mask):
                    processor.begin()

    def _begin_behind(self, prompt_ids: mx.array) -> None:
        """Notes the tokens (n,) before the text."""
        self._n_before = len(prompt_ids)
        if self._processors_at_start:
            self._ids = prompt_ids
        if self._processors_at_start and self.tokens:
            begun = mx.array(self.tokens, prompt_ids.dtype)
            self._ids = mx.concatenate([prompt_ids, begun])
        if self.changes is not None and self.changes.window:
            self._prompt_tail = cast(list[int], prompt_ids[-self.changes.window :].tolist())

    # What the text depends on.

    @property
    def is_known(self) -> bool:
        """Whether it is known how its sampler draws, and what its processors change."""
        return self.settings is not None and self.changes is not None

    @property
    def current_processors(self) -> Sequence[Processor]:
        """The processors that choose its next token, too.

        While the text is ahead, a change of the list counts from a later token on.
        """
        return self._processors_at_start if self.ahead else self.processors

    def changed_tokens(self) -> ChangedTokens | None:
        """Returns what its penalties change at the next place; None where they change nothing.

        The latest token is not counted if it is not read yet.
        """
        if self.changes is None or not self.changes.penalties:
            return None
        window = self.changes.window
        read = [pending.token for pending in self.pending if pending.token is not None]
        known = [*self._prompt_tail, *self.tokens[-window:], *read][-window:]
        return self.changes.changed_tokens(known, len(self.pending) - len(read))

    @property
    def forces_tokens(self) -> bool:
        """Whether a grammar may allow one token alone at a place."""
        return self._mask is not None and self._mask.forces

    @property
    def _mask(self) -> Mask | None:
        """What rules tokens out, if something does."""
        return None if self.changes is None else self.changes.mask

    def forced_tokens(self, latest: int, most: int) -> list[int]:
        """The tokens after its latest one if its grammar allows no others, ``most`` at most.

        Args:
            latest: The latest token, which the model has not taken.
            most: How many to return at most.
        """
        mask = self._mask
        context = self.context(self.n_chosen - 1)
        if mask is None or context is None:
            return []
        known = mx.concatenate([context, mx.array([latest], context.dtype)])
        return mask.forced_tokens(known, most)

    def n_judged(self, guessed: list[int]) -> int:
        """How many of its next tokens can be judged if these are guessed, 1 at least.

        Its grammar says nothing of what follows a token that it rules out, and nothing may follow
        an end of the text.

        Args:
            guessed: The tokens after its latest one, which were fed with it.
        """
        mask = self._mask
        context = self.context(self.n_chosen)
        if mask is None or context is None:
            return 1 + len(guessed)
        return 1 + mask.n_allowed(context, guessed, self.vocab_size)

    # Whether it is ahead of what is handed out.

    @property
    def undisturbed(self) -> bool:
        """Whether what it depended on is still what it depends on.

        These are its processors, and while it is ahead MLX's random state, which nobody may have
        drawn from or seeded since the latest token was handed out.
        """
        at_start = self._processors_at_start
        if len(self.processors) != len(at_start):
            return False
        if not all(map(is_, self.processors, at_start)):
            return False
        return self._chain is None or self._chain.undisturbed

    @property
    def level(self) -> bool:
        """Whether nothing is ahead but the step that mlx-lm's loop would have launched, too."""
        return self.n_yielded == len(self.tokens) and [p.proposal for p in self.pending] == [None]

    def enter(self, phase: Phase, mark: TextMark | None = None, why: Mode | None = None) -> None:
        """Changes its phase.

        To be level again it must be :attr:`level`, or cut to what mlx-lm's loop would have chosen.
        MLX's random state is what that loop has left then.

        Args:
            phase: The next one.
            mark: Of its caches as they are, where it begins to be ahead.
            why: Why it is dense from now on, to its end.
        """
        was_ahead = self.ahead
        self.phase = phase
        self.ahead = phase in AHEAD_OF_CALLER
        self.proposing = phase is Phase.AHEAD
        if self.ahead:
            if not was_ahead:
                self.marks.append(cast(TextMark, mark))
                if self.draws_from_mlx:
                    self._chain = DrawChain(self.n_chosen)
            return
        if phase is Phase.LEVEL and self._chain is not None:
            set_key(self._chain.state(self.n_chosen))
        self.marks.clear()
        self._chain = None
        if why is not None:
            self.why_dense = why

    # Its tokens.

    @property
    def fed(self) -> list[int]:
        """Those of its tokens that the caches hold."""
        read = [cast(int, pending.token) for pending in self.pending[: self.n_read]]
        return [*self.tokens, *read][: self.n_cached]

    @property
    def n_chosen(self) -> int:
        """The number of tokens chosen so far, those that are pending among them."""
        return len(self.tokens) + len(self.pending)

    @property
    def n_read(self) -> int:
        """Pending tokens that are read: all but the one that the next step feeds."""
        n_read = len(self.pending)
        while n_read and not self.pending[n_read - 1].is_read:
            n_read -= 1
        return n_read

    @property
    def knows_latest(self) -> bool:
        """Whether its latest token is known, although it may not be read."""
        return not self.pending or self.pending[-1].token is not None

    def feed(self, latest: mx.array) -> None:
        """Notes that the model gets the tokens (n,), for the processors."""
        self.n_cached += len(latest)
        if self.current_processors:
            if self._ids_dtype is not None:
                latest = latest.astype(self._ids_dtype)
            self._fed.append(latest)

    def _join_fed(self) -> None:
        """Joins the tokens that were fed to those before them."""
        if self._fed:
            joined = self._fed
            if self._ids is not None:
                joined = [self._ids, *joined]
            self._ids = mx.concatenate(joined)
            self._fed = []

    def accept(self) -> PendingToken:
        """Moves the first pending token to the accepted ones."""
        pending = self.pending.pop(0)
        self.tokens.append(cast(int, pending.token))
        self.ready.append(pending)
        return pending

    def hand_out(self) -> PendingToken:
        """The next accepted token. MLX's random state becomes what mlx-lm's loop has left then."""
        pending = self.ready.popleft()
        self.n_yielded += 1
        while len(self.marks) > 1 and self.marks[1].n_tokens <= self.n_yielded:
            self.marks.popleft()
        self.leave_state()
        return pending

    def leave_state(self) -> None:
        """Leaves MLX's random state as mlx-lm's loop would at the token handed out last."""
        # That loop is a token ahead.
        if self._chain is not None:
            self._chain.move_to(self.n_yielded + 1)

    def mark_before(self, n_tokens: int) -> TextMark | None:
        """The latest mark at its first ``n_tokens`` or before; None while it is not ahead."""
        before = [mark for mark in self.marks if mark.n_tokens <= n_tokens]
        return before[-1] if before else None

    def cut(self, n_tokens: int) -> None:
        """Forgets all tokens after the first ``n_tokens`` accepted ones, pending ones too."""
        self.pending.clear()
        for _ in range(len(self.tokens) - n_tokens):
            self.ready.pop()
        del self.tokens[n_tokens:]

    def roll_back(self, n_tokens: int) -> None:
        """Notes that the caches hold the first ``n_tokens`` of the text and no others."""
        self.rejected = False
        self.keep_cached(n_tokens)
        while len(self.marks) > 1 and self.marks[-1].n_tokens > n_tokens:
            self.marks.pop()

    def keep_guessed(self, n_before: int, tokens: list[int], n_right: int, guesser: str) -> None:
        """Keeps the places of a wide step that are right, and the choice behind them.

        They are read. That choice is known, and read in the next round.

        Args:
            n_before: Tokens that were pending before the step.
            tokens: What was chosen in its places.
            n_right: How many of these are as guessed.
            guesser: Who has guessed them.
        """
        del self.pending[n_before + n_right + 1 :]
        for pending, token in zip(self.pending[n_before:-1], tokens, strict=False):
            pending.guessed = guesser
            pending.read(token)
        self.pending[-1].token = tokens[n_right]

    def keep_cached(self, n_tokens: int) -> None:
        """Notes that tokens after the first ``n_tokens`` are not in the caches any more."""
        self.n_cached = n_tokens
        self._join_fed()
        if self._ids is not None:
            self._ids = self._ids[: self._n_before + n_tokens]

    # Its choices.

    def draw_at(self, index: int) -> tuple[Draw, Key]:
        """The settings and the key of the draw at place ``index`` of the text."""
        settings = self.settings or Greedy()
        if settings.greedy:
            return settings, NO_KEY
        if self._chain is None:
            return settings, position_key(self.seed, index)
        return settings, (self._chain.number_bits(index), 0)

    def context(self, index: int) -> mx.array | None:
        """The tokens before place ``index`` of the text, (n,), as processors get them."""
        self._join_fed()
        return None if self._ids is None else self._ids[: self._n_before + index]

    def process(self, logits: mx.array, context: mx.array | None) -> mx.array:
        """The logits (1, V) after the processors, which may write into them."""
        processors = self.current_processors
        if context is None or not processors:
            return logits
        logits = mx.array(logits)
        for processor in processors:
            logits = processor(context, logits)
        return logits

    def pick(self, logits: mx.array, logprobs: mx.array, index: int) -> mx.array:
        """Returns the token (1,) that processed logits (1, V) choose.

        ``logprobs`` are the same, normalized as mlx-lm's loops do.
        """
        if self.greedy:
            return mx.argmax(logprobs, axis=-1)
        if type(self.sampler) is Sampler:
            return self.sampler.choose(logits, self.seed, index)
        # `hand_out` makes the state right for the caller.
        if self._chain is not None:
            set_key(self._chain.state(index))
        return cast(SamplerFunction, self.sampler)(logprobs)

    def choose(self, logits: mx.array, index: int) -> tuple[mx.array, mx.array]:
        """Chooses a token by the model's logits, and calls the sampler and each processor once.

        Args:
            logits: The model's logits (1, V).
            index: The place of the token in the text.

        Returns:
            The token (1,) and log-probabilities (V,).
        """
        logits = self.process(logits, self.context(index))
        logprobs = normalized(logits)
        return self.pick(logits, logprobs, index), logprobs.squeeze(0)

    def extend(self, logits: mx.array) -> mx.array:
        """Chooses the next token (1,) by the model's logits (1, V). It is pending then."""
        token, logprobs = self.choose(logits, self.n_chosen)
        self.add_dense(logprobs)
        return token

    def add_dense(self, logprobs: mx.array) -> None:
        """Notes that the dense logits have chosen the next token: log-probabilities (V,)."""
        pending = PendingToken()
        if self.logprobs:
            pending.logprobs = logprobs
        self.pending.append(pending)


def _as_given(processors: Iterable[Processor] | None) -> Sequence[Processor]:
    """A text's processors. A list stays the caller's, so that a change of it shows."""
    if processors is None:
        return ()
    return processors if isinstance(processors, list | tuple) else tuple(processors)


def mode_of(text: Text, n_handed_out: int) -> Mode:
    """How the latest of the tokens that were handed out since a text's prompt was decoded."""
    if n_handed_out == 1 and text.mode.is_verified:
        return FIRST
    return text.mode


def own_processors(processors: Iterable[Processor]) -> tuple[Processor, ...]:
    """Processors for one text of a batch: another one in the place of each that keeps a state."""
    own: list[Processor] = []
    for processor in processors:
        if isinstance(processor, Mask):
            own.append(processor.for_text())
        else:
            own.append(processor)
    return tuple(own)
