"""The interface of whoever guesses a text's next tokens: a grammar, a lookup, a model.

What a guesser hears is what the model has read, so that it may keep a cache of its own beside it:

    guesser.hear(tokens, states)            the prompt, in parts; then each step of the text
    offer = guesser.offer(text, latest)     before a step
    offer.make(n)                           if the decoder takes its first n tokens
    guesser.judge(n, n_right)               how many of them were right
    guesser.hear(tokens, states)            what the text has kept of this step
    guesser.take_back(n)                    where the text goes back
    guesser.leave()                         at its end

Guesses change nothing but the time: a wide step computes them all, and keeps those that are what is
chosen in their places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol, cast

import mlx.core as mx

from ..text import Text
from .depth import Known


class LatestToken:
    """A text's latest token, which the model has not read yet.

    Args:
        array: (1,) uint32, launched.
        token: The same, if it is known.
    """

    def __init__(self, array: mx.array, token: int | None = None):
        self.array = array
        self.token = token

    def read(self) -> int:
        """The token, after waiting for it if it is not known."""
        if self.token is None:
            self.token = cast(int, self.array.item())
        return self.token


@dataclass(frozen=True)
class Offer:
    """What a guesser would guess, before it does.

    Attributes:
        guesser: Whose offer it is.
        chances: For each token that it can guess, the chance that it is right if those before it
            are.
        make: Guesses the first n tokens, n ≥ 1: (n,) uint32, which may not be computed yet.
        cost: The time of guessing a token, relative to a single step of the model.
    """

    guesser: "Guesser"
    chances: Sequence[float]
    make: Callable[[int], mx.array]
    cost: float = 0.0


class Guesser(Protocol):
    """Whoever guesses the tokens of one text. It is made anew for each text.

    A class that names it as its base hears what it does not define, and does nothing then.

    Attributes:
        name: What is said to have guessed a token, such as "lookup".
        wants_states: Whether it hears the states, too.
        known: What earlier texts have shown of it, with what it may lose. None of one whose offers
            are judged where they are not taken, too, so that none is taken to try it.
    """

    name: str
    wants_states: bool = False
    known: Known | None = None

    def hear(self, tokens: list[int], states: mx.array | None) -> None:
        """Hears tokens that the model has read, each once and in order, from the prompt's first on.

        May evaluate while the prompt is read, and should not while the text goes on.

        Args:
            tokens: n of them.
            states: (n, D), with what the head was called after each of them, lazy; None unless
                :attr:`wants_states`, where the prompt was read before this text or by another loop,
                or the model has no FlashHead.
        """
        return None

    def take_back(self, n: int) -> None:
        """Hears that the last ``n`` of the tokens that it has heard are not in the text."""
        return None

    def offer(self, text: Text, latest: LatestToken) -> Offer | None:
        """What it would guess behind the latest token; None if nothing.

        Everything before that token has been heard. Drafts are drawn as the text is, by
        :meth:`Text.pick` at places from ``text.n_chosen`` on, so that sampled text keeps its share.

        Args:
            text: The text.
            latest: Its latest token. Reading it costs time where it is not known.
        """

    def judge(self, n: int, n_right: int) -> None:
        """Hears how many of the ``n`` tokens that it has made were right, up to a wrong one.

        It has heard neither these nor the latest token before them yet.
        """
        return None

    def leave(self) -> None:
        """Is called when the text ends, behind a token that was heard last.

        A cache of its own that a caller keeps holds what was heard then.
        """
        return None


@dataclass(frozen=True)
class Guess:
    """What is taken of an offer.

    Attributes:
        guesser: Who guesses.
        tokens: (n,) uint32, which may not be computed yet.
    """

    guesser: Guesser
    tokens: mx.array

    def n_right(self, chosen: list[int]) -> int:
        """How many of its tokens are right, up to a wrong one.

        Args:
            chosen: What is chosen in the places of its first tokens, and behind them.
        """
        guessed = cast(list[int], self.tokens.tolist())
        pairs = zip(chosen[:-1], guessed, strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
