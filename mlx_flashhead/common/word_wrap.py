"""Streamed text on a terminal, with lines that break between words."""

import unicodedata
from collections.abc import Callable


class WordWrap:
    """Breaks lines between words, as the pieces of a text come.

    A word is shown when it is complete, one token later. The last column stays empty, since some
    terminals begin a new line when it is filled. The terminal itself breaks a word that is wider
    than a line, so that it can be copied in one piece.

    Args:
        columns: Returns the width of the terminal, which may change.
    """

    def __init__(self, columns: Callable[[], int]):
        self._columns = columns
        self._column = 0  # of the cursor
        self._space = ""  # since the last word
        self._word = ""  # may still grow
        self._within_word = False  # its beginning has been shown

    def feed(self, text: str) -> str:
        """The text that can be shown now that ``text`` has come."""
        shown = ""
        for char in text:
            # Chinese and Japanese have no spaces: a line may end at each character
            if char in " \t\n" or 2 in (_width(char), _width(self._word[-1:])):
                shown += self._take_word()
            if char == "\n":
                shown += char
                self._column, self._space = 0, ""
            elif char in " \t":
                self._space += char
            else:
                self._word += char
                if _width(self._word) >= self._columns():
                    shown += self._take_word()
                    self._within_word = True
        return shown

    def end(self) -> str:
        """The rest of the text. The next text begins on a new line."""
        rest = self._take_word()
        self._column, self._space = 0, ""
        return rest

    def _take_word(self) -> str:
        """The word with the space before it, or on a new line."""
        word, space, within = self._word, self._space, self._within_word
        self._within_word = False
        if not word:
            return ""
        self._word = self._space = ""
        columns, width = self._columns(), _width(word)
        end = len((" " * self._column + space).expandtabs()) + width
        if self._column and not within and end >= columns:
            space, end = "\n", width
        self._column = end % columns
        return space + word


def _width(text: str) -> int:
    """The columns that a text without tabs takes: none for accents and joiners."""
    shown = [char for char in text if unicodedata.category(char) not in ("Mn", "Me", "Cf")]
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in shown)
