"""Verification multiplies the dense rows with all pending states at once.

It finds which proposals are certain whatever rounding does.
"""

from dataclasses import replace
from typing import Any, NamedTuple, cast

import mlx.core as mx

from ..head.clustered import in_token_order
from ..head.draw import Draws, DrawSettings, log_mass, noise_of_all, threshold
from ..head.flash_head import FlashHead
from ..head.margins import (
    MASS_ROUNDING,
    SMALLEST_FLOAT16,
    SMALLEST_FLOAT32,
    merging_distance,
    noise_margin,
)
from ..head.proposal import Proposal, Tolerance
from .changes import after_changes, mask_array
from .proposer import Proposer
from .random_state import Key
from .rounding import SlotProduct, rounding_of
from .sampler import Trust, normalized
from .sequence import PendingToken, Sequence

Row = tuple[Sequence, PendingToken, int]  # a sequence, its pending token, its place in the text


class Verification:
    """A verification of the pending tokens that are read.

    It is launched when made, and read by :meth:`accept`. ``snapshots`` are the caches of the
    ``sequences`` as they are now.
    """

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
        self._rows = sorted(rows, key=lambda row: proposer.needs_logits(row[0]))
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
        tolerance = self._rounding.tolerance(self._proposal.hidden, self._head.steps)
        logit_map = proposer.logit_map
        by_logits = [proposer.needs_logits(sequence) for sequence, *_ in self._rows]
        n, certain = by_logits.count(False), []
        if n:
            assert logit_map is not None
            greedy = all(settings.greedy for settings, _ in draws[:n])
            screened = _rows_of(self._proposal, slice(n))
            of_rows = _tolerance_of(tolerance, slice(n))
            if self._rounding.scored:
                changes = [sequence.changes for sequence, *_ in self._rows[:n]]
                epsilon = self._rounding.epsilon
                scored = after_changes(of_rows.scored, screened.logits, changes, epsilon)
                of_rows = of_rows._replace(scored=scored)
            screen = self._head.steps.screen(
                slots[:n],
                screened,
                None if greedy else Draws.of(draws[:n]),
                of_rows,
                self._rounding.epsilon,
                logit_map,
                mask_array([pending.allowed for _, pending, _ in self._rows[:n]]),
            )
            certain.append(screen.certain)
        for i in range(n, len(self._rows)):
            row = slice(i, i + 1)
            certain.append(self._is_certain(i, slots[row], _tolerance_of(tolerance, row)))
        self._certain = certain[0] if len(certain) == 1 else mx.concatenate(certain)
        for i, (sequence, pending, index) in enumerate(self._rows):
            if sequence.logprobs:  # lazy, since few are read
                logits = self._in_order(slots[i : i + 1])
                logits = sequence.process(logits, sequence.context(index))
                pending.logprobs = normalized(logits)[0]
        mx.async_eval(self._certain)

    def _is_certain(self, i: int, slots: mx.array, tolerance: Tolerance) -> mx.array:
        """Returns whether a choice by the processed logits of all tokens is certain, (1,) bool."""
        sequence, pending, index = self._rows[i]
        token, context = cast(int, pending.token), sequence.context(index)
        own = _rows_of(self._proposal, slice(i, i + 1))
        change, logit_map = self._proposer.model_logits, self._proposer.logit_map

        def bound(sign: float) -> mx.array:
            """Returns processed logits (1, V) where the head's lie off by ``sign`` tolerances.

            Rounding to their dtype keeps an order, so that bounds of rounded logits are such.
            """
            values = slots.astype(mx.float32)
            off = tolerance.product + tolerance.relative * mx.abs(values)
            values = (values + sign * off).astype(slots.dtype)
            scored = own.logits.astype(mx.float32)
            share = mx.where(tolerance.scored > 0, tolerance.relative, 0.0)
            if logit_map is None:  # the scored logits are the head's, too
                off = tolerance.scored + share * mx.abs(scored)
            else:
                values = logit_map(values)
                share = share + logit_map.rounding(slots.dtype)
                share = mx.where(tolerance.scored > 0, share, 0.0) + logit_map.slack(slots.dtype)
                off = logit_map.slope * tolerance.scored + share * mx.abs(scored)
            exact = (scored + sign * off).astype(own.logits.dtype)
            values = mx.put_along_axis(values, own.probes[..., None], exact, axis=1)
            logits = in_token_order(values.flatten(1), self._head.clustered.slot_of)
            logits = change(logits) if logit_map is None else logits
            return sequence.process(logits, context)

        if sequence.trust is not Trust.EXACT:  # pure: called again, on what is known best
            same = mx.array([True])
            for logits in (bound(0.0), bound(-1.0), bound(1.0)):
                same = same & (sequence.pick(logits, normalized(logits), index) == token)
            return same
        low = bound(-1.0)
        high = bound(1.0)
        draw = sequence.draw_at(index)
        key = sequence.mlx_key(index)
        return is_certain(low, high, token, draw, key, self._rounding.epsilon)

    def _in_order(self, slots: mx.array) -> mx.array:
        """Brings logits (k, C, n) in the order of the clusters into the model's order: (k, V)."""
        logits = in_token_order(slots.flatten(1), self._head.clustered.slot_of)
        return self._proposer.model_logits(logits)

    def forget(self, sequences: list[Sequence]) -> None:
        """What was launched for these is of no use any more."""
        for sequence in sequences:
            self.snapshots.pop(sequence, None)

    def accept(self, sequence: Sequence) -> None:
        """Waits for the verification and accepts the sequence's tokens up to a rejected one.

        The dense choice takes the place of that one. Nothing is pending any more then.
        """
        if self._product is not None:
            self._screen()
        if self._certain is not None:
            self._decide()
        for _ in range(self.counts[sequence]):
            pending = sequence.pending[0]
            if pending in self._choices:
                token, logprobs = self._choices[pending]
                pending.logprobs = logprobs if sequence.logprobs else None
                sequence.rejected = token != pending.token
                pending.token = token
            sequence.accept()
            if sequence.rejected:
                self._proposer.n_rejected += 1
                sequence.pending.clear()
                return

    def _decide(self) -> None:
        """Decides all rows that are in doubt by the dense logits of their own states."""
        certain = cast(list[bool], cast(mx.array, self._certain).tolist())
        self._certain, chosen = None, {}
        for (sequence, pending, index), is_certain in zip(self._rows, certain, strict=True):
            if not is_certain and sequence in self.snapshots:
                proposal, row = cast(Proposal, pending.proposal), pending.row
                logits = self._proposer.dense_row(proposal.hidden[row : row + 1])
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


def _tolerance_of(tolerance: Tolerance, rows: slice) -> Tolerance:
    """The tolerance of some rows."""
    return tolerance._replace(product=tolerance.product[rows], scored=tolerance.scored[rows])


def is_certain(
    low: mx.array,
    high: mx.array,
    token: int,
    draw: tuple[DrawSettings, tuple[int, int]],
    mlx_key: Key | None,
    epsilon: float,
) -> mx.array:
    """Returns whether ``draw`` takes the token for all logits within bounds.

    Args:
        low: The lowest processed logits (1, V), of their dtype.
        high: The highest ones, likewise.
        token: The token.
        draw: The settings of the draw, and its key.
        mlx_key: The key by which a sampler of mlx-lm draws; None if none does.
        epsilon: The spacing of log-probabilities, relative.

    Returns:
        (1,) bool, lazy.
    """
    settings, position = draw
    old_cut = kept_from_least(low, high, settings.top_p) if settings.sums_from_least else None
    if old_cut is not None:
        settings = replace(settings, top_p=1.0)
    low = low.astype(mx.float32)
    high = high.astype(mx.float32)
    ids = mx.arange(low.shape[-1])
    own = ids == token
    if settings.greedy:
        rival = mx.max(mx.where(own, -mx.inf, high), axis=-1)
        merged = merging_distance(log_mass(high)[:, 0], rival, epsilon)
        return low[:, token] - rival > merged
    draws = Draws.of([(settings, position)])
    if mlx_key is not None:
        grid = epsilon * (mx.abs(low - log_mass(high)) + 1.0) + MASS_ROUNDING
        low, high = low - grid, high + grid
    lowest = threshold(high, draws, log_mass(low) - MASS_ROUNDING)
    # mlx-lm may leave out a token that equals the last of a top-k
    surely = low > lowest if mlx_key is not None and settings.top_k else low >= lowest
    maybe = high >= threshold(low, draws, log_mass(high) + MASS_ROUNDING)
    if old_cut is not None:
        surely = surely & old_cut.surely
        if settings.top_k:  # of fewer tokens that surely remain, top-k may keep any other
            all_kept = Draws.of([(replace(settings, top_k=0), position)])
            before_top_k = high >= threshold(low, all_kept)
            maybe = maybe | (before_top_k & (old_cut.n_surely < settings.top_k))
        maybe = maybe & old_cut.maybe
    likely = mx.where(maybe, high * draws.settings[:, :1], -mx.inf)
    unlikely = mx.where(surely, low * draws.settings[:, :1], -mx.inf)
    if mlx_key is None:
        noisy = mx.where(own, unlikely, likely) + noise_of_all(draws.keys, len(ids))
        rival = mx.max(mx.where(own, -mx.inf, noisy), axis=-1)
        return noisy[:, token] > rival + noise_margin(noisy[:, token])
    # MLX draws by noise, or by where a uniform number falls in the cumulated probabilities. Either
    # way the draw is certain if it is the token for the three worst cases: all others as likely as
    # they may be, those of lower ids, and those of higher ids, the rest as unlikely as they may be.
    key = mx.array(mlx_key, mx.uint32)
    certain = surely[:, token]
    for pushed in (~own, ids < token, ids > token):
        case = mx.where(pushed, likely, unlikely)
        certain = certain & (mx.random.categorical(case, key=key) == token)
    return certain


class Kept(NamedTuple):
    """What a filter makes of logits that are known within bounds."""

    surely: mx.array  # (1, V) bool: kept whatever the logits are
    maybe: mx.array  # (1, V) bool: kept for some of them
    n_surely: mx.array  # (1, 1): how many of the best tokens are kept, at least


def kept_from_least(low: mx.array, high: mx.array, top_p: float) -> Kept:
    """Returns what mlx-lm 0.31's top-p keeps of logits between ``low`` and ``high``. Lazy.

    It sorts log-probabilities, adds up their probabilities from the least one on, in their dtype,
    and keeps each place at which the sum is greater than 1 - top_p. In 16 bits such a sum may lie
    far from the true one. But in sorted order each of the true values lies between those of the
    bounds, and a sum that is rounded after each addition never falls where its terms rise: the same
    operation on both bounds gives bounds of it, in whichever order MLX adds. Sums need not rise
    from one place to the next, as a GPU adds blocks, so a token is kept surely if it is at all
    places where it may be. Of equal values each may stand at any of their places.

    Args:
        low: The lowest logits (1, V), of the logits' dtype.
        high: The highest ones, likewise.
        top_p: The probability of the tokens that are kept.
    """
    dtype = low.dtype
    n_tokens = low.shape[-1]
    least_total = (log_mass(low.astype(mx.float32)) - MASS_ROUNDING).astype(dtype)
    most_total = (log_mass(high.astype(mx.float32)) + MASS_ROUNDING).astype(dtype)
    low = (low - most_total).astype(mx.float32)
    high = (high - least_total).astype(mx.float32)
    sorted_low = mx.sort(low, axis=-1)
    sorted_high = mx.sort(high, axis=-1)
    # an exponential is off by less than the spacing of its dtype
    off = max(mx.finfo(dtype).eps, MASS_ROUNDING)
    smallest = SMALLEST_FLOAT16 if dtype == mx.float16 else SMALLEST_FLOAT32
    low_terms = mx.maximum(mx.exp(sorted_low) * (1 - off) - smallest, 0.0)
    high_terms = mx.exp(sorted_high) * (1 + off) + smallest
    surely_above = mx.cumsum(low_terms.astype(dtype), axis=-1) > 1 - top_p
    surely_below = mx.cumsum(high_terms.astype(dtype), axis=-1) <= 1 - top_p
    places = mx.arange(n_tokens)
    # from the one place on all are kept, before the other none
    n_unsure = mx.max(mx.where(surely_above, -1, places), axis=-1, keepdims=True) + 1
    n_dropped = mx.min(mx.where(surely_below, n_tokens, places), axis=-1, keepdims=True)
    last_unsure = mx.take_along_axis(sorted_high, mx.maximum(n_unsure - 1, 0), axis=-1)
    first_kept = mx.take_along_axis(sorted_low, mx.minimum(n_dropped, n_tokens - 1), axis=-1)
    surely = (n_unsure == 0) | (low > last_unsure)
    maybe = ~(high < first_kept)  # NaN may be anything
    return Kept(surely, maybe, n_tokens - n_unsure)
