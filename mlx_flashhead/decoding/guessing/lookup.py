"""Prompt lookup: what followed the latest tokens when they stood in the text before.

Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from collections.abc import Iterable

LENGTHS = (4, 3, 2)  # of the n-grams that are looked up, the longest first


class Lookup:
    """The n-grams of a prompt and of its text as far as it is known, and what followed them.

    Adding a token and looking one up take a few steps, however long the text is.

    Args:
        tokens: Of the prompt.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens: list[int] = []
        # for each length: the place behind the latest n-gram, where its continuation begins
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
            # what was taken back may have left a place at which the n-gram no longer stands
            if place < len(known) and tuple(known[place - length : place]) == latest:
                found = known[place : place + n_tokens]
                while len(found) < n_tokens:
                    found += found[: n_tokens - len(found)]
                return length, found
        return 0, []
