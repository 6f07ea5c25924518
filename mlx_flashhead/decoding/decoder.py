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

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import cache as once
from typing import Any, cast

import mlx.core as mx

from ..wide.twin import NoWideStepError
from .caches import Caches, Snapshot, rollback
from .dense_choice import choose_densely
from .guessing.guesser import Guess, LatestToken
from .guessing.guesses import Guesses
from .phase import Phase
from .proposer import Proposer, step_arrays
from .random_state import current_key, set_key
from .schedule import VerifySchedule
from .text import PendingToken, Text

log = logging.getLogger("mlx_flashhead")

# Feeds tokens (R, 1) to the model with these caches: logits (R, 1, V).
Feed = Callable[[mx.array, list[Any]], mx.array]


class Decoder:
    """Decodes R ≥ 1 sequences at once.

    :meth:`round` makes the next tokens of each sequence. What is accepted waits in the sequence's
    ``ready`` until :meth:`Text.hand_out`.

    Args:
        proposer: Proposes tokens, and says what can be verified.
        caches: The caches of the sequences: of a text alone, or of several.
        feed: Runs the model.
    """

    def __init__(self, proposer: Proposer, caches: Caches, feed: Feed):
        self.sequences: list[Text] = []
        self.caches = caches
        self._proposer = proposer
        self._feed = feed
        self._latest: mx.array | None = None  # (R,), launched and not read
        self._schedule = VerifySchedule(proposer, self._snapshots)
        self._n_started = 0
        # Whether several texts draw from MLX's random state, also such as are not here yet. Their
        # draws depend on when any text begins and ends, so that none goes ahead.
        self.several_draw = False

    def start(self, sequences: list[Text], layers: list[Any], logits: mx.array) -> None:
        """Adds sequences whose prompts have been read, and launches their first tokens.

        Args:
            sequences: The R sequences.
            layers: The caches that hold their prompts.
            logits: The dense logits (R, V) of the last positions, which choose the first tokens.
        """
        for sequence in sequences:
            sequence.joined = self._n_started
            sequence.vocab_size = logits.shape[-1]
            self._proposer.begin(sequence)
            self._n_started += 1
        tokens = choose_densely(self._proposer, sequences, logits, [])
        mx.async_eval(step_arrays(tokens, [sequence.pending[-1] for sequence in sequences]))
        self._join(sequences, layers, tokens)

    def round(self) -> None:
        """Computes the next token of each sequence, and accepts what is decided.

        The step is launched while the token before it is read. Evaluates.
        """
        pace = self._proposer.pace_of(self.sequences)
        for sequence in self.sequences:
            self._change_phase(sequence, pays=pace is None or not pace.dense)
        if pace is None:
            self._advance()
            return
        n_before = sum(sequence.n_chosen for sequence in self.sequences)
        n_verified = self._schedule.n_verified
        n_traced = self._proposer.n_traced
        all_propose = all(sequence.proposing for sequence in self.sequences)
        began = time.perf_counter()
        single = self._advance()
        seconds = time.perf_counter() - began
        if self._proposer.n_traced > n_traced or not single:
            return  # MLX has compiled, or the round is no measure of single steps
        if all_propose:
            n_tokens = sum(sequence.n_chosen for sequence in self.sequences) - n_before
            verified = self._schedule.n_verified > n_verified
            pace.note_proposed(seconds, n_tokens / len(self.sequences), verified)
        elif not any(sequence.ahead for sequence in self.sequences):
            pace.note_dense(seconds)

    def _change_phase(self, sequence: Text, *, pays: bool) -> None:
        """Decides at the beginning of a round how a sequence's next tokens are chosen.

        They are proposed if they can be verified and proposals pay. Otherwise the normal (dense)
        head chooses them: at first while what was proposed is still pending, and once nothing is
        ahead any more, step by step as in mlx-lm's loop.

        Args:
            sequence: One of the decoder's.
            pays: Whether texts like it gain by proposals at the time.
        """
        sequence.mode = self._proposer.mode_for(
            sequence, len(self.sequences), pays=pays, several_draw=self.several_draw
        )
        if sequence.mode.is_verified:
            self._go_ahead(sequence, Phase.AHEAD)
        elif sequence.ahead:
            sequence.enter(Phase.LEVEL if sequence.level else Phase.DRAINING)

    def _go_ahead(self, sequence: Text, phase: Phase) -> None:
        if not sequence.ahead:
            sequence.enter(phase, self.snapshot(sequence))
        elif sequence.phase is not phase:
            sequence.enter(phase)

    def _advance(self) -> bool:
        """Launches the next step, reads the token before it, and accepts what is decided.

        Returns:
            Whether the step was a single one.
        """
        self._proposer.n_steps += 1
        latest = self._latest
        assert latest is not None
        guess = self._guess(latest)
        single = guess is None or not self._take_wide_step(self.sequences[0], latest, guess)
        if single:
            self._latest, states = self._step(self.sequences, self.caches.layers, latest)
            tokens = cast(list[int], latest.tolist())
            for row, (sequence, token) in enumerate(zip(self.sequences, tokens, strict=True)):
                sequence.pending[sequence.n_read].read(token)
                if sequence.guesses is not None:
                    sequence.guesses.hear([token], _row(states, row))
        self._schedule.step(self.sequences)
        self._restart([sequence for sequence in self.sequences if sequence.rejected])
        return single

    def _guess(self, latest: mx.array) -> Guess | None:
        """Guesses what follows the latest token, if one text decodes alone."""
        if len(self.sequences) > 1:
            if self._proposer.settings.lookup == "on":
                _log_once_that_steps_are_single()
            return None
        sequence = self.sequences[0]
        guesses = sequence.guesses
        if guesses is None or self.several_draw or sequence.phase is Phase.DENSE:
            return None
        known = LatestToken(latest, sequence.pending[-1].token)
        taken = guesses.best(sequence, known, self.caches.layers)
        if taken is None:
            return None
        if not sequence.ahead:  # drafts are drawn as its tokens are
            self._go_ahead(sequence, Phase.DRAINING)
        offer, n = taken
        return Guess(offer.guesser, offer.make(n))

    def _take_wide_step(self, sequence: Text, latest: mx.array, guess: Guess) -> bool:
        """Feeds a text its latest token and those guessed after it, and keeps those that are right.

        They are right as long as each one is what is chosen in its place. That choice is the one
        of single steps, since the step leaves their bits. The first choice that is not as guessed
        is the latest token then.

        Returns:
            Whether the model has taken the tokens. Otherwise nothing has changed.
        """
        guesses = cast(Guesses, sequence.guesses)
        proposer = self._proposer
        fed = mx.concatenate([latest.astype(mx.uint32), guess.tokens])
        states: list[mx.array] = []
        try:
            with proposer.noting(states, logits=not sequence.proposing):
                step = guesses.wide.feed(fed[None], self.caches.layers)
        except NoWideStepError:
            guesses.judge(guess, 0)
            return False
        n_cached = sequence.n_cached
        n_before = len(sequence.pending)
        pending = sequence.pending[-1]  # the latest token
        seen: list[int] = []
        if sequence.current_processors:  # which see the tokens
            seen = _read_fed(pending, latest, guess)
        sequence.feed(fed)
        chosen = self._choose_in_places(sequence, seen, step.logits, states)
        mx.async_eval(step_arrays(chosen, sequence.pending[n_before:]))
        kept = _read_fed(pending, latest, guess)
        tokens = cast(list[int], chosen.tolist())
        n_right = guess.n_right(tokens)
        sequence.keep_guessed(n_before, tokens, n_right, guess.guesser.name)
        step.back_to(n_right + 1)
        sequence.keep_cached(n_cached + n_right + 1)
        self._latest = chosen[n_right : n_right + 1]
        guesses.judge(guess, n_right)
        proposer.guesses[guess.guesser.name].append((len(guess.tokens), n_right))
        own = states[-1][0, : n_right + 1] if states else None
        guesses.hear(kept[: n_right + 1], own)
        return True

    def _choose_in_places(
        self, sequence: Text, fed: list[int], logits: mx.array, states: list[mx.array]
    ) -> mx.array:
        """Chooses a token in each place of a wide step. They are pending then.

        Args:
            sequence: The text that was fed.
            fed: The tokens of the step where processors see them, else empty.
            logits: (1, T, V) of its places.
            states: The states (1, T, D) of its places, last, where there is a head.

        Returns:
            The tokens, (T,) or fewer: none behind one that a grammar rules out.
        """
        n = sequence.n_judged(fed[1:]) if fed else logits.shape[1]
        if sequence.proposing:
            return self._proposer.propose([sequence] * n, states[-1][0, :n], None, fed[1:])
        places = mx.split(logits[0], logits.shape[1])[:n]
        return mx.concatenate([sequence.extend(place) for place in places])

    def hand_out(self, sequence: Text) -> PendingToken:
        """The next accepted token of a sequence."""
        pending = sequence.hand_out()
        if pending.guessed:
            self._proposer.n_guessed[pending.guessed] += 1
        return pending

    def settle(self, sequences: list[Text], *, caches_changed: bool = False) -> None:
        """Forgets what was computed beyond the tokens that mlx-lm's loop would have computed.

        That is of each text the one after the last that was handed out. It is decided now if it was
        not. MLX's random state stays as it is, and the normal (dense) head decodes what follows for
        the time being.

        What a caller has changed in between counts from the place on where it would in that loop.

        Args:
            sequences: Some that are ahead.
            caches_changed: Whether the texts go on with whatever their caches hold.
        """
        state = current_key()
        latest = cast(mx.array, self._latest)
        for sequence in sequences:
            if len(sequence.tokens) == sequence.n_yielded:  # its next one is decided now
                if not sequence.n_read:
                    row = self.sequences.index(sequence)
                    sequence.pending[0].read(cast(int, latest[row].item()))
                self._schedule.flush(sequence)
        self._schedule.forget(sequences)
        for sequence in sequences:
            sequence.cut(sequence.n_yielded + 1)
            if caches_changed:
                sequence.roll_back(sequence.n_yielded)
                sequence.snapshots = deque([self.snapshot(sequence)])  # earlier ones are of no use
        layers = self._take_out(sequences)
        for sequence in sequences:
            sequence.enter(Phase.LEVEL)
        set_key(state)
        self._feed_last(sequences, layers)
        # a verification that was waited for may have rejected tokens of others, too
        self._restart([sequence for sequence in self.sequences if sequence.rejected])

    def snapshot(self, sequence: Text) -> Snapshot:
        """A snapshot of a sequence's caches as they are."""
        return self._snapshots([sequence])[0]

    def handed_out_cache(self, sequence: Text) -> list[Any]:
        """Returns one sequence's caches with the tokens that were handed out and no others.

        They are copies of rows of a batch, or those of a text alone, after which it must
        :meth:`settle`.
        """
        row = self.sequences.index(sequence)
        return self._cache_at(sequence, self.caches.extract(row), sequence.n_yielded)

    def drop(self, sequences: list[Text]) -> None:
        """Takes sequences out, and their caches with them."""
        if sequences:
            self._schedule.forget(sequences)
            self._drop(sequences)

    # The round's parts.

    def _step(
        self, sequences: list[Text], layers: list[Any], latest: mx.array
    ) -> tuple[mx.array, mx.array | None]:
        """Feeds the latest tokens (R,), and launches the next ones.

        Returns:
            The next tokens (R,), and the states (R, 1, D) with which the head was called, if there
            is one.
        """
        proposer = self._proposer
        n = len(sequences)
        for i, sequence in enumerate(sequences):
            sequence.feed(latest if n == 1 else latest[i : i + 1])
        n_proposed = [sequence.proposing for sequence in sequences].count(True)
        states: list[mx.array] = []
        with proposer.noting(states, logits=n_proposed < n):
            logits = self._feed(latest[:, None], layers)
        if n_proposed == n:
            tokens = proposer.propose(sequences, _last(states[-1]), latest)
        else:
            of_last = _last(states[-1]) if states else None
            tokens = self._choose(sequences, latest, logits[:, -1, :], of_last)
        pending = [sequence.pending[-1] for sequence in sequences]
        mx.async_eval(step_arrays(tokens, pending), self._schedule.joined)
        return tokens, states[-1] if states else None

    def _choose(
        self,
        sequences: list[Text],
        latest: mx.array,
        logits: mx.array,
        states: mx.array | None,
    ) -> mx.array:
        """Chooses the next tokens (R,) of sequences of which one at least is dense.

        Args:
            sequences: R of them.
            latest: (R,), the tokens that were fed.
            logits: (R, V).
            states: (R, D), if there is a head.
        """
        proposed = [row for row, each in enumerate(sequences) if each.proposing]
        dense = [row for row, each in enumerate(sequences) if not each.proposing]
        among_others = None
        if states is not None and len(sequences) > 1:
            among_others = _rows(states, dense)
        chosen = []
        if proposed:
            some = [sequences[row] for row in proposed]
            own = _rows(cast(mx.array, states), proposed)
            chosen.append(self._proposer.propose(some, own, _rows(latest, proposed)))
        some = [sequences[row] for row in dense]
        others = [*self.sequences, *sequences]
        of_some = _rows(logits, dense)
        chosen.append(choose_densely(self._proposer, some, of_some, others, among_others))
        if not proposed:
            return chosen[0]
        return mx.concatenate(chosen)[mx.argsort(mx.array(proposed + dense))]

    # Sequences come, go, and start again.

    def _restart(self, sequences: list[Text]) -> None:
        """Goes on after the last accepted token of sequences, and launches their next steps.

        Their caches hold another token in its place, or none.
        """
        if sequences:
            self._feed_last(sequences, self._take_out(sequences))

    def _take_out(self, sequences: list[Text]) -> list[Any]:
        """Takes sequences out of the round: their caches, with all tokens but the last."""
        caches = []
        for sequence in sequences:
            target = len(sequence.tokens) - 1
            cache = self.caches.extract(self.sequences.index(sequence))
            caches.append(self._cache_at(sequence, cache, target))
            sequence.roll_back(target)
        self._drop(sequences)
        return self.caches.merged(caches)

    def _feed_last(self, sequences: list[Text], layers: list[Any]) -> None:
        """Launches the step after the last accepted tokens of sequences, which join the round."""
        latest = mx.array([sequence.tokens[-1] for sequence in sequences], dtype=mx.uint32)
        tokens, states = self._step(sequences, layers, latest)
        for row, sequence in enumerate(sequences):
            if sequence.guesses is not None:
                sequence.guesses.hear([sequence.tokens[-1]], _row(states, row))
        self._join(sequences, layers, tokens)

    def _join(self, sequences: list[Text], layers: list[Any], tokens: mx.array) -> None:
        self.caches.join(layers)
        latest = self._latest
        self._latest = tokens if latest is None else mx.concatenate([latest, tokens])
        self.sequences += sequences

    def _drop(self, sequences: list[Text]) -> None:
        kept = [row for row, each in enumerate(self.sequences) if each not in sequences]
        self.caches.keep(kept)
        self.sequences = [self.sequences[row] for row in kept]
        self._latest = cast(mx.array, self._latest)[mx.array(kept)] if kept else None

    def _cache_at(self, sequence: Text, cache: list[Any], target: int) -> list[Any]:
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

    def _snapshots(self, sequences: list[Text]) -> list[Snapshot]:
        rows = [(self.sequences.index(sequence), sequence.n_cached) for sequence in sequences]
        return self.caches.snapshots(rows)


@once
def _log_once_that_steps_are_single() -> None:
    log.warning("Several texts decode together, and nothing is looked up until one is alone.")


def _read_fed(pending: PendingToken, latest: mx.array, guess: Guess) -> list[int]:
    """Reads the tokens that a wide step feeds: the latest one, which is pending, and the guess."""
    token = cast(int, latest.item())
    if not pending.is_read:
        pending.read(token)
    return [token, *cast(list[int], guess.tokens.tolist())]


def _last(states: mx.array) -> mx.array:
    """The states of the last positions: (R, L, D) → (R, D)."""
    n_rows, n_positions, width = states.shape
    return states.reshape(n_rows, width) if n_positions == 1 else states[:, -1]


def _row(states: mx.array | None, row: int) -> mx.array | None:
    """The state (1, D) of a row's last position: of (R, L, D)."""
    return None if states is None else states[row, -1:]


def _rows(array: mx.array, rows: list[int]) -> mx.array:
    """Some rows of an array, in order."""
    return array if len(rows) == len(array) else array[mx.array(rows)]
