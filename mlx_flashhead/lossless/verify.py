"""Verification: the dense rows over all pending states at once, which proposals they leave certain
whatever rounding does, and when it is due."""

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx

from ..head.draw import Draws, log_mass, noise_of_all, threshold
from ..head.flash_head import FlashHead
from ..head.steps import Proposal
from .proposer import Proposer
from .rounding import SlotProduct, rounding_of
from .sequence import (
    PendingToken,
    Sequence,
    keeps_bounds,
    normalized,
    random_state,
    set_random_state,
)

MAX_READ = 64  # tokens that may be read while a verification is computed
FEW = 4  # tokens that may wait longer, on a machine that is slow to compute them
JOINED = 7  # pending tokens that are joined at a time, by one kernel
MASS_ROUNDING = 2e-4  # of a sum over all tokens, relative
NOISE_ROUNDING = 1e-5  # of a noisy logit, absolute

Row = tuple[Sequence, PendingToken, int]  # a sequence, its pending token, its place in the text
Bounds = tuple[mx.array, mx.array]  # the lowest and the highest value, of the same shape


class Verification:
    """A verification of the pending tokens that are read, launched when made, and read by
    :meth:`accept`. ``proposal`` is the joined one of the ``rows``."""

    def __init__(self, proposer: Proposer, sequences: list[Sequence]):
        self._proposer, self.sequences = proposer, sequences
        self._head = cast(FlashHead, proposer.head)
        self.counts = {sequence: sequence.n_read for sequence in sequences}
        self._rows: list[Row] = [
            (sequence, sequence.pending[i], len(sequence.tokens) + i)
            for sequence, n in self.counts.items()
            for i in range(n)
            if not sequence.pending[i].dense
        ]
        self._product: SlotProduct | None = None
        self._flags: list[tuple[list[Row], mx.array]] = []  # which rows are certain, lazy
        self._choices: dict[PendingToken, tuple[int, mx.array | None]] = {}  # those in doubt
        if self._rows:
            proposer.n_verifications += 1
            self._proposal = join(self._head, [pending for _, pending, _ in self._rows])
            hidden = self._proposal.hidden
            self._rounding = rounding_of(self._head, hidden.dtype, len(hidden))
            self._product = SlotProduct(self._head, hidden)
            if self._product.ready:
                self._screen()

    @property
    def ready(self) -> bool:
        """Whether it is time to :meth:`accept`: no thread is at work, or it is waited for."""
        return self._product is None or self._product.ready or self._proposer.policy.lockstep

    def _screen(self) -> None:
        """Judges the rows by the product, as soon as it is there."""
        assert self._product is not None
        slots, self._product = self._product.result(), None
        simple = self._proposer.simple
        narrow = [i for i, row in enumerate(self._rows) if simple and not row[0].needs_logits]
        draws = [sequence.draw_at(index) for sequence, _, index in self._rows]
        temperatures = [settings.temperature for settings, _ in draws]
        depth = 0.0 if not any(temperatures) else mx.array(temperatures) * 32.0
        room, scored_room = self._rounding.rooms(self._proposal, depth)
        if narrow:
            every = len(narrow) == len(self._rows)
            proposal = self._proposal if every else _take(self._proposal, narrow)
            of_rows = [draws[i] for i in narrow]
            arrays = [slots, room, scored_room]
            if not every:
                arrays = [array[mx.array(narrow)] for array in arrays]
            greedy = all(settings.greedy for settings, _ in of_rows)
            screen = self._head.steps.screen(
                arrays[0],
                proposal,
                None if greedy else Draws.of(of_rows),
                arrays[1],
                arrays[2],
                self._rounding.epsilon,
            )
            self._flags.append(([self._rows[i] for i in narrow], screen.certain))
        wide = [i for i in range(len(self._rows)) if i not in set(narrow)]
        if wide:
            certain = [self._is_certain(i, slots[i : i + 1], room[i], scored_room[i]) for i in wide]
            self._flags.append(([self._rows[i] for i in wide], mx.concatenate(certain)))
        for i, (sequence, pending, index) in enumerate(self._rows):
            if sequence.logprobs:  # lazy, since few are read
                context = sequence.context(index) if sequence.processors else None
                logits = sequence.process(self._in_order(slots[i : i + 1]), context)
                pending.logprobs = normalized(logits)[0]
        mx.async_eval([certain for _, certain in self._flags])

    def _is_certain(self, i: int, slots: mx.array, room: mx.array, scored: mx.array) -> mx.array:
        """For a choice by the processed logits of all tokens: whether it is certain, (1,) bool."""
        sequence, pending, index = self._rows[i]
        token = cast(int, pending.token)
        context = sequence.context(index) if sequence.processors else None
        own = _take(self._proposal, [i])
        bounds = [self._bound(slots, own, sign * room, sign * scored) for sign in (-1.0, 1.0)]
        low, high = (sequence.process(bound, context) for bound in bounds)
        if not keeps_bounds(sequence):  # a pure function: called again, on what is known best
            middle = self._bound(slots, own, mx.zeros_like(room), mx.zeros_like(room))
            same = mx.array([True])
            for logits in (sequence.process(middle, context), low, high):
                with random_state(
                    None if pending.random_state is None else pending.random_state[0]
                ):
                    same = same & (sequence.pick(logits, normalized(logits), index) == token)
            return same
        low, high = low.astype(mx.float32), high.astype(mx.float32)
        settings, key = sequence.draw_at(index)
        epsilon = self._rounding.epsilon
        if settings.greedy:
            return is_certain_best((low, high), token, epsilon)
        draws = Draws.of([(settings, key)])
        if pending.random_state is None:
            return is_certain_draw((low, high), token, draws)
        return is_certain_replay((low, high), token, draws, pending.random_state[0], epsilon)

    def _bound(self, slots: mx.array, own: Proposal, room: mx.array, scored: mx.array) -> mx.array:
        """The model's logits (1, V) that lie ``room`` off, the scored ones ``scored``. Rounding to
        their dtype keeps an order, so that these are bounds of the rounded logits as well."""
        values = (slots.astype(mx.float32) + room).astype(slots.dtype)
        exact = (own.logits.astype(mx.float32) + scored).astype(slots.dtype)
        values = mx.put_along_axis(values, own.probes[..., None], exact, axis=1)
        return self._in_order(values)

    def _in_order(self, slots: mx.array) -> mx.array:
        """(k, C, n) in the order of the clusters → the model's logits (k, V)."""
        logits = mx.take(slots.reshape(len(slots), -1), self._head.clustered.slot_of, axis=-1)
        return self._proposer.model_logits(logits)

    def accept(self, sequence: Sequence) -> list[PendingToken]:
        """Waits for the verification and accepts the sequence's tokens up to a rejected one, whose
        place the dense choice takes. Nothing is pending any more then."""
        if self._product is not None:
            self._screen()
        if self._flags:
            self._decide()
        accepted: list[PendingToken] = []
        while len(accepted) < self.counts[sequence] and not sequence.rejected:
            pending = sequence.pending[0]
            if pending in self._choices:
                token, logprobs = self._choices[pending]
                pending.logprobs = logprobs if sequence.logprobs else None
                sequence.rejected = token != pending.token
                pending.token = token
            accepted.append(sequence.accept())
        if sequence.rejected:
            self._proposer.n_rejected += 1
            sequence.pending.clear()
            if accepted[-1].random_state is not None:
                set_random_state(accepted[-1].random_state[1])
        return accepted

    def _decide(self) -> None:
        """Decides all rows that are in doubt by the dense logits of their own states."""
        doubtful = [
            row
            for rows, certain in self._flags
            for row, is_certain in zip(rows, cast(list[bool], certain.tolist()), strict=True)
            if not is_certain
        ]
        self._flags = []
        chosen = []
        for sequence, pending, index in doubtful:
            logits = self._proposer.dense_row(_hidden_of(pending))
            with random_state(pending.state_before):
                chosen.append(sequence.choose(logits, index))
        mx.eval([token for token, _ in chosen])
        for (_, pending, _), (token, logprobs) in zip(doubtful, chosen, strict=True):
            self._choices[pending] = cast(int, token.item()), logprobs


def join(head: FlashHead, pending: list[PendingToken]) -> Proposal:
    """One proposal of pending tokens, which become its rows."""
    proposals: list[Proposal] = []
    places: dict[int, int] = {}
    for each in pending:
        assert each.proposal is not None
        if id(each.proposal) not in places:
            places[id(each.proposal)] = len(proposals)
            proposals.append(each.proposal)
    rows = [(places[id(each.proposal)], each.row) for each in pending]
    if len(proposals) == 1 and [row for _, row in rows] == list(range(len(proposals[0].hidden))):
        return proposals[0]
    joined = head.joined(proposals, rows, [cast(int, each.token) for each in pending])
    for row, each in enumerate(pending):
        each.proposal, each.row = joined, row
    return joined


def _hidden_of(pending: PendingToken) -> mx.array:
    assert pending.proposal is not None
    return pending.proposal.hidden[pending.row : pending.row + 1]


def _take(proposal: Proposal, rows: list[int]) -> Proposal:
    """Some rows of a joined proposal."""
    index = mx.array(rows)
    names = ("hidden", "tokens", "probes", "logits")
    return proposal._replace(**{name: getattr(proposal, name)[index] for name in names})


# Choices from bounds of the logits of all tokens: (1, V) float32 each → (1,) bool, lazy.


def is_certain_best(bounds: Bounds, token: int, epsilon: float) -> mx.array:
    """Whether the best log-probability is the token's. ``epsilon`` is the spacing of their dtype:
    mlx-lm's loops round them once more, which may merge two."""
    low, high = bounds
    own = low[:, token]
    rival = mx.max(mx.where(_is(token, high), -mx.inf, high), axis=-1)
    merged = (log_mass(high)[:, 0] - rival + 0.5) * epsilon
    return own - rival > merged


def is_certain_draw(bounds: Bounds, token: int, draws: Draws) -> mx.array:
    """Whether the package's draw takes the token."""
    low, high = bounds
    surely, maybe = _kept(bounds, draws, strict=False)
    inverse = draws.settings[:, :1]
    gumbel = noise_of_all(draws.keys, low.shape[-1])
    own = _is(token, low)
    worst = mx.max(mx.where(own & surely, low * inverse + gumbel, -mx.inf), axis=-1)
    rival = mx.max(mx.where(~own & maybe, high * inverse + gumbel, -mx.inf), axis=-1)
    return worst > rival + NOISE_ROUNDING * (1 + mx.abs(worst))


def is_certain_replay(
    bounds: Bounds, token: int, draws: Draws, state: mx.array, epsilon: float
) -> mx.array:
    """Whether a sampler of mlx-lm draws the token with MLX's random ``state``.

    MLX draws by noise, or by where a uniform number falls in the cumulated probabilities. Either
    way the draw is certain if it is the token for the three worst cases: all others as likely as
    they may be, those of lower ids, and those of higher ids, the rest as unlikely as they may be.
    """
    low, high = bounds
    # the sampler's log-probabilities and their scaled form are rounded to the logits' dtype
    grid = epsilon * (mx.abs(low - log_mass(high)) + 1.0) + MASS_ROUNDING
    low, high = low - grid, high + grid
    surely, maybe = _kept((low, high), draws, strict=True)
    inverse = draws.settings[:, :1]
    likely = mx.where(maybe, high * inverse, -mx.inf)
    unlikely = mx.where(surely, low * inverse, -mx.inf)
    ids = mx.arange(low.shape[-1])
    key = mx.random.split(state)[1]
    certain = surely[:, token]
    for pushed in (ids != token, ids < token, ids > token):
        case = mx.where(pushed, likely, unlikely)
        certain = certain & (mx.random.categorical(case, key=key) == token)
    return certain


def _kept(bounds: Bounds, draws: Draws, strict: bool) -> tuple[mx.array, mx.array]:
    """Which tokens the filters surely keep, and which they may: (1, V) bool each. ``strict``: a
    token that equals the last of a top-k may be left out."""
    low, high = bounds
    surely = threshold(high, draws, log_mass(low) - MASS_ROUNDING)
    maybe = threshold(low, draws, log_mass(high) + MASS_ROUNDING)
    ties = strict and any(settings.top_k for settings in draws.of_rows)
    return (low > surely if ties else low >= surely), high >= maybe


def _is(token: int, values: mx.array) -> mx.array:
    return (mx.arange(values.shape[-1]) == token)[None]


class VerifyScheduler:
    """Has the pending tokens of some sequences verified, and hands out what is sure.

    ``snapshot`` takes snapshots of the caches of some sequences as they are. The first
    verifications come after few tokens, so that text begins to flow early.
    """

    def __init__(self, proposer: Proposer, snapshot: Callable[[list[Sequence]], list[Any]]):
        self._proposer, self._snapshot = proposer, snapshot
        self._verification: Verification | None = None
        self._snapshots: list[Any] = []  # as of the verification's launch
        self._limit = proposer.policy.first_pending
        # of the tokens that wait for a launch
        self._n, self._risk, self._since = 0, 0.0, 0.0
        self._unjoined: list[PendingToken] = []

    def step(
        self, sequences: list[Sequence], read: list[Sequence]
    ) -> Iterator[tuple[Sequence, list[PendingToken]]]:
        """After a step, which has read a token of the sequences in ``read``: what is sure now.

        The caller rolls back rejected sequences and drops finished ones.
        """
        n_read = max((sequence.n_read for sequence in sequences), default=0)
        if self._verification is not None and (self._verification.ready or n_read >= MAX_READ):
            yield from self._outcome()
        last = False
        for sequence in read:
            if not sequence.n_read:  # it has ended or was rolled back
                continue
            pending = sequence.pending[sequence.n_read - 1]
            if pending.dense and sequence.n_read == 1:
                accepted = [sequence.accept()]
                if self._proposer.can_verify(sequence):
                    (sequence.snapshot,) = self._snapshot([sequence])
                yield sequence, accepted
                continue
            self._since = self._since if self._n else time.perf_counter()
            self._n, self._risk = self._n + 1, self._risk + pending.risk
            self._unjoined.append(pending)
            n_tokens = len(sequence.tokens) + sequence.n_read
            ends = pending.token in self._head.eos_token_ids or n_tokens == sequence.limit
            last = last or ends
        if last and self._verification is not None:
            yield from self._outcome()
        waiting = [sequence for sequence in sequences if sequence.n_read]
        if waiting and self._verification is None and (last or self._due):
            self._launch(waiting)
            if last:  # waits, since the next step may be of no use
                yield from self._outcome()
        elif len(self._unjoined) >= JOINED:
            self._join(sequences)

    @property
    def _head(self) -> FlashHead:
        return cast(FlashHead, self._proposer.head)

    @property
    def _due(self) -> bool:
        policy = self._proposer.policy
        max_wait = policy.max_wait if self._proposer.max_wait is None else self._proposer.max_wait
        few = FEW if self._proposer.max_wait is None else 1
        too_long = self._n >= few and time.perf_counter() - self._since >= max_wait
        too_many = self._n >= min(self._limit, policy.max_pending)
        return too_many or self._risk >= policy.max_risk or (too_long and not policy.lockstep)

    def _launch(self, waiting: list[Sequence]) -> None:
        self._n, self._risk, self._limit = 0, 0.0, self._limit * 2
        self._unjoined = []
        self._verification = Verification(self._proposer, waiting)
        self._snapshots = self._snapshot(waiting)

    def _join(self, sequences: list[Sequence]) -> None:
        """Joins what waits for the next verification, a few tokens at a time."""
        counted = self._verification.counts if self._verification is not None else {}
        waiting = [
            pending
            for sequence in sequences
            for pending in sequence.pending[counted.get(sequence, 0) : sequence.n_read]
            if not pending.dense
        ]
        self._unjoined = []
        if waiting:
            join(self._head, waiting)

    def _outcome(self) -> Iterator[tuple[Sequence, list[PendingToken]]]:
        """Waits for the verification. A sequence that goes on has a snapshot of its launch."""
        verification, self._verification = self._verification, None
        assert verification is not None
        for sequence, snapshot in zip(verification.sequences, self._snapshots, strict=True):
            if sequence.pending:  # else it has ended meanwhile
                accepted = verification.accept(sequence)
                if not sequence.rejected:
                    sequence.snapshot = snapshot
                yield sequence, accepted
