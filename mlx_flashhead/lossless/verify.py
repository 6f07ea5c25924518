"""Verification: the dense rows over all pending states at once, which proposals they leave certain
whatever rounding does, and when it is due."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ..head.draw import Draws, DrawSettings, log_mass, noise_of_all, threshold
from ..head.flash_head import FlashHead
from ..head.steps import Proposal
from ..models.cpu_products import numpy_is_faster, slot_products, to_mlx
from .policy import Proposer
from .sequence import PendingToken, Sequence, Trust, normalized, random_state, set_random_state

MAX_READ = 64  # tokens that may be read while a verification is computed
JOINED = 7  # pending tokens that are joined at a time; a kernel joins 8 at the launch
FEW = 4  # tokens that may wait longer, on a machine that is slow to compute them
CLASSES = (1, 2, 4, 8, 16, 32)  # sizes of a product whose kernels and rounding are the same
WORTH_A_THREAD = 10_000_000  # multiply-adds, a millisecond of work
N_STATES = 3  # whose products are compared for the rounding
ULPS = 2  # of the result's dtype: each of two values is rounded to the nearest
MEASURED = 4  # times what was measured on a few states
MASS_ROUNDING = 2e-4  # of a sum over all tokens, relative
NOISE_ROUNDING = 1e-5  # of a noisy logit, absolute

Row = tuple[Sequence, PendingToken, int]  # a sequence, its pending token, its place in the text


class SlotProduct:
    """Logits of states (k, D) in the order of the clusters, (k, C, n): lazy, or computed by a
    thread beside the steps of the model, on a CPU whose BLAS numpy beats."""

    def __init__(self, head: FlashHead, hidden: mx.array):
        self._head, self._k, rows = head, len(hidden), head.clustered.rows
        self._future: Future[np.ndarray] | None = None
        by_numpy = rows.weight.dtype == mx.float32 and numpy_is_faster()
        if by_numpy and self._k * rows.weight.size >= WORTH_A_THREAD:
            states = np.asarray(hidden.astype(mx.float32))
            self._future = _worker().submit(slot_products, np.asarray(rows.weight), states)
        missing = product_size(self._k) - self._k
        self._hidden = mx.pad(hidden, [(0, missing), (0, 0)]) if missing else hidden

    @property
    def ready(self) -> bool:
        """Whether :meth:`result` does not wait for a thread."""
        return self._future is None or self._future.done()

    def result(self) -> mx.array:
        if self._future is None:
            return self._head.slot_logits(self._hidden)[: self._k]
        logits, bias = to_mlx(self._future.result()), self._head.clustered.rows.bias
        return logits if bias is None else logits + bias


@cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "verification")


def product_size(k: int) -> int:
    """The size to which a product of ``k`` states is filled up, so that its kernel is that whose
    rounding is known. A CPU has one for all."""
    if mx.default_device().type == mx.cpu:
        return k
    return next((size for size in CLASSES if size >= k), -(-k // CLASSES[-1]) * CLASSES[-1])


@dataclass(frozen=True)
class Rounding:
    """How far a head's logits may lie off: shares of the length of the state times that of the
    longest row, and a rounding to the logits' dtype."""

    epsilon: float  # spacing of the logits' dtype, relative to a logit
    longest: float  # length of the longest row, with its bias
    product: float  # of a product of several states, relative to both lengths
    scored: float  # of a scored token's logit, likewise; 0 if it is the same number

    def rooms(self, proposal: Proposal, depth: mx.array | float = 0.0) -> tuple[mx.array, mx.array]:
        """The room of a logit of the product, and of a scored one: (k,) float32 each. ``depth``
        (k,): how far below the best logit a token may still win, by its noise."""
        norms = mx.linalg.norm(proposal.hidden.astype(mx.float32), axis=-1)
        terms = norms * self.longest + self.longest
        best = mx.max(proposal.logits.flatten(1), axis=-1).astype(mx.float32)
        last_places = ULPS * self.epsilon * (mx.abs(best) + depth) if self.epsilon > 1e-6 else 0.0
        room = self.product * terms + last_places
        return room, self.scored * terms + last_places if self.scored else mx.zeros_like(room)


_roundings: WeakKeyDictionary[FlashHead, dict[Any, Rounding]] = WeakKeyDictionary()


def rounding_of(head: FlashHead, dtype: mx.Dtype, k: int) -> Rounding:
    """The bounds for products of ``k`` states of ``dtype``. Evaluates once in each class of k.

    A sum of D products in float32 lies within D·2^-24 of Σ|h·w| ≤ ‖h‖·‖w‖, in whichever order it
    is made; rows of few bits are rounded to 16 bits first. What a few states show beyond that, as
    where float32 is computed in fewer bits, counts four times.

    Source: Higham 2002, "Accuracy and stability of numerical algorithms", section 3.1.
    """
    known = _roundings.setdefault(head, {})
    size = N_STATES if mx.default_device().type == mx.cpu else product_size(k)
    if (dtype, size) not in known:
        known[dtype, size] = _measure(head, dtype, max(N_STATES, size))
    return known[dtype, size]


def _measure(head: FlashHead, dtype: mx.Dtype, n_states: int) -> Rounding:
    hidden = mx.random.normal((n_states, head.hidden_size), key=mx.random.key(0)).astype(dtype)
    states = [hidden[i : i + 1] for i in range(N_STATES)]
    alone = mx.concatenate([head.dense_logits(state) for state in states])
    slots = SlotProduct(head, hidden).result()[:N_STATES].reshape(N_STATES, -1)
    together = mx.take(slots, head.clustered.slot_of, axis=-1)
    with head.settings(n_probes=min(64, head.n_clusters)):
        candidates = [head.candidates(state) for state in states]
    ids, scored = (mx.concatenate([*parts]) for parts in zip(*candidates, strict=True))
    wanted = mx.take_along_axis(alone, mx.minimum(ids, head.vocab_size - 1), axis=-1)
    wanted = mx.where(ids < head.vocab_size, wanted, scored)
    longest, rows, epsilon = 0.0, head.clustered.rows, mx.finfo(alone.dtype).eps
    for start in range(0, head.n_clusters, 1024):  # all rows at once would take much memory
        part = rows.take(mx.arange(start, min(start + 1024, head.n_clusters)))
        lengths = mx.linalg.norm(part.dequantized(mx.float32), axis=-1)
        if part.bias is not None:
            lengths = lengths + mx.abs(part.bias).astype(mx.float32)
        longest = max(longest, cast(float, mx.max(lengths).item()))
    norms = mx.linalg.norm(hidden[:N_STATES].astype(mx.float32), axis=-1, keepdims=True)
    in_16_bits = epsilon > 1e-6

    def apart(values: mx.array, others: mx.array) -> float:
        """The greatest distance beyond the rounding to the logits' dtype, times a margin."""
        values, others = values.astype(mx.float32), others.astype(mx.float32)
        allowed = ULPS * epsilon * mx.abs(others) if in_16_bits else 0.0
        beyond = (mx.abs(values - others) - allowed) / (norms * longest)
        return MEASURED * max(cast(float, mx.max(beyond).item()), 0.0)

    sums = 2 * (head.hidden_size + 1) * 2.0**-24
    rounded = epsilon / 2 if rows.quantized and in_16_bits else 0.0
    same = bool(mx.array_equal(scored, wanted).item())
    scored_room = 0.0 if same else max(sums, apart(scored, wanted))
    return Rounding(epsilon, longest, max(sums + rounded, apart(together, alone)), scored_room)


class Verification:
    """A verification of the pending tokens that are read, launched when made, and read by
    :meth:`accept`. ``snapshots`` are the caches of the ``sequences`` as they are now."""

    def __init__(self, proposer: Proposer, sequences: list[Sequence], snapshots: list[Any]):
        self._proposer, self._head = proposer, proposer.head
        self.snapshots = dict(zip(sequences, snapshots, strict=True))
        self.counts = {sequence: sequence.n_read for sequence in sequences}
        rows: list[Row] = [
            (sequence, sequence.pending[i], len(sequence.tokens) + i)
            for sequence, n in self.counts.items()
            for i in range(n)
            if sequence.pending[i].proposal is not None
        ]
        # those first that a kernel screens, by the head's logits alone
        self._rows = sorted(rows, key=lambda row: row[0].needs_logits)
        self._product: SlotProduct | None = None
        self._certain: mx.array | None = None  # whether each row's token is the dense choice, lazy
        self._choices: dict[PendingToken, tuple[int, mx.array | None]] = {}  # those in doubt
        if rows:
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
        proposer, product = self._proposer, cast(SlotProduct, self._product)
        slots, self._product = product.result(), None
        draws = [sequence.draw_at(index) for sequence, _, index in self._rows]
        temperatures = [settings.temperature for settings, _ in draws]
        depth = mx.array(temperatures) * 32.0 if any(temperatures) else 0.0
        room, scored = self._rounding.rooms(self._proposal, depth)
        by_logits = [not proposer.simple or sequence.needs_logits for sequence, *_ in self._rows]
        n, certain = by_logits.count(False), []
        if n:
            row_draws = Draws.of(draws[:n]) if any(temperatures[:n]) else None
            own = _rows_of(self._proposal, slice(n)), row_draws, (room[:n], scored[:n])
            screen = self._head.steps.screen(slots[:n], *own, self._rounding.epsilon)
            certain.append(screen.certain)
        for i in range(n, len(self._rows)):
            certain.append(self._is_certain(i, slots[i : i + 1], room[i], scored[i]))
        self._certain = certain[0] if len(certain) == 1 else mx.concatenate(certain)
        for i, (sequence, pending, index) in enumerate(self._rows):
            if sequence.logprobs:  # lazy, since few are read
                logits = self._in_order(slots[i : i + 1])
                logits = sequence.process(logits, sequence.context(index))
                pending.logprobs = normalized(logits)[0]
        mx.async_eval(self._certain)

    def _is_certain(self, i: int, slots: mx.array, room: mx.array, scored: mx.array) -> mx.array:
        """For a choice by the processed logits of all tokens: whether it is certain, (1,) bool."""
        sequence, pending, index = self._rows[i]
        token, context = cast(int, pending.token), sequence.context(index)
        own = _rows_of(self._proposal, slice(i, i + 1))

        def bound(sign: float) -> mx.array:
            """The processed logits (1, V) where the model's lie off by ``sign`` times the rooms.
            Rounding to their dtype keeps an order, so that bounds of rounded logits are such."""
            values = (slots.astype(mx.float32) + sign * room).astype(slots.dtype)
            exact = (own.logits.astype(mx.float32) + sign * scored).astype(slots.dtype)
            values = mx.put_along_axis(values, own.probes[..., None], exact, axis=1)
            return sequence.process(self._in_order(values), context)

        if sequence.trust is not Trust.EXACT:  # pure: called again, on what is known best
            same = mx.array([True])
            for logits in (bound(0.0), bound(-1.0), bound(1.0)):
                with random_state(pending.state_before):
                    same = same & (sequence.pick(logits, normalized(logits), index) == token)
            return same
        low, high = (bound(sign).astype(mx.float32) for sign in (-1.0, 1.0))
        draw, state = sequence.draw_at(index), pending.state_before
        return is_certain(low, high, token, draw, state, self._rounding.epsilon)

    def _in_order(self, slots: mx.array) -> mx.array:
        """(k, C, n) in the order of the clusters → the model's logits (k, V)."""
        logits = mx.take(slots.reshape(len(slots), -1), self._head.clustered.slot_of, axis=-1)
        return self._proposer.model_logits(logits)

    def accept(self, sequence: Sequence) -> list[PendingToken]:
        """Waits for the verification and accepts the sequence's tokens up to a rejected one, whose
        place the dense choice takes. Nothing is pending any more then."""
        if self._product is not None:
            self._screen()
        if self._certain is not None:
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
        certain = cast(list[bool], cast(mx.array, self._certain).tolist())
        self._certain, chosen = None, {}
        for (sequence, pending, index), is_certain in zip(self._rows, certain, strict=True):
            if not is_certain:
                proposal, row = cast(Proposal, pending.proposal), pending.row
                logits = self._proposer.dense_row(proposal.hidden[row : row + 1])
                with random_state(pending.state_before):
                    chosen[pending] = sequence.choose(logits, index)
        mx.eval([token for token, _ in chosen.values()])
        for pending, (token, logprobs) in chosen.items():
            self._choices[pending] = cast(int, token.item()), logprobs


def join(head: FlashHead, pending: list[PendingToken]) -> Proposal:
    """One proposal of pending tokens, which become its rows."""
    proposals = {id(each.proposal): cast(Proposal, each.proposal) for each in pending}
    places = {proposal_id: place for place, proposal_id in enumerate(proposals)}
    rows = [(places[id(each.proposal)], each.row) for each in pending]
    first = cast(Proposal, pending[0].proposal)
    if rows == [(0, row) for row in range(len(first.hidden))]:
        return first
    tokens = [cast(int, each.token) for each in pending]
    joined = head.joined([*proposals.values()], rows, tokens)
    for row, each in enumerate(pending):
        each.proposal, each.row = joined, row
    return joined


def _rows_of(proposal: Proposal, rows: slice) -> Proposal:
    """Some rows of a joined proposal."""
    names = ("hidden", "tokens", "probes", "logits")
    return proposal._replace(**{name: getattr(proposal, name)[rows] for name in names})


def is_certain(
    low: mx.array,
    high: mx.array,
    token: int,
    draw: tuple[DrawSettings, tuple[int, int]],
    state: mx.array | None,
    epsilon: float,
) -> mx.array:
    """Whether ``draw`` takes the token for all processed logits between ``low`` and ``high`` (1, V)
    float32: (1,) bool, lazy. With a random ``state`` of MLX a sampler of mlx-lm draws. ``epsilon``
    is the spacing of log-probabilities, relative."""
    ids = mx.arange(low.shape[-1])
    own = ids == token
    if draw[0].greedy:
        rival = mx.max(mx.where(own, -mx.inf, high), axis=-1)
        merged = (log_mass(high)[:, 0] - rival + 0.5) * epsilon  # rounding may merge two
        return low[:, token] - rival > merged
    draws = Draws.of([draw])
    if state is not None:
        grid = epsilon * (mx.abs(low - log_mass(high)) + 1.0) + MASS_ROUNDING
        low, high = low - grid, high + grid
    lowest = threshold(high, draws, log_mass(low) - MASS_ROUNDING)
    # mlx-lm may leave out a token that equals the last of a top-k
    surely = low > lowest if state is not None and draw[0].top_k else low >= lowest
    maybe = high >= threshold(low, draws, log_mass(high) + MASS_ROUNDING)
    likely = mx.where(maybe, high * draws.settings[:, :1], -mx.inf)
    unlikely = mx.where(surely, low * draws.settings[:, :1], -mx.inf)
    if state is None:
        noisy = mx.where(own, unlikely, likely) + noise_of_all(draws.keys, len(ids))
        rival = mx.max(mx.where(own, -mx.inf, noisy), axis=-1)
        return noisy[:, token] > rival + NOISE_ROUNDING * (1 + mx.abs(noisy[:, token]))
    # MLX draws by noise, or by where a uniform number falls in the cumulated probabilities. Either
    # way the draw is certain if it is the token for the three worst cases: all others as likely as
    # they may be, those of lower ids, and those of higher ids, the rest as unlikely as they may be.
    key = mx.random.split(state)[1]
    certain = surely[:, token]
    for pushed in (~own, ids < token, ids > token):
        case = mx.where(pushed, likely, unlikely)
        certain = certain & (mx.random.categorical(case, key=key) == token)
    return certain


class VerifyScheduler:
    """Has the pending tokens of some sequences verified, and hands out what is sure. The first
    verifications come after few tokens, so that text begins to flow early. ``snapshot`` takes
    snapshots of the caches of some sequences as they are."""

    def __init__(self, proposer: Proposer, snapshot: Callable[[list[Sequence]], list[Any]]):
        self._proposer, self._snapshot = proposer, snapshot
        self._verification: Verification | None = None
        self._limit = proposer.policy.first_pending
        self._n, self._risk, self._since = 0, 0.0, 0.0  # of the tokens that wait for a launch
        self._unjoined: list[PendingToken] = []
        self.joined: list[mx.array] = []  # of these, to be computed with the next step

    def step(
        self, sequences: list[Sequence], read: list[Sequence]
    ) -> Iterator[tuple[Sequence, list[PendingToken]]]:
        """After a step, which has read a token of the sequences in ``read``: what is sure now. The
        caller rolls back rejected sequences and drops finished ones."""
        self.joined, verification = [], self._verification
        n_read = max((sequence.n_read for sequence in sequences), default=0)
        if verification is not None and (verification.ready or n_read >= MAX_READ):
            yield from self._outcome()
        ends = False
        for sequence in read:
            if not sequence.n_read:  # it has ended or was rolled back
                continue
            pending = sequence.pending[sequence.n_read - 1]
            if pending.proposal is None and sequence.n_read == 1:
                accepted = [sequence.accept()]
                if self._proposer.can_verify(sequence):
                    (sequence.snapshot,) = self._snapshot([sequence])
                yield sequence, accepted
                continue
            self._since = self._since if self._n else time.perf_counter()
            self._n, self._risk = self._n + 1, self._risk + pending.risk
            self._unjoined += [pending] * (pending.proposal is not None)
            ends |= pending.token in self._proposer.head.eos_token_ids
            ends |= len(sequence.tokens) + sequence.n_read == sequence.limit
        if ends and self._verification is not None:
            yield from self._outcome()
        waiting = [sequence for sequence in sequences if sequence.n_read]
        if waiting and self._verification is None and (ends or self._due):
            self._n, self._risk, self._limit = 0, 0.0, self._limit * 2
            self._unjoined = []
            self._verification = Verification(self._proposer, waiting, self._snapshot(waiting))
            if ends:  # waits, since the next step may be of no use
                yield from self._outcome()
        elif len(self._unjoined) >= JOINED:
            proposal, self._unjoined = join(self._proposer.head, self._unjoined), []
            self.joined = [proposal.hidden, proposal.probes, proposal.logits]

    @property
    def _due(self) -> bool:
        policy, max_wait = self._proposer.policy, self._proposer.max_wait
        few, seconds = (FEW, policy.max_wait) if max_wait is None else (1, max_wait)
        too_long = self._n >= few and time.perf_counter() - self._since >= seconds
        too_many = self._n >= min(self._limit, policy.max_pending)
        return too_many or self._risk >= policy.max_risk or (too_long and not policy.lockstep)

    def _outcome(self) -> Iterator[tuple[Sequence, list[PendingToken]]]:
        """Waits for the verification. A sequence that goes on has a snapshot of its launch."""
        verification, self._verification = self._verification, None
        assert verification is not None
        for sequence, snapshot in verification.snapshots.items():
            if sequence.pending:  # else it has ended meanwhile
                accepted = verification.accept(sequence)
                if not sequence.rejected:
                    sequence.snapshot = snapshot
                yield sequence, accepted
