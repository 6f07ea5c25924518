"""Where a chat is typed and shown: a terminal with history and completion, or a pipe without."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

try:
    import readline
except ImportError:  # some builds of Python are without
    readline = None

PROMPT = "> "
# An answer must not move the cursor, change colours or ring the bell, nor do so where it is
# piped to.
UNPRINTABLE = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class Terminal:
    """Reads lines and prints; writes no escape code where there is no terminal.

    Args:
        commands: What the completion offers at the beginning of a line.
        with_files: Those of them that a file's name follows.
    """

    def __init__(self, commands: Sequence[str], with_files: Sequence[str]):
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands = commands
        self._with_files = with_files
        self._dim = self.interactive and os.environ.get("TERM", "dumb") != "dumb"
        self._matches: list[str] = []
        if self.interactive:
            self._prepare_completion()
        elif hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")

    def read(self) -> str:
        """The next line.

        Raises:
            EOFError: At the end of the input.
        """
        return input(PROMPT if self.interactive else "")

    def show(self, text: str) -> None:
        """Prints a piece of an answer at once."""
        sys.stdout.write(text.translate(UNPRINTABLE))
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Prints lines of the program's own, which stand back from the answers."""
        print(f"\x1b[2m{text}\x1b[0m" if self._dim and text else text)

    def complete(self, text: str, state: int) -> str | None:
        """The ``state``-th way to complete the word ``text``, as readline asks for it."""
        if state == 0:
            self._matches = self._completions(readline.get_line_buffer(), text)
        return self._matches[state] if state < len(self._matches) else None

    def _prepare_completion(self) -> None:
        if readline is None:
            return
        readline.set_completer(self.complete)
        readline.set_completer_delims(" ")
        # macOS has libedit under this name, which spells it otherwise
        by_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if by_libedit else "tab: complete")

    def _completions(self, line: str, word: str) -> list[str]:
        command, space, _ = line.partition(" ")
        if not space:
            return [f"{name} " for name in self._commands if line and name.startswith(word)]
        return _files(word) if command in self._with_files else []


class StopKey:
    """Within the block, Ctrl-C asks to stop; pressed once more, it interrupts at once."""

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


def _files(word: str) -> list[str]:
    """Paths that begin with ``word``; those of folders end in a slash."""
    folder, slash, start = word.rpartition("/")
    try:
        found = sorted(Path(folder + slash).expanduser().iterdir())
    except OSError:
        return []
    hidden = start.startswith(".")
    return [
        f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}"
        for path in found
        if path.name.startswith(start) and (hidden or not path.name.startswith("."))
    ]
