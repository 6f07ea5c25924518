"""One round of decoding, for one text or several.

    states   ← model(latest tokens, caches)         taken where the head is called     _step
    proposed ← the head's tokens, or the dense ones, launched in one evaluation        _step
    read the latest tokens, which the step before has launched                         round
    verify when it is due: launched, and read a step later                  verification.py
    accept up to the first rejected token, which the dense choice replaces
    roll back: the rejected text's caches; its next step is launched                _restart

A text whose choices cannot be verified takes the same steps: its tokens, chosen by the normal
(dense) head, are accepted when they are read.
"""

import logging
from collections import deque
from functools import cache as once
from typing import Any, cast

import mlx.core as mx

from ..wide.twin import NoWideStepError
from .caches import Caches, TextMark
from .clock import now
from .guessing.guesser import Guess, LatestToken
from .guessing.guesses import Guesses
from .phase import Phase
from .proposer import Proposer, step_arrays
from .random_state import current_key, set_key
from .text import PendingToken, Text
from .verification import VerifySchedule

log = logging.getLogger("mlx_flashhead")


class Decoder:
    """Decodes R ≥ 1 texts at once.

    :meth:`round` makes the next tokens of each text. What is accepted waits in the text's
    ``ready`` until :meth:`Text.hand_out`.

    Args:
        proposer: Proposes tokens, and says what can be verified.
        caches: The caches of the texts: of a text alone, or of several. They run the model.

    Attributes:
        texts: The R texts, in the order of their caches.
        guesses: What is guessed of texts, where something is. They hear each token, and are asked
            while a text decodes alone.
        several_draw: Whether several texts draw from MLX's random state, also such as are not here
            yet. Their draws depend on when any text begins and ends, so that none goes ahead.
    """

    def __init__(self, proposer: Proposer, caches: Caches):
        self.texts: list[Text] = []
        self.caches = caches
        self.guesses: dict[Text, Guesses] = {}
        self.several_draw = False
        self._proposer = proposer
        # The latest tokens (R,), launched and not read.
        self._latest: mx.array | None = None
        self._schedule = VerifySchedule(proposer, caches.marks)
        self._n_started = 0

    def start(self, texts: list[Text], layers: list[Any], logits: mx.array) -> None:
        """Adds texts whose prompts have been read, and launches their first tokens.

        Args:
            texts: The R texts.
            layers: The caches that hold their prompts.
            logits: The dense logits (R, V) of the last positions, which choose the first tokens.
        """
        for text in texts:
            text.joined = self._n_started
            text.vocab_size = logits.shape[-1]
            self._proposer.begin(text)
            self._n_started += 1
        tokens = self._proposer.choose_densely(texts, logits, [])
        mx.async_eval(step_arrays(tokens, [text.pending[-1] for text in texts]))
        self._join(texts, layers, tokens)

    def take_guesses(self, text: Text, guesses: Guesses | None) -> None:
        """Goes by guesses of a text, which have heard its tokens so far; None: there are none."""
        if guesses is not None:
            self.guesses[text] = guesses

    def round(self) -> None:
        """Computes the next token of each text, and accepts what is decided.

        The step is launched while the token before it is read. Evaluates.
        """
        pace = self._proposer.pace_of(self.texts)
        for text in self.texts:
            self._change_phase(text, gains=pace is None or not pace.dense)
        if pace is None:
            self._advance()
            return
        n_before = sum(text.n_chosen for text in self.texts)
        n_verified = self._schedule.n_verified
        n_traced = self._proposer.n_traced
        all_propose = all(text.proposing for text in self.texts)
        began = now()
        single = self._advance()
        seconds = now() - began
        # Such a round is no measure of single steps: MLX has compiled in it, or it took a wide one.
        if self._proposer.n_traced > n_traced or not single:
            return
        if all_propose:
            n_tokens = sum(text.n_chosen for text in self.texts) - n_before
            verified = self._schedule.n_verified > n_verified
            pace.note_proposed(seconds, n_tokens / len(self.texts), verified)
        elif not any(text.ahead for text in self.texts):
            pace.note_dense(seconds)

    def _change_phase(self, text: Text, *, gains: bool) -> None:
        """Decides at the beginning of a round how a text's next tokens are chosen.

        They are proposed if they can be verified and that gains time. Otherwise the normal (dense)
        head chooses them: at first while what was proposed is still pending, and once nothing is
        ahead any more, step by step as in mlx-lm's loop.

        Args:
            text: One of the decoder's.
            gains: Whether texts like it gain by proposals at the time.
        """
        text.mode = self._proposer.mode_for(
            text, len(self.texts), gains=gains, several_draw=self.several_draw
        )
        if text.mode.is_verified:
            self._go_ahead(text, Phase.AHEAD)
        elif text.ahead:
            phase = Phase.DRAINING
            if text.level:
                phase = Phase.LEVEL
            text.enter(phase)

    def _go_ahead(self, text: Text, phase: Phase) -> None:
        if not text.ahead:
            text.enter(phase, self._mark(text))
        elif text.phase is not phase:
            text.enter(phase)

    def _advance(self) -> bool:
        """Launches the next step, reads the token before it, and accepts what is decided.

        Returns:
            Whether the step was a single one.
        """
        self._proposer.n_steps += 1
        latest = self._latest
        assert latest is not None
        guess = self._guess(latest)
        single = guess is None or not self._take_wide_step(self.texts[0], latest, guess)
        if single:
            self._latest, states = self._step(self.texts, self.caches.layers, latest)
            tokens = cast(list[int], latest.tolist())
            for index, (text, token) in enumerate(zip(self.texts, tokens, strict=True)):
                text.pending[text.n_read].read(token)
                if text in self.guesses:
                    self.guesses[text].hear([token], _state_of(states, index))
        self._schedule.step(self.texts)
        self._restart([text for text in self.texts if text.rejected])
        return single

    def _guess(self, latest: mx.array) -> Guess | None:
        """Guesses what follows the latest token, if one text decodes alone."""
        n_texts = len(self.texts)
        if n_texts > 1 and self._proposer.settings.lookup == "on":
            _log_once_that_steps_are_single()
        text = self.texts[0]
        guesses = self.guesses.get(text)
        if guesses is None:
            return None
        if not self._proposer.may_guess(text, n_texts, several_draw=self.several_draw):
            return None
        known = LatestToken(latest, text.pending[-1].token)
        taken = guesses.best(text, known, self.caches.layers)
        if taken is None:
            return None
        # Drafts are drawn as its tokens are.
        if not text.ahead:
            self._go_ahead(text, Phase.DRAINING)
        offer, n = taken
        return Guess(offer.guesser, offer.make(n))

    def _take_wide_step(self, text: Text, latest: mx.array, guess: Guess) -> bool:
        """Feeds a text its latest token and those guessed after it, and keeps those that are right.

        They are right as long as each one is what is chosen in its place. That choice is the one
        of single steps, since the step leaves their bits. The first choice that is not as guessed
        is the latest token then.

        Returns:
            Whether the model has taken the tokens. Otherwise nothing has changed.
        """
        guesses = self.guesses[text]
        proposer = self._proposer
        fed = mx.concatenate([latest.astype(mx.uint32), guess.tokens])
        states: list[mx.array] = []
        try:
            with proposer.noting(states, logits=not text.proposing):
                step = guesses.wide.feed(fed[None], self.caches.layers)
        except NoWideStepError:
            guesses.judge(guess, 0)
            return False
        n_cached = text.n_cached
        n_before = len(text.pending)
        of_latest = text.pending[-1]
        seen: list[int] = []
        if text.current_processors:
            seen = _read_fed(of_latest, latest, guess)
        text.feed(fed)
        chosen = self._choose_in_places(text, seen, step.logits, states)
        mx.async_eval(step_arrays(chosen, text.pending[n_before:]))
        kept = _read_fed(of_latest, latest, guess)
        tokens = cast(list[int], chosen.tolist())
        n_right = guess.n_right(tokens)
        text.keep_guessed(n_before, tokens, n_right, guess.guesser.name)
        step.back_to(n_right + 1)
        text.keep_cached(n_cached + n_right + 1)
        self._latest = chosen[n_right : n_right + 1]
        guesses.judge(guess, n_right)
        proposer.judged[guess.guesser.name].append((len(guess.tokens), n_right))
        heard = None
        if states:
            heard = states[-1][0, : n_right + 1]
        guesses.hear(kept[: n_right + 1], heard)
        return True

    def _choose_in_places(
        self, text: Text, fed: list[int], logits: mx.array, states: list[mx.array]
    ) -> mx.array:
        """Chooses a token in each place of a wide step. They are pending then.

        Args:
            text: The text that was fed.
            fed: The tokens of the step where processors see them, else empty.
            logits: (1, T, V) of its places.
            states: The states (1, T, D) of its places, last, where there is a head.

        Returns:
            The tokens, (T,) or fewer: none behind one that a grammar rules out.
        """
        n = logits.shape[1]
        if fed:
            n = text.n_judged(fed[1:])
        if text.proposing:
            return self._proposer.propose([text] * n, states[-1][0, :n], None, fed[1:])
        of_places = mx.split(logits[0], logits.shape[1])[:n]
        return mx.concatenate([text.extend(own) for own in of_places])

    def hand_out(self, text: Text) -> PendingToken:
        """The next accepted token of a text."""
        pending = text.hand_out()
        if pending.guessed:
            self._proposer.n_guessed[pending.guessed] += 1
        return pending

    def settle(self, texts: list[Text], *, caches_changed: bool = False) -> None:
        """Forgets what was computed beyond the tokens that mlx-lm's loop would have computed.

        That is of each text the one after the last that was handed out. It is decided now if it was
        not. MLX's random state stays as it is, and the normal (dense) head decodes what follows for
        the time being.

        What a caller has changed in between counts from the place on where it would in that loop.

        Args:
            texts: Some that are ahead.
            caches_changed: Whether the texts go on with whatever their caches hold.
        """
        state = current_key()
        latest = cast(mx.array, self._latest)
        for text in texts:
            # Its next token is decided now.
            if len(text.tokens) == text.n_yielded:
                if not text.n_read:
                    index = self.texts.index(text)
                    text.pending[0].read(cast(int, latest[index].item()))
                self._schedule.flush(text)
        self._schedule.forget(texts)
        for text in texts:
            text.cut(text.n_yielded + 1)
            if caches_changed:
                self._roll_back(text, text.n_yielded)
                # Earlier ones are of no use.
                text.marks = deque([self._mark(text)])
        layers = self._take_out(texts)
        for text in texts:
            text.enter(Phase.LEVEL)
        set_key(state)
        self._feed_last(texts, layers)
        # A verification that was waited for may have rejected tokens of others, too.
        self._restart([text for text in self.texts if text.rejected])

    def handed_out_cache(self, text: Text) -> list[Any]:
        """Returns one text's caches with the tokens that were handed out and no others.

        They are copies of what a batch holds, or those of a text alone, after which it must
        :meth:`settle`.
        """
        return self._back_to(text, text.n_yielded)

    def drop(self, texts: list[Text]) -> None:
        """Takes texts out, and their caches with them."""
        if texts:
            self._schedule.forget(texts)
            self._drop(texts)
        for text in texts:
            self.guesses.pop(text, None)

    def leave_guesses(self, text: Text) -> None:
        """Tells whoever guesses that a text ends at the token that was handed out last."""
        if text in self.guesses:
            guesses = self.guesses[text]
            guesses.take_back(text.n_cached - text.n_yielded)
            guesses.leave()

    # The round's parts.

    def _step(
        self, texts: list[Text], layers: list[Any], latest: mx.array
    ) -> tuple[mx.array, mx.array | None]:
        """Feeds the latest tokens (R,), and launches the next ones.

        Returns:
            The next tokens (R,), and the states (R, 1, D) with which the head was called, if there
            is one.
        """
        proposer = self._proposer
        n = len(texts)
        for i, text in enumerate(texts):
            own = latest
            if n > 1:
                own = latest[i : i + 1]
            text.feed(own)
        n_proposed = [text.proposing for text in texts].count(True)
        states: list[mx.array] = []
        with proposer.noting(states, logits=n_proposed < n):
            logits = self.caches.feed(latest[:, None], layers)
        if n_proposed == n:
            tokens = proposer.propose(texts, _last(states[-1]), latest)
        else:
            tokens = self._choose(texts, latest, logits[:, -1, :], states)
        pending = [text.pending[-1] for text in texts]
        mx.async_eval(step_arrays(tokens, pending), self._schedule.joined)
        if not states:
            return tokens, None
        return tokens, states[-1]

    def _choose(
        self,
        texts: list[Text],
        latest: mx.array,
        logits: mx.array,
        states: list[mx.array],
    ) -> mx.array:
        """Chooses the next tokens (R,) of texts of which one at least is dense.

        Args:
            texts: R of them.
            latest: (R,), the tokens that were fed.
            logits: (R, V).
            states: The states (R, L, D) of these, last, if there is a head.
        """
        proposed = [index for index, each in enumerate(texts) if each.proposing]
        dense = [index for index, each in enumerate(texts) if not each.proposing]
        chosen = []
        if proposed:
            proposing_texts = [texts[index] for index in proposed]
            hidden = _of_texts(_last(states[-1]), proposed)
            own_latest = _of_texts(latest, proposed)
            chosen.append(self._proposer.propose(proposing_texts, hidden, own_latest))
        dense_texts = [texts[index] for index in dense]
        own_logits = _of_texts(logits, dense)
        fed_together = None
        if states and len(texts) > 1:
            fed_together = _of_texts(_last(states[-1]), dense)
        others = [*self.texts, *texts]
        chosen.append(self._proposer.choose_densely(dense_texts, own_logits, others, fed_together))
        if not proposed:
            return chosen[0]
        return mx.concatenate(chosen)[mx.argsort(mx.array(proposed + dense))]

    # Texts come, go, and start again.

    def _restart(self, texts: list[Text]) -> None:
        """Goes on after the last accepted token of texts, and launches their next steps.

        Their caches hold another token in its place, or none.
        """
        if texts:
            self._feed_last(texts, self._take_out(texts))

    def _take_out(self, texts: list[Text]) -> list[Any]:
        """Takes texts out of the round: their caches, with all tokens but the last."""
        caches = []
        for text in texts:
            n_tokens = len(text.tokens) - 1
            caches.append(self._back_to(text, n_tokens))
            self._roll_back(text, n_tokens)
        self._drop(texts)
        return self.caches.merged(caches)

    def _feed_last(self, texts: list[Text], layers: list[Any]) -> None:
        """Launches the step after the last accepted tokens of texts, which join the round."""
        latest = mx.array([text.tokens[-1] for text in texts], dtype=mx.uint32)
        tokens, states = self._step(texts, layers, latest)
        for index, text in enumerate(texts):
            if text in self.guesses:
                self.guesses[text].hear([text.tokens[-1]], _state_of(states, index))
        self._join(texts, layers, tokens)

    def _join(self, texts: list[Text], layers: list[Any], tokens: mx.array) -> None:
        self.caches.join(texts, layers)
        if self._latest is not None:
            tokens = mx.concatenate([self._latest, tokens])
        self._latest = tokens
        self.texts += texts

    def _drop(self, texts: list[Text]) -> None:
        kept = [index for index, text in enumerate(self.texts) if text not in texts]
        self.texts = [self.texts[index] for index in kept]
        self.caches.keep(self.texts)
        latest = cast(mx.array, self._latest)
        self._latest = None
        if kept:
            self._latest = latest[mx.array(kept)]

    def _roll_back(self, text: Text, n_tokens: int) -> None:
        """Notes that a text's caches hold the first of its tokens and no others."""
        if text in self.guesses:
            self.guesses[text].take_back(text.n_cached - n_tokens)
        text.roll_back(n_tokens)

    def _back_to(self, text: Text, n_tokens: int) -> list[Any]:
        """A text's own caches, brought back to the first of its tokens."""
        mark = text.mark_before(n_tokens)
        if mark is None:
            return self.caches.extract(text)
        return mark.back_to(n_tokens - mark.n_tokens)

    def _mark(self, text: Text) -> TextMark:
        """A mark of a text at the tokens that its caches hold."""
        return self.caches.marks([text])[0]


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
    n_texts, n_positions, width = states.shape
    if n_positions == 1:
        return states.reshape(n_texts, width)
    return states[:, -1]


def _state_of(states: mx.array | None, index: int) -> mx.array | None:
    """The state (1, D) of a text's last position: of (R, L, D)."""
    if states is None:
        return None
    return states[index, -1:]


def _of_texts(array: mx.array, indices: list[int]) -> mx.array:
    """What an array has of some texts, in order."""
    if len(indices) == len(array):
        return array
    return array[mx.array(indices)]
