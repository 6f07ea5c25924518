"""Verification multiplies the dense rows with all pending states at once.

It finds which proposals are certain whatever rounding does.
"""

from typing import Any, cast

import mlx.core as mx

from ..head.clustered import in_token_order
from ..head.draw import Draws, DrawSettings
from ..head.flash_head import FlashHead
from ..head.logit_map import LogitMap
from ..head.proposal import Proposal, Screen, Tolerance
from .certainty import are_certain, is_certain_draw
from .changes import after_changes, mask_array
from .proposer import Proposer
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
        self._proposer = proposer
        self._head = proposer.head
        self.snapshots = dict(zip(sequences, snapshots, strict=True))
        self.counts = {sequence: sequence.n_read for sequence in sequences}
        rows: list[Row] = [
            (sequence, sequence.pending[i], len(sequence.tokens) + i)
            for sequence, n in self.counts.items()
            for i in range(n)
            if sequence.pending[i].proposal is not None
        ]
        needs_logits = {sequence: proposer.needs_logits(sequence) for sequence in sequences}
        # first the rows that a kernel screens, by the head's logits alone
        self._rows = sorted(rows, key=lambda row: needs_logits[row[0]])
        self._n_screened = sum(not needs_logits[sequence] for sequence, *_ in rows)
        self._product: SlotProduct | None = None
        self._certain: mx.array | None = None  # whether each row's token is the dense choice, lazy
        self._choices: dict[PendingToken, tuple[int, mx.array | None]] = {}  # of rows in doubt
        if rows:
            proposer.n_verifications += 1
            tokens = [pending for _, pending, _ in self._rows]
            sources = [(cast(Proposal, each.proposal).hidden, each.row) for each in tokens]
            self._proposal = join(self._head, tokens)
            hidden = self._proposal.hidden
            self._rounding = rounding_of(self._head, hidden.dtype, len(hidden))
            self._product = SlotProduct(self._head, hidden, sources)
            if self._product.ready:
                self._screen()

    @property
    def ready(self) -> bool:
        """Whether it is time to :meth:`accept`: no thread is at work, or it is waited for."""
        return self._product is None or self._product.ready or self._proposer.policy.lockstep

    def _screen(self) -> None:
        """Judges the rows by the product, as soon as it is there."""
        slots = cast(SlotProduct, self._product).result()
        self._product = None
        tolerance = self._rounding.tolerance(self._proposal.hidden, self._head.steps)
        n = self._n_screened
        certain = []
        if n:
            certain.append(self._screened(slots[:n], _tolerance_of(tolerance, slice(n))))
        if n < len(self._rows):
            certain += self._judged_by_logits(
                n, slots[n:], _tolerance_of(tolerance, slice(n, None))
            )
        self._certain = certain[0] if len(certain) == 1 else mx.concatenate(certain)
        for i, (sequence, pending, index) in enumerate(self._rows):
            if sequence.logprobs:  # lazy, since few are read
                logits = self._in_order(slots[i : i + 1])
                logits = sequence.process(logits, sequence.context(index))
                pending.logprobs = normalized(logits)[0]
        mx.async_eval(self._certain)

    def _screened(self, slots: mx.array, tolerance: Tolerance) -> mx.array:
        """Judges the first rows, whose choices the head's logits alone decide.

        Args:
            slots: Their logits (k, C, n).
            tolerance: Their tolerance.

        Returns:
            (k,) bool, whether each row is certain.
        """
        rows = self._rows[: len(slots)]
        proposal = _rows_of(self._proposal, slice(len(slots)))
        draws = None
        if not all(sequence.greedy for sequence, *_ in rows):
            each = [sequence.draw_at(index) for sequence, _, index in rows]
            draws = Draws.of(each, self._head.vocab_size)
        epsilon = self._rounding.epsilon
        if self._rounding.scored:
            changes = [sequence.changes for sequence, *_ in rows]
            scored = after_changes(tolerance.scored, proposal.logits, changes, epsilon)
            tolerance = tolerance._replace(scored=scored)
        screen: Screen = self._head.steps.screen(
            slots,
            proposal,
            draws,
            tolerance,
            epsilon,
            cast(LogitMap, self._proposer.logit_map),
            mask_array([pending.allowed for _, pending, _ in rows]),
        )
        return screen.certain

    def _judged_by_logits(
        self, first: int, slots: mx.array, tolerance: Tolerance
    ) -> list[mx.array]:
        """Judges the rows from ``first`` on, whose choices need the processed logits of all tokens.

        The logits of all of them are computed at once; what a caller has made is called row by row.

        Returns:
            Arrays of bool, whether the rows are certain, in their order.
        """
        rows = self._rows[first:]
        scored = _rows_of(self._proposal, slice(first, None))

        def processed(sign: float) -> list[mx.array]:
            bounds = self._bounds(slots, scored, tolerance, sign)
            return [
                sequence.process(bounds[i : i + 1], sequence.context(index))
                for i, (sequence, _, index) in enumerate(rows)
            ]

        low = processed(-1.0)
        high = processed(1.0)
        epsilon = self._rounding.epsilon
        tokens = [cast(int, pending.token) for _, pending, _ in rows]
        ours = [s.trust is Trust.EXACT and s.mlx_key(index) is None for s, _, index in rows]
        if all(ours):
            draws = [sequence.draw_at(index) for sequence, _, index in rows]
            both = mx.concatenate(low), mx.concatenate(high)
            return [are_certain(*both, tokens, draws, epsilon)]
        pure = any(sequence.trust is not Trust.EXACT for sequence, *_ in rows)
        best = processed(0.0) if pure else low
        certain = []
        for i, (sequence, _, index) in enumerate(rows):
            key = sequence.mlx_key(index)
            if sequence.trust is not Trust.EXACT:  # called again, on what is known best
                same = mx.array([True])
                for logits in (best[i], low[i], high[i]):
                    same = same & (sequence.pick(logits, normalized(logits), index) == tokens[i])
                certain.append(same)
            elif key is None:
                draws = [sequence.draw_at(index)]
                certain.append(are_certain(low[i], high[i], tokens[i : i + 1], draws, epsilon))
            else:
                settings = cast(DrawSettings, sequence.settings)
                certain.append(is_certain_draw(low[i], high[i], tokens[i], settings, key, epsilon))
        return certain

    def _bounds(
        self, slots: mx.array, proposal: Proposal, tolerance: Tolerance, sign: float
    ) -> mx.array:
        """The model's logits (k, V) if the head's are off by ``sign`` tolerances.

        Rounding to their dtype keeps their order, so that these are bounds of rounded logits, too.

        Args:
            slots: The head's logits (k, C, n).
            proposal: Of k rows; its logits take the places of the scored ones.
            tolerance: The tolerance of k rows.
            sign: -1 for the lowest logits, 1 for the highest ones.
        """
        logit_map = self._proposer.logit_map
        of_product = tolerance.product[:, None, None]
        of_scored = tolerance.scored[:, None, None]
        values = slots.astype(mx.float32)
        off = of_product + tolerance.relative * mx.abs(values)
        values = (values + sign * off).astype(slots.dtype)
        scored = proposal.logits.astype(mx.float32)
        share = mx.where(of_scored > 0, tolerance.relative, 0.0)
        if logit_map is None:  # the scored logits are the head's, too
            off = of_scored + share * mx.abs(scored)
        else:
            values = logit_map(values)
            share = share + logit_map.rounding(slots.dtype)
            share = mx.where(of_scored > 0, share, 0.0) + logit_map.slack(slots.dtype)
            off = logit_map.slope * of_scored + share * mx.abs(scored)
        exact = (scored + sign * off).astype(proposal.logits.dtype)
        probes = proposal.probes
        nothing = mx.array(-mx.inf, values.dtype)
        values = mx.put_along_axis(values, probes[..., None], nothing, axis=1)
        # where a probe is repeated, its logits are the lowest value: the first ones count
        values = values.at[mx.arange(len(probes))[:, None], probes].maximum(exact)
        logits = in_token_order(values.flatten(1), self._head.clustered.slot_of)
        return self._proposer.model_logits(logits) if logit_map is None else logits

    def _in_order(self, slots: mx.array) -> mx.array:
        """Brings logits (k, C, n) in the order of the clusters into the model's order: (k, V)."""
        logits = in_token_order(slots.flatten(1), self._head.clustered.slot_of)
        return self._proposer.model_logits(logits)

    def forget(self, sequences: list[Sequence]) -> None:
        """Drops what was launched for some sequences."""
        for sequence in sequences:
            self.snapshots.pop(sequence, None)

    def accept(self, sequence: Sequence) -> None:
        """Waits for the verification and accepts the sequence's tokens up to a rejected one.

        The dense choice takes its place, and nothing is pending any more.
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
        self._certain = None
        chosen = {}
        for (sequence, pending, index), is_certain in zip(self._rows, certain, strict=True):
            if not is_certain and sequence in self.snapshots:
                proposal = cast(Proposal, pending.proposal)
                hidden = proposal.hidden[pending.row : pending.row + 1]
                logits = self._proposer.dense_row(hidden)
                chosen[pending] = sequence.choose(logits, index)
        mx.eval([token for token, _ in chosen.values()])
        for pending, (token, logprobs) in chosen.items():
            self._choices[pending] = (cast(int, token.item()), logprobs)


def join(head: FlashHead, tokens: list[PendingToken]) -> Proposal:
    """One proposal of pending tokens, which become its rows."""
    proposals = {id(pending.proposal): cast(Proposal, pending.proposal) for pending in tokens}
    places = {proposal_id: place for place, proposal_id in enumerate(proposals)}
    rows = [(places[id(pending.proposal)], pending.row) for pending in tokens]
    first = cast(Proposal, tokens[0].proposal)
    if rows == [(0, row) for row in range(len(first.hidden))]:
        return first
    token_ids = [cast(int, pending.token) for pending in tokens]
    joined = head.joined([*proposals.values()], rows, token_ids)
    for row, pending in enumerate(tokens):
        pending.proposal = joined
        pending.row = row
    return joined


def _rows_of(proposal: Proposal, rows: slice) -> Proposal:
    """Some rows of a joined proposal."""
    names = ("hidden", "tokens", "probes", "logits")
    return proposal._replace(**{name: getattr(proposal, name)[rows] for name in names})


def _tolerance_of(tolerance: Tolerance, rows: slice) -> Tolerance:
    """The tolerance of some rows."""
    return tolerance._replace(product=tolerance.product[rows], scored=tolerance.scored[rows])
