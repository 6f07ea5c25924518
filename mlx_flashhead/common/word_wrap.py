"""Streamed text on a terminal, with lines that break between words."""

import re
import unicodedata
from collections.abc import Callable

_WIDE = "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60\U00020000-\U0003fffd"
# A word with the space before it. Chinese and Japanese have no spaces: each character is one.
_UNIT = re.compile(rf"\n|[ \t]*[{_WIDE}]|[ \t]*[^ \t\n{_WIDE}]+|[ \t]+")


class WordWrap:
    """Breaks lines between words, as the pieces of a text come.

    A word is shown when it is complete, one token later. The last column stays empty, since some
    terminals begin a new line when it is filled. The terminal itself breaks a word that is wider
    than a line, so that it can be copied in one piece. ``columns`` returns the terminal's width.
    """

    def __init__(self, columns: Callable[[], int]):
        self._columns = columns
        self._column = 0  # of the cursor
        self._rest = ""  # may still grow

    def feed(self, text: str) -> str:
        """The text that can be shown now that ``text`` has come."""
        *units, self._rest = _UNIT.findall(self._rest + text) or [""]
        return "".join(map(self._placed, units))

    def end(self) -> str:
        """The rest of the text. The next text begins on a new line."""
        rest = self._placed(self._rest)
        self._column, self._rest = 0, ""
        return rest

    def _placed(self, unit: str) -> str:
        """The word with the space before it, or on a new line."""
        word = unit.strip(" \t")
        if word in ("", "\n"):
            self._column = 0
            return word
        columns, width = self._columns(), _width(word)
        end = len((" " * self._column + unit.removesuffix(word)).expandtabs()) + width
        if self._column and end >= columns:
            unit, end = f"\n{word}", width
        self._column = end % columns
        return unit


def _width(text: str) -> int:
    """The columns that a text without tabs takes: none for accents and joiners."""
    shown = [char for char in text if unicodedata.category(char) not in ("Mn", "Me", "Cf")]
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in shown)
