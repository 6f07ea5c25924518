"""How often guesses of one kind were right in a text."""

# As how many guesses that counts which is expected.
WEIGHT = 3.0
# What each guess leaves of what is known of those before.
KEPT = 0.9


class Worth:
    """How often guesses of one kind were right in this text.

    Args:
        expected: The share that is expected before any was tried.
    """

    def __init__(self, expected: float):
        self._right = expected * WEIGHT
        self._wrong = (1 - expected) * WEIGHT

    def note(self, n_right: int, wrong: bool) -> None:
        """Notes how many tokens of a guess were right, and whether the next one was wrong."""
        self._right = self._right * KEPT + n_right
        self._wrong = self._wrong * KEPT + wrong

    @property
    def share(self) -> float:
        """The chance that the next token of a guess is right, if those before it are."""
        return self._right / (self._right + self._wrong)

    def chances(self, n: int, n_unknown: int = 0) -> list[float]:
        """The chance of each of ``n`` tokens to be right, if those before it are.

        Args:
            n: How many.
            n_unknown: Tokens before the first one, 0 or 1, which must be as guessed, too.
        """
        chances = [self.share] * n
        chances[0] = self.share ** (1 + n_unknown)
        return chances
