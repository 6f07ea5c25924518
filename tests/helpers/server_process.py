"""A server in a process of its own, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI


@dataclass
class Server:
    """A server under way.

    Attributes:
        line: Printed when it was ready.
        errors: Of its standard error.
        token: That clients send.
    """

    process: subprocess.Popen
    line: str
    url: str
    errors: Path
    token: str = "none"

    def client(self) -> OpenAI:
        """OpenAI's own client of this server."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.token, max_retries=0, timeout=60)

    def log(self) -> str:
        """What it has written to standard error."""
        return self.errors.read_text(encoding="utf-8")

    def lines(self, number: int, after: int = 0) -> list[str]:
        """So many lines of it: one is written when its request's client has the answer."""
        until = time.monotonic() + 20
        lines = self.log().splitlines()[after:]
        while len(lines) < number:
            assert time.monotonic() < until, lines
            time.sleep(0.01)
            lines = self.log().splitlines()[after:]
        return lines

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Ends it by a signal: → (exit code, the rest of its standard output)."""
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output


@contextmanager
def serving(folder: Path, *arguments) -> Iterator[Server]:
    """A server on a free port of the loopback interface; its standard error goes to the folder."""
    program = ["-m", "mlx_flashhead.server", "--port", "0"]
    # A FlashHead is no faster for a tiny model.
    program += ["--flash-head-always"]
    command = [sys.executable, *program, *map(str, arguments)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    # The server has no other models than the named ones.
    environment["HF_HUB_CACHE"] = str(folder / "cache")
    # A crash in C++ or Rust would leave no word.
    environment["PYTHONFAULTHANDLER"] = "1"
    # mlx-lm has set it in this process.
    environment.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS", None)
    errors = folder / "errors.txt"
    with errors.open("w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
        )
    try:
        line = process.stdout.readline()
        match = re.search(r"http://\S+", line)
        if not match:
            code = process.wait(120)
            raise AssertionError(f"the server ended with {code}: {line!r}, {errors.read_text()}")
        yield Server(process, line, match[0], errors)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
