"""One round of decoding, for one text or several.

    states   ← model(latest tokens, caches)         taken where the head is called     _step
    proposed ← the head's tokens, or the dense ones, launched in one evaluation        _step
    read the latest tokens, which the step before has launched                         round
    verify when it is due: launched, and read a step later                  schedule.py
    accept up to the first rejected token, which the dense choice replaces
    roll back: the rejected sequence's caches; its next step is launched                _restart

A text whose choices cannot be verified takes the same steps: its tokens, chosen by the normal
(dense) head, are accepted when they are read.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import mlx.core as mx

from .caches import Snapshot, rollback
from .dense_choice import choose_densely, share_a_sampler
from .proposer import Proposer, step_arrays
from .random_state import DrawChain, current_key, set_key
from .schedule import VerifySchedule
from .sequence import Lane, Sequence

SEVERAL_DRAW = "dense: several texts of a batch draw from MLX's random state"
OTHERS_BEGIN = "dense: until the texts that begin beside it draw, too"

# Feeds tokens (R, 1) to the model with these caches: logits (R, 1, V).
Feed = Callable[[mx.array, list[Any]], mx.array]


class Caches(Protocol):
    """The caches of the decoder's sequences, a row for each.

    `caches.py` has one class for a text alone, and one for several.
    """

    layers: list[Any]

    def snapshots(self, rows: list[tuple[int, int]]) -> list[Snapshot]:
        """Returns snapshots of rows' caches, from which they can be rolled back."""
        ...

    def extract(self, row: int) -> list[Any]:
        """Returns the caches of one row, as a text alone would have them."""
        ...

    def drop(self, rows: list[int]) -> None:
        """Takes rows out."""
        ...

    def join(self, layers: list[Any], n_rows: int = 1) -> None:
        """Adds the rows of the caches ``layers``."""
        ...

    def merged(self, caches: list[list[Any]]) -> list[Any]:
        """Returns caches of single texts as those of a batch."""
        ...


class Decoder:
    """Decodes R ≥ 1 sequences at once.

    :meth:`round` makes the next tokens of each sequence. What is accepted waits in the sequence's
    ``ready`` until :meth:`Sequence.hand_out`.

    Args:
        proposer: Proposes tokens, and says what can be verified.
        caches: The caches of the sequences.
        feed: Runs the model.
    """

    def __init__(self, proposer: Proposer, caches: Caches, feed: Feed):
        self.sequences: list[Sequence] = []
        self.caches = caches
        self._proposer = proposer
        self._feed = feed
        self._latest: mx.array | None = None  # (R,), launched and not read
        self._schedule = VerifySchedule(proposer, self._snapshots)
        self._n_started = 0
        self._texts_changed = False  # whether a text began or ended since the lanes were given
        self.goes_ahead = True  # whether texts may go ahead of what they hand out

    def start(self, sequences: list[Sequence], layers: list[Any], logits: mx.array) -> None:
        """Adds sequences whose prompts have been read, and launches their first tokens.

        Args:
            sequences: The R sequences.
            layers: The caches that hold their prompts.
            logits: The dense logits (R, V) of the last positions, which choose the first tokens.
        """
        for sequence in sequences:
            sequence.joined = self._n_started
            self._n_started += 1
        tokens = choose_densely(self._proposer, sequences, logits, share_a_sampler(sequences))
        mx.async_eval(step_arrays(tokens, [sequence.pending[-1] for sequence in sequences]))
        self._join(sequences, layers, tokens)
        self._texts_changed = True

    def round(self) -> None:
        """Computes the next token of each sequence, and accepts what is decided.

        The step is launched while the token before it is read. Evaluates.
        """
        pace = self._proposer.pace_of(self.sequences)
        if pace is None:
            if self._adopt_all(pays=True):
                self._advance()
            return
        began = time.perf_counter()
        if not self._adopt_all(pays=not pace.dense):
            return
        n_before = sum(sequence.n_chosen for sequence in self.sequences)
        n_verified = self._schedule.n_verified
        n_traced = self._proposer.n_traced
        proposes = all(sequence.verified and not sequence.paused for sequence in self.sequences)
        self._advance()
        if self._proposer.n_traced > n_traced:  # MLX has compiled
            return
        seconds = time.perf_counter() - began
        if proposes:
            n_tokens = sum(sequence.n_chosen for sequence in self.sequences) - n_before
            verified = self._schedule.n_verified > n_verified
            pace.note_proposed(seconds, n_tokens / len(self.sequences), verified)
        elif not any(sequence.verified for sequence in self.sequences):
            pace.note_dense(seconds)

    def _advance(self) -> None:
        """Launches the next step, reads the token before it, and accepts what is decided."""
        latest = cast(mx.array, self._latest)
        self._latest = self._step(self.sequences, self.caches.layers, latest)
        for sequence, token in zip(self.sequences, cast(list[int], latest.tolist()), strict=True):
            sequence.pending[sequence.n_read].read(token)
        self._schedule.step(self.sequences)
        self._restart([sequence for sequence in self.sequences if sequence.rejected])

    @property
    def drawing(self) -> list[Sequence]:
        """The sequences that draw from MLX's random state, in the order in which they do."""
        drawing = [sequence for sequence in self.sequences if sequence.draws_from_mlx]
        return sorted(drawing, key=lambda sequence: sequence.joined)

    @property
    def in_step(self) -> list[Sequence]:
        """The sequences that are handed out together: all, if several draw ahead from MLX's state.

        Their draws depend on when the others end.
        """
        drawing = self.drawing
        return list(self.sequences) if len(drawing) > 1 and drawing[0].verified else []

    def realign(self) -> bool:
        """Brings what was drawn ahead in line with the texts that there are now.

        In mlx-lm each step of a batch splits the random state: once, with noise for all rows, if
        they share a sampler, else once for each text that draws from it. So a text that ended or
        began changes the draws of the others from the next step on.

        Returns:
            Whether a step was launched, and the tokens before it wait to be handed out.
        """
        verified = [sequence for sequence in self.sequences if sequence.verified]
        if verified and not self.goes_ahead:
            self.settle(verified, pause=True)
            for sequence in verified:
                sequence.why_dense = OTHERS_BEGIN
            return True
        # a sampler that is only called again has no draws that are known
        drawing = [s for s in self.drawing if s.verified and s.draws_ahead]
        if not (drawing and self._texts_changed):
            return False
        self._texts_changed = False
        lanes = self._lanes(drawing[0].next_step)
        changed = [s.change_lane(lane) for s, lane in zip(drawing, lanes, strict=True)]
        ahead = any(sequence.n_chosen > sequence.n_yielded + 1 for sequence in drawing)
        if any(changed) and ahead:
            self.settle(drawing)
            return True
        return False

    def _lanes(self, step: int) -> list[Lane]:
        """The lanes of all texts that draw, which begin with draw number ``step``."""
        drawing = self.drawing
        n = len(drawing)
        if n > 1 and share_a_sampler(self.sequences):
            return [Lane(step, batch=(row, n)) for row in range(n)]
        return [Lane(step, n, rank) for rank in range(n)]

    def settle(
        self,
        sequences: list[Sequence],
        *,
        pause: bool = False,
        caches_changed: bool = False,
    ) -> None:
        """Forgets what was computed beyond the tokens that mlx-lm's loop would have computed.

        That is of each text the one after the last that was handed out. It is decided now if it was
        not. MLX's random state stays as it is.

        What a caller has changed in between counts from the place on where it would in that loop.

        Args:
            sequences: Some whose tokens are verified.
            pause: Whether the normal (dense) head decodes what follows for the time being.
            caches_changed: Whether the texts go on with whatever their caches hold.
        """
        state = current_key()
        for sequence in sequences:
            if len(sequence.tokens) == sequence.n_yielded:
                self._decide(sequence)
        self._schedule.forget(sequences)
        for sequence in sequences:
            sequence.cut(sequence.n_yielded + 1)
            if caches_changed:
                sequence.rolled_back(sequence.n_yielded)
                sequence.verified_anew(self.snapshot(sequence))
        layers = self._take_back(sequences)
        if pause:
            for sequence in sequences:
                sequence.pause_verified()
        set_key(state)
        self._feed_last(sequences, layers)
        # a verification that was waited for may have rejected tokens of others, too
        self._restart([sequence for sequence in self.sequences if sequence.rejected])

    def snapshot(self, sequence: Sequence) -> Snapshot:
        """A snapshot of a sequence's caches as they are."""
        return self._snapshots([sequence])[0]

    def handed_out_cache(self, sequence: Sequence) -> list[Any]:
        """Returns one sequence's caches with the tokens that were handed out and no others.

        They are copies of rows of a batch, or those of a text alone, after which it must
        :meth:`settle`.
        """
        row = self.sequences.index(sequence)
        return self._rolled_back(sequence, self.caches.extract(row), sequence.n_yielded)

    def leave(self, sequences: list[Sequence]) -> list[list[Any]]:
        """Takes sequences out. Returns the caches of each, with the tokens handed out."""
        caches = [self.handed_out_cache(sequence) for sequence in sequences]
        self.drop(sequences)
        return caches

    def drop(self, sequences: list[Sequence]) -> None:
        """Takes sequences out, and their caches with them."""
        if sequences:
            self._schedule.forget(sequences)
            self._drop(sequences)
            self._texts_changed = True

    # The round's parts.

    def _step(self, sequences: list[Sequence], layers: list[Any], latest: mx.array) -> mx.array:
        """Feeds the latest tokens (R,), and launches the next ones (R,)."""
        proposer = self._proposer
        n = len(sequences)
        for i, sequence in enumerate(sequences):
            sequence.feed(latest if n == 1 else latest[i : i + 1])
        proposed = [i for i in range(n) if sequences[i].verified and not sequences[i].paused]
        if n > 1 and n > proposer.max_batch:
            proposed = []
        states: list[mx.array] = []
        with proposer.noting(states, logits=len(proposed) < n):
            logits = self._feed(latest[:, None], layers)
        if len(proposed) == n:
            tokens = proposer.propose(sequences, _last(states[-1]), latest)
        elif not proposed:
            shared = share_a_sampler([*self.sequences, *sequences])
            tokens = choose_densely(proposer, sequences, logits[:, -1, :], shared, states)
        else:
            shared = share_a_sampler([*self.sequences, *sequences])
            logits = logits[:, -1, :]
            dense = [i for i in range(n) if i not in proposed]
            rows = mx.array(proposed)
            some = [sequences[i] for i in proposed]
            first = proposer.propose(some, _last(states[-1])[rows], latest[rows])
            rest = [sequences[i] for i in dense]
            of_rest = logits[mx.array(dense)]
            second = choose_densely(proposer, rest, of_rest, shared, states, dense)
            tokens = mx.concatenate([first, second])[mx.argsort(mx.array(proposed + dense))]
        chosen = [sequence.pending[-1] for sequence in sequences]
        mx.async_eval(step_arrays(tokens, chosen), self._schedule.joined)
        return tokens

    def _adopt_all(self, *, pays: bool) -> bool:
        """Has the tokens of all sequences proposed from now on, or decodes them densely.

        Returns:
            Whether the round goes on. Otherwise the next step is launched.
        """
        if len(self.sequences) > 1 and len(self.drawing) > 1:
            return self._adopt_together(pays)
        for sequence in self.sequences:
            self._adopt(sequence, pays)
        return True

    def _adopt(self, sequence: Sequence, pays: bool) -> None:
        """Does so with one sequence.

        They are proposed if they can be verified and proposals pay. Dense decoding begins once
        nothing that was proposed is pending any more.
        """
        pays = pays and self._proposer.pays(sequence, len(self.sequences))
        if not sequence.verified:
            if pays and self._proposer.can_verify(sequence):
                if self.goes_ahead:
                    sequence.begin_verified(self.snapshot(sequence))
                else:
                    sequence.why_dense = OTHERS_BEGIN
        elif not pays:
            sequence.paused = True
            if all(pending.proposal is None for pending in sequence.pending):
                sequence.pause_verified()

    def _adopt_together(self, pays: bool) -> bool:
        """Does so where several texts draw from MLX's random state: with all texts, or none.

        Returns:
            As :meth:`_adopt_all`.
        """
        proposer = self._proposer
        drawing = self.drawing
        able = len(self.sequences) <= proposer.max_batch
        able = able and all(proposer.can_verify(sequence) for sequence in self.sequences)
        able = able and all(proposer.can_draw_ahead(sequence) for sequence in drawing)
        pays = pays and all(proposer.pays(s, len(self.sequences)) for s in self.sequences)
        if not (able and self.goes_ahead):
            for sequence in filter(proposer.can_verify, self.sequences):
                sequence.why_dense = OTHERS_BEGIN if able else SEVERAL_DRAW
        ahead = pays and able and self.goes_ahead
        verified = [sequence for sequence in self.sequences if sequence.verified]
        if verified and not ahead:
            self.settle(verified, pause=True)
            return False
        if ahead and not verified:
            chain = DrawChain()
            lanes = dict(zip(drawing, self._lanes(0), strict=True))
            for sequence in self.sequences:
                lane = lanes.get(sequence)
                sequence.begin_verified(self.snapshot(sequence), chain, lane)
            self._texts_changed = False
        return True

    def _decide(self, sequence: Sequence) -> None:
        """Accepts the first pending token, or what the dense logits choose in its place."""
        if not sequence.n_read:
            row = self.sequences.index(sequence)
            sequence.pending[0].read(cast(int, cast(mx.array, self._latest)[row].item()))
        self._schedule.flush(sequence)

    # Sequences come, go, and start again.

    def _restart(self, sequences: list[Sequence]) -> None:
        """Goes on after the last accepted token of sequences, and launches their next steps.

        Their caches hold another token in its place, or none.
        """
        if sequences:
            self._feed_last(sequences, self._take_back(sequences))

    def _take_back(self, sequences: list[Sequence]) -> list[Any]:
        """Takes sequences out of the round: their caches, with all tokens but the last."""
        caches = []
        for sequence in sequences:
            target = len(sequence.tokens) - 1
            cache = self.caches.extract(self.sequences.index(sequence))
            caches.append(self._rolled_back(sequence, cache, target))
            sequence.rolled_back(target)
        self._drop(sequences)
        return self.caches.merged(caches)

    def _feed_last(self, sequences: list[Sequence], layers: list[Any]) -> None:
        """Launches the step after the last accepted tokens of sequences, which join the round."""
        latest = mx.array([sequence.tokens[-1] for sequence in sequences], dtype=mx.uint32)
        tokens = self._step(sequences, layers, latest)
        self._join(sequences, layers, tokens)

    def _join(self, sequences: list[Sequence], layers: list[Any], tokens: mx.array) -> None:
        self.caches.join(layers, len(sequences))
        latest = self._latest
        self._latest = tokens if latest is None else mx.concatenate([latest, tokens])
        self.sequences += sequences

    def _drop(self, sequences: list[Sequence]) -> None:
        rows = [self.sequences.index(sequence) for sequence in sequences]
        kept = [row for row in range(len(self.sequences)) if row not in rows]
        self.caches.drop(rows)
        self.sequences = [self.sequences[row] for row in kept]
        self._latest = cast(mx.array, self._latest)[mx.array(kept)] if kept else None

    def _rolled_back(self, sequence: Sequence, cache: list[Any], target: int) -> list[Any]:
        """A sequence's own caches, with the first ``target`` tokens of its text."""
        held = [each for each in sequence.snapshots if each.n_tokens <= target]
        if held:
            rollback(
                cache,
                held[-1],
                sequence.tokens,
                len(sequence.tokens) - sequence.rejected,
                sequence.n_cached,
                target,
                lambda token: self._feed(token, cache),
            )
        return cache

    def _snapshots(self, sequences: list[Sequence]) -> list[Snapshot]:
        rows = [(self.sequences.index(sequence), sequence.n_cached) for sequence in sequences]
        return self.caches.snapshots(rows)


def _last(states: mx.array) -> mx.array:
    """The states of the last positions: (R, L, D) → (R, D)."""
    n_rows, n_positions, width = states.shape
    return states.reshape(n_rows, width) if n_positions == 1 else states[:, -1]
