"""Input and output of a chat: a terminal, or pipes."""

import os
import re
import signal
import sys
import termios
import tty
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from .command import printable
from .typed_lines import QUOTES, is_open, modes_kept

PROMPT = "> "
# The index of the local modes among a terminal's.
_LOCAL = 3
_WIDE = "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60\U00020000-\U0003fffd"
# A word with the space before it. Chinese and Japanese have no spaces: each character is one.
_UNIT = re.compile(rf"\n|[ \t]*[{_WIDE}]|[ \t]*[^ \t\n{_WIDE}]+|[ \t]+")


@contextmanager
def printable_output() -> Iterator[None]:
    """Within the block, what is printed on a terminal cannot control it."""
    write = sys.stdout.write
    if sys.stdout.isatty():
        sys.stdout.write = lambda text: write(printable(text))  # type: ignore[method-assign]
    try:
        yield
    finally:
        sys.stdout.write = write  # type: ignore[method-assign]


class Terminal:
    """Reads texts and prints.

    Behind a pipe, standard output carries the answers alone, and the program's own lines go to
    standard error.

    Args:
        commands: They complete the beginning of a line.
        with_files: The commands that the name of a file follows.
        history: The file of earlier texts.
    """

    def __init__(self, commands: Sequence[str], with_files: Sequence[str], history: Path):
        is_shown = sys.stdout.isatty()
        self.interactive = sys.stdin.isatty() and is_shown
        self._own = sys.stderr
        self._wrap: WordWrap | None = None
        if is_shown:
            self._own = sys.stdout
            self._wrap = WordWrap(_columns)
        self._dims = is_shown and os.environ.get("TERM", "dumb") != "dumb"
        # This says what stands below the line that is typed.
        self.status: Callable[[], str] = str
        self._read_line: Callable[[], str] = input
        if self.interactive:
            try:
                from .line_editor import line_editor

                self._read_line = line_editor(
                    PROMPT, commands, with_files, history, lambda: self.status()
                )
            except ModuleNotFoundError:
                self._read_line = lambda: input(PROMPT)
                self.say("A history, and pasting lines, need pip install 'mlx_flashhead[chat]'.")
        elif isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")

    def read(self) -> str:
        """Reads the next text: a line, a pasted text, or lines within three quotes.

        Raises:
            EOFError: At the end of the input.
        """
        text = self._read_line()
        while is_open(text):
            try:
                text += "\n" + self._read_line()
            except EOFError:
                text += QUOTES
        return text

    def show(self, piece: str) -> None:
        """Prints a piece of an answer. The beginning of a word waits for its end."""
        piece = printable(piece)
        if self._wrap is not None:
            piece = self._wrap.feed(piece)
        print(piece, end="", flush=True)

    def end(self) -> None:
        """Prints the rest of an answer, and ends its line."""
        rest = ""
        if self._wrap is not None:
            rest = self._wrap.end()
        print(rest, flush=True)

    def say(self, text: str) -> None:
        """Prints lines of the program's own, fainter than the answers."""
        if self._wrap is not None:
            text = self._wrap.feed(text) + self._wrap.end()
        if self._dims and text:
            text = f"\x1b[2m{text}\x1b[0m"
        print(text, file=self._own, flush=True)


def _columns() -> int:
    """The terminal's width, whatever $COLUMNS says; very wide if it is unknown."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or sys.maxsize
    except OSError:
        return sys.maxsize


@contextmanager
def stop_key() -> Iterator[Callable[[], bool]]:
    """A block in which Ctrl-C asks to stop, and a second one interrupts.

    Other keys are not shown, and wait for the next line.

    Yields:
        A function that says whether to stop.
    """
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        with modes_kept():
            if sys.stdin.isatty():
                tty.setcbreak(sys.stdin, termios.TCSANOW)
                modes = termios.tcgetattr(sys.stdin)
                # Ctrl-C drops nothing that was typed.
                modes[_LOCAL] |= termios.NOFLSH
                termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)
            yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def bar_of(share: float, width: int = 20) -> str:
    """A bar of characters, of which a share is full."""
    n_full = round(share * width)
    return "█" * n_full + "░" * (width - n_full)


class WordWrap:
    """Breaks lines between words, as the pieces of a text come.

    A word is shown when it is whole. The last column stays empty, since some terminals begin a new
    line when it is filled. The terminal breaks a word that is wider than a line.

    Args:
        columns: Returns the terminal's width.
    """

    def __init__(self, columns: Callable[[], int]):
        self._columns = columns
        # The cursor's column, and a word that may still grow.
        self._column = 0
        self._rest = ""

    def feed(self, text: str) -> str:
        """Takes a piece of a text, and returns what can be shown now."""
        *units, self._rest = _UNIT.findall(self._rest + text) or [""]
        return "".join(map(self._placed, units))

    def end(self) -> str:
        """Returns the rest of the text. The next text begins on a new line."""
        rest = self._placed(self._rest)
        self._column = 0
        self._rest = ""
        return rest

    def _placed(self, unit: str) -> str:
        """The word with the space before it, or on a new line."""
        word = unit.strip(" \t")
        if word in ("", "\n"):
            self._column = 0
            return word
        columns = self._columns()
        width = sum(_width(char) for char in word)
        before = (" " * self._column + unit.removesuffix(word)).expandtabs()
        end = len(before) + width
        if self._column and end >= columns:
            unit = f"\n{word}"
            end = width
        self._column = end % columns
        return unit


def _width(char: str) -> int:
    """The columns of a character: none for accents and joiners, two for some."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    if unicodedata.east_asian_width(char) in "WF":
        return 2
    return 1
