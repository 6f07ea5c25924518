"""Streamed text on a terminal, with lines that break between words."""

import unicodedata
from collections.abc import Callable

TAB_STOP = 8


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
        """The text that can be shown now.

        Args:
            text: The next piece.
        """
        shown = []
        for char in text:
            if char in " \t\n" or self._is_whole_before(char):
                shown.append(self._take_word())
            if char == "\n":
                shown.append(char)
                self._column, self._space = 0, ""
            elif char in " \t":
                self._space += char
            else:
                self._word += char
                if _advanced(0, self._word) >= self._columns():
                    shown.append(self._take_word())
                    self._within_word = True
        return "".join(shown)

    def end(self) -> str:
        """The rest of the text. The next text begins on a new line."""
        rest = self._take_word()
        self._column, self._space = 0, ""
        return rest

    def _is_whole_before(self, char: str) -> bool:
        """Chinese and Japanese have no spaces between words: a line may end at each character."""
        wide = _width(char) == 2 or (self._word and _width(self._word[-1]) == 2)
        return bool(wide) and _width(char) > 0

    def _take_word(self) -> str:
        """The word with the space before it, or on a new line."""
        word, space = self._word, self._space
        if not word:
            self._within_word = False
            return ""
        self._word = self._space = ""
        columns = self._columns()
        end = _advanced(_advanced(self._column, space), word)
        if self._column and not self._within_word and end >= columns:
            space, end = "\n", _advanced(0, word)
        self._column, self._within_word = end % columns, False
        return space + word


def _advanced(column: int, text: str) -> int:
    """The end column of a text that begins in ``column``, on an endless line."""
    for char in text:
        column += TAB_STOP - column % TAB_STOP if char == "\t" else _width(char)
    return column


def _width(char: str) -> int:
    """Columns that a character takes."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):  # accents, joiners
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1
