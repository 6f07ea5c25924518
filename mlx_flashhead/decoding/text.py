"""One text in progress: its accepted tokens, the pending ones after them, and how it is drawn."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from ..common.masks import Mask
from ..head.adjustment import ChangedTokens
from ..head.draws.draw import NO_KEY, Draw, Key
from ..head.draws.greedy import Greedy
from ..head.draws.noise import position_key
from ..head.proposal import Proposal
from .caches import RowMark
from .changes import Changes
from .phase import AHEAD_OF_CALLER, FIRST, VERIFIED, Mode, Phase
from .random_state import DrawChain, set_key
from .sampler import Processor, Sampler, SamplerFunction, draw_of, normalized

if TYPE_CHECKING:
    from .guessing.guesses import Guesses


@dataclass(eq=False)
class PendingToken:
    """A token that was chosen for a text and is not accepted yet."""

    proposal: Proposal | None = None  # None where the dense logits chose the token
    row: int = 0  # its row in the proposal
    logprobs: mx.array | None = None  # (V,) of the dense logits, where wanted and known
    token: int | None = None  # once it is known; in a wide step what is guessed
    is_read: bool = False  # whether its round has come: only then it can be accepted
    # (⌈V/32⌉,) uint32, a bit a token, whether it could be chosen; None where all could
    allowed: np.ndarray | None = None
    guessed: str = ""  # what has guessed it, so that it was computed in a wide step
    noted: bool = False  # whether the schedule has taken note of it
    # estimated chance that the dense logits choose another token, once it is read
    risk: float = 0.0

    def read(self, token: int) -> None:
        """Notes the token, which has been computed."""
        self.token = token
        self.is_read = True
        if self.proposal is not None:
            self.risk = cast(list[float], self.proposal.risk.tolist())[self.row]


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
    ):
        self.sampler = sampler
        given: Any = () if processors is None else processors
        self.processors: Any = given if isinstance(given, list | tuple) else tuple(given)
        self._processors_at_start = tuple(self.processors)
        self.tokens = list(tokens)
        self.logprobs = logprobs
        self.limit = limit
        self.uid = uid
        self._ids_dtype = ids_dtype
        self.pending: list[PendingToken] = []
        self.ready: deque[PendingToken] = deque()  # accepted, and not handed out
        self.n_yielded = len(self.tokens)  # tokens that the caller has
        self.n_cached = len(self.tokens)  # tokens of the text in the caches
        self.rejected = False  # whether the caches hold another token in the last one's place
        # while it is ahead: the first one is at the last token handed out, or before
        self.marks: deque[RowMark] = deque()
        self.mode: Mode = VERIFIED  # how its next tokens are decoded, since the latest round
        self.why_dense: Mode | None = None  # once it is known that it stays dense to its end
        self.settings = draw_of(sampler)  # None where only the sampler itself knows
        # whether its sampler takes the likeliest token
        self.greedy = self.settings is not None and self.settings.greedy
        # whether it draws from MLX's random state: any but the greedy ones and ours
        self.draws_from_mlx = not self.greedy and type(sampler) is not Sampler
        self.changes = Changes.of(self._processors_at_start)  # None where that is not known
        known = self.settings is not None and self.changes is not None
        self.unchanged = self.changes == Changes()  # whether its processors change nothing
        self.phase = Phase.LEVEL if known else Phase.DENSE  # `enter` changes these three
        self.ahead = False  # whether its tokens may be ahead of those handed out
        self.proposing = False  # whether the FlashHead proposes its next tokens
        draws_by_seed = type(sampler) is Sampler and not self.greedy
        self.seed = cast(Sampler, sampler).new_seed() if draws_by_seed else 0
        self.guesses: Guesses | None = None  # of its tokens, for the time that it decodes alone
        self.shares_sampler = True  # whether mlx-lm may call its sampler for several texts at once
        self.vocab_size = 0  # of its logits; 0 before any
        self.joined = 0  # its place among the texts of a batch, in the order in which they began
        self._chain: DrawChain | None = None  # while it is ahead and draws from MLX's random state
        self._n_before = 0 if prompt_ids is None else len(prompt_ids)
        self._ids: mx.array | None = None  # tokens before the next one, but for those fed since
        self._fed: list[mx.array] = []  # joined to them once a processor is called
        if self._processors_at_start and prompt_ids is not None:
            begun = mx.array(self.tokens, prompt_ids.dtype)
            self._ids = mx.concatenate([prompt_ids, begun]) if self.tokens else prompt_ids
        self._prompt_tail: list[int] = []  # as many of the prompt's last tokens as penalties need
        if self.changes is not None and self.changes.window and prompt_ids is not None:
            self._prompt_tail = cast(list[int], prompt_ids[-self.changes.window :].tolist())
        if not self.tokens:
            for processor in self._processors_at_start:
                if isinstance(processor, Mask):
                    processor.begin()

    # What the text depends on.

    @property
    def current_processors(self) -> Any:
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
        mask = None if self.changes is None else self.changes.mask
        return mask is not None and mask.forces

    def forced_tokens(self, latest: int, most: int) -> list[int]:
        """The tokens after its latest one if its grammar allows no others, ``most`` at most.

        Args:
            latest: The latest token, which the model has not taken.
            most: How many to return at most.
        """
        mask = None if self.changes is None else self.changes.mask
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
        mask = None if self.changes is None else self.changes.mask
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

    def enter(self, phase: Phase, mark: RowMark | None = None, why: Mode | None = None) -> None:
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
                self.marks.append(cast(RowMark, mark))
                self._chain = DrawChain(self.n_chosen) if self.draws_from_mlx else None
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
            before = [] if self._ids is None else [self._ids]
            self._ids = mx.concatenate([*before, *self._fed])
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
        if self._chain is not None:  # that loop is a token ahead
            self._chain.place(self.n_yielded + 1)

    def mark_before(self, n_tokens: int) -> RowMark | None:
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
        if self.guesses is not None:
            self.guesses.take_back(self.n_cached - n_tokens)
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
        processors = () if context is None else self.current_processors
        if processors:
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
        if self._chain is not None:  # `hand_out` makes the state right for the caller
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
        self.pending.append(PendingToken(logprobs=logprobs if self.logprobs else None))
        return token


def mode_of(text: Text, n_handed_out: int) -> Mode:
    """How the latest of the tokens that were handed out since a text's prompt was decoded."""
    return FIRST if n_handed_out == 1 and text.mode.is_verified else text.mode


def own_processors(processors: Iterable[Processor]) -> tuple[Processor, ...]:
    """Processors for one text of a batch: another one in the place of each that keeps a state."""
    return tuple(
        processor.for_sequence() if isinstance(processor, Mask) else processor
        for processor in processors
    )
