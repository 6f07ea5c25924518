"""Input and output of a chat: a terminal, or pipes."""

import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from .extras import from_extra
from .word_wrap import WordWrap

PROMPT = "> "
QUOTES = '"""'  # around several lines
# An answer must not move the cursor, change colours or ring the bell, here or behind a pipe.
UNPRINTABLE = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The text without what could control a terminal."""
    return text.translate(UNPRINTABLE)


@contextmanager
def printable_output() -> Iterator[None]:
    """Within the block, what is printed on a terminal cannot control it."""
    if not sys.stdout.isatty():
        yield
        return
    with redirect_stdout(cast(TextIO, _Printable(sys.stdout))):
        yield


class _Printable:
    """A stream whose text is made printable."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@dataclass(frozen=True)
class UserInput:
    """A text that the user has typed or pasted.

    Attributes:
        text: Without the quotes around several lines.
        plain: One line without quotes, which may be a command.
    """

    text: str
    plain: bool


def is_open(text: str) -> bool:
    """Whether a text begins with three quotes and the closing three are missing."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 6 or not text.endswith(QUOTES))


def without_quotes(text: str) -> UserInput:
    """The text that stands in the quotes, or all of it if there are none."""
    text = text.strip("\n")
    if text.strip().startswith(QUOTES):
        return UserInput(text.strip().removeprefix(QUOTES).removesuffix(QUOTES).strip(), False)
    return UserInput(text, "\n" not in text)


class Terminal:
    """Reads texts and prints. It writes escape codes to a terminal only.

    Behind a pipe, standard output carries the answers alone, and the program's own lines go to
    standard error.

    Args:
        commands: Completions for the beginning of a line.
        with_files: Commands that a file's name follows.
        history: File of earlier texts.
    """

    def __init__(self, commands: Sequence[str], with_files: Sequence[str], history: Path):
        shown = sys.stdout.isatty()
        self.interactive = sys.stdin.isatty() and shown
        self._own = sys.stdout if shown else sys.stderr
        self._dim = shown and os.environ.get("TERM", "dumb") != "dumb"
        self._wrap = WordWrap(_columns) if shown else None
        self._read_line: Callable[[], str] = input
        if self.interactive:
            self._read_line = self._editor(commands, with_files, history)
        elif hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")

    def read(self) -> UserInput:
        """The next text: a line, a pasted text of any length, or lines between three quotes.

        Raises:
            EOFError: At the end of the input.
        """
        text = self._read_line()
        while is_open(text):
            try:
                text += "\n" + self._read_line()
            except EOFError:
                text += QUOTES
        return without_quotes(text)

    def show(self, piece: str) -> None:
        """Prints a piece of an answer. The beginning of a word waits for its end."""
        piece = printable(piece)
        sys.stdout.write(piece if self._wrap is None else self._wrap.feed(piece))
        sys.stdout.flush()

    def end(self) -> None:
        """Ends the answer and its line."""
        sys.stdout.write("\n" if self._wrap is None else self._wrap.end() + "\n")
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Prints lines of the program's own, fainter than the answers."""
        if self._wrap is not None:
            text = self._wrap.feed(text) + self._wrap.end()
        print(f"\x1b[2m{text}\x1b[0m" if self._dim and text else text, file=self._own, flush=True)

    def _editor(
        self, commands: Sequence[str], with_files: Sequence[str], history: Path
    ) -> Callable[[], str]:
        try:
            from_extra("prompt_toolkit", "chat", "Pasting several lines, and a history,")
        except ValueError as error:
            self.say(str(error))
            return lambda: input(PROMPT)
        from .line_editor import line_editor

        return line_editor(commands, with_files, history)


def _columns() -> int:
    """Width of the terminal; very wide if it is unknown."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or sys.maxsize
    except OSError:
        return sys.maxsize


class StopKey:
    """Within the block, Ctrl-C asks to stop. A second Ctrl-C interrupts at once.

    Other keys are not shown, and wait for the next line.
    """

    def __enter__(self) -> Callable[[], bool]:
        self._pressed = False
        self._before = signal.signal(signal.SIGINT, self._press)
        self._modes = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
        if self._modes is not None:
            self._set_modes(self._modes[3] & ~(termios.ECHO | termios.ICANON))
        return lambda: self._pressed

    def __exit__(self, *error) -> None:
        if self._modes is not None:
            self._set_modes(self._modes[3])
        signal.signal(signal.SIGINT, self._before)

    def _set_modes(self, local: int) -> None:
        assert self._modes is not None
        modes = [*self._modes[:3], local, *self._modes[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)

    def _press(self, number, frame) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
