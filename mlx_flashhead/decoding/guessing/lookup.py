"""Prompt lookup: what followed the latest tokens when they stood in the text before.

Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx

from ...wide.step import MAX_WIDTH
from ..text import Text
from .depth import EXPECTED_WEIGHT, MAX_GUESSES, Shares
from .guesser import Guesser, LatestToken, Offer

# The lengths of the n-grams that are looked up, the longest first.
LENGTHS = (4, 3, 2)
# How often guesses are right that nobody has tried yet, by the length of the n-gram.
EXPECTED_BY_LENGTH = {4: 0.6, 3: 0.4, 2: 0.2}


class _Watched(NamedTuple):
    """An offer whose first token will be known soon.

    Attributes:
        length: Of the n-gram that was found.
        place: Of the token that is offered first.
        token: This token.
    """

    length: int
    place: int
    token: int


class Lookup:
    """The n-grams of a prompt and of its text as far as it is known, and what followed them.

    Adding a token and looking one up take a few steps, however long the text is.

    Args:
        tokens: Of the prompt.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens: list[int] = []
        # For each length: the place behind the latest n-gram, where its continuation begins.
        self._behind: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in LENGTHS}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds tokens at the end."""
        known = self.tokens
        for token in tokens:
            for length, behind in self._behind.items():
                if len(known) >= length:
                    behind[tuple(known[-length:])] = len(known)
            known.append(token)

    def truncate(self, n_tokens: int) -> None:
        """Forgets all tokens after the first ``n_tokens``, which were taken back."""
        del self.tokens[n_tokens:]

    def find(self, n_tokens: int) -> tuple[int, list[int]]:
        """Looks up what may follow.

        Where the continuation reaches the end of what is known it goes on as it began, as in text
        that repeats itself.

        Args:
            n_tokens: How many tokens are wanted.

        Returns:
            The length of the n-gram that was found, and the tokens; 0 and none if there is none.
        """
        known = self.tokens
        for length in LENGTHS:
            latest = tuple(known[-length:])
            place = self._behind[length].get(latest, len(known))
            # What was taken back may have left a place at which the n-gram no longer stands.
            if place < len(known) and tuple(known[place - length : place]) == latest:
                found = known[place : place + n_tokens]
                while len(found) < n_tokens:
                    found += found[: n_tokens - len(found)]
                return length, found
        return 0, []


class LookupGuesser(Guesser):
    """Guesses what followed the latest tokens when they stood in the prompt or the text before."""

    name = "lookup"

    def __init__(self) -> None:
        self._lookup = Lookup()
        # Of the lookup's tokens, which may have the latest one behind these.
        self._n_heard = 0
        self._shares = shares_by_length()
        # The latest offer, until it is judged.
        self._watched: _Watched | None = None

    def hear(self, tokens: list[int], states: mx.array | None) -> None:
        """Adds tokens, and sees whether an offer that was not taken would have been right."""
        self._n_heard += len(tokens)
        n_new = self._n_heard - len(self._lookup.tokens)
        self._add(tokens[len(tokens) - n_new :])

    def take_back(self, n: int) -> None:
        """Forgets the last ``n`` tokens."""
        self._n_heard -= n
        self._lookup.truncate(self._n_heard)

    def offer(self, text: Text, latest: LatestToken) -> Offer | None:
        """What followed the longest n-gram at the text's end that stood there before."""
        length, found = self._find(latest)
        if not length:
            return None
        # Processors need the token before the step.
        if latest.token is None and text.current_processors:
            latest.read()
            length, found = self._find(latest)
            if not length:
                return None
        n_unknown = int(latest.token is None)
        self._watched = _Watched(length, len(self._lookup.tokens), found[0])
        guessed = found[n_unknown:]
        chances = chances_behind(self._shares[length].chances, n_unknown)
        return Offer(self, chances, lambda n: mx.array(guessed[:n], mx.uint32))

    def judge(self, n: int, n_right: int) -> None:
        """Learns how often guesses by an n-gram of this length are right."""
        if self._watched is not None:
            self._shares[self._watched.length].note(n, n_right)
            self._watched = None

    def _find(self, latest: LatestToken) -> tuple[int, list[int]]:
        if latest.token is not None and len(self._lookup.tokens) == self._n_heard:
            self._add([latest.token])
        return self._lookup.find(MAX_WIDTH)

    def _add(self, tokens: list[int]) -> None:
        lookup = self._lookup
        lookup.extend(tokens)
        watched = self._watched
        if watched is not None and watched.place < len(lookup.tokens):
            right = lookup.tokens[watched.place] == watched.token
            self._shares[watched.length].note(1, int(right))
            self._watched = None


def shares_by_length() -> dict[int, Shares]:
    """How often guesses are right in a text, by the length of the n-gram. Nothing is known yet."""
    expected = {length: [EXPECTED_BY_LENGTH[length]] * MAX_GUESSES for length in LENGTHS}
    return {length: Shares(shares, EXPECTED_WEIGHT) for length, shares in expected.items()}


def chances_behind(chances: list[float], n_unknown: int) -> list[float]:
    """The chances of what is found to be right, but for its first tokens, which are not guessed.

    Args:
        chances: Of each token that was found, if those before it are right. The last one stands for
            those behind it.
        n_unknown: How many come first, 0 or 1. They must be as found, too.

    Returns:
        As many chances.
    """
    if not n_unknown:
        return chances
    return [chances[0] * chances[1], *chances[2:], chances[-1]]
