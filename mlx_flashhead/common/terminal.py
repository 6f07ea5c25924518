"""Input and output of a chat: a terminal, or pipes."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .extras import from_extra
from .printable import printable
from .user_input import PROMPT, QUOTES, UserInput, is_open, without_quotes
from .word_wrap import WordWrap


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
    """Within the block, Ctrl-C asks to stop. A second Ctrl-C interrupts at once."""

    def __enter__(self) -> Callable[[], bool]:
        self._pressed = False
        self._before = signal.signal(signal.SIGINT, self._press)
        return lambda: self._pressed

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number, frame) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
