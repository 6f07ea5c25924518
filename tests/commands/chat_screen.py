"""A chat at a pseudo-terminal, as its user sees it."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pexpect
import pyte

# Nothing scrolls away.
ROWS = 200
# In seconds.
TIMEOUT = 60
UP = "\x1b[A"
ESC_ENTER = "\x1b\r"
CTRL_C = "\x03"
CTRL_D = "\x04"
# It drops the line that is typed.
CTRL_U = "\x15"


class ChatScreen:
    """A running chat with its user's folder, what is typed and what stands on its screen."""

    def __init__(self, *arguments, home: Path, columns: int = 200):
        self.screen = pyte.Screen(columns, ROWS)
        self._stream = pyte.Stream(self.screen)
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "mlx_flashhead.chat", *map(str, arguments)],
            env={**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", "HOME": str(home)},
            encoding="utf-8",
            codec_errors="replace",
            dimensions=(ROWS, columns),
            timeout=TIMEOUT,
        )
        self.child.delaybeforesend = 0
        # The screen says where the cursor is, when it is asked.
        self.screen.write_process_input = self.child.send
        self.greeting = self._until_prompt(-1)

    def lines(self, first: int = 0) -> list[str]:
        """What stands on the screen from a row on."""
        return [self._line(row) for row in range(first, ROWS)]

    @property
    def here(self) -> str:
        """The line with the cursor."""
        return self._line(self.screen.cursor.y)

    def wait(self, done: Callable[[], bool]) -> None:
        """Reads until something is so on the screen."""
        end = time.monotonic() + TIMEOUT
        while not done():
            assert time.monotonic() < end, "\n".join(self.lines()).rstrip()
            with suppress(pexpect.TIMEOUT):
                self._stream.feed(self.child.read_nonblocking(1 << 16, 1))

    def type(self, keys: str, shown: str | None = None) -> None:
        """Types; waits until what is to be shown stands where the cursor is."""
        self.child.send(keys)
        if shown is not None:
            self.wait(lambda: self.here == shown)

    def say(self, text: str = "") -> str:
        """Types a line and Enter; what is shown between it and the next prompt."""
        if text:
            self.type(text, f"> {text}")
        row = self.screen.cursor.y
        self.type("\r")
        return self._until_prompt(row)

    def interrupt(self) -> str:
        """Ctrl-C; what is shown from the line with the cursor to the next prompt."""
        row = self.screen.cursor.y
        self.type(CTRL_C)
        return self._until_prompt(row)

    def _until_prompt(self, row: int) -> str:
        self.wait(lambda: self.screen.cursor.y > row and self.here == ">")
        return "\n".join(map(self._line, range(row + 1, self.screen.cursor.y))).strip("\n")

    def _line(self, row: int) -> str:
        line = self.screen.buffer[row]
        return "".join(line[column].data for column in range(self.screen.columns)).rstrip()
