"""A server in a process of its own, for the time of a benchmark."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import IO, NamedTuple

from mlx_flashhead.common.interrupts import cleanup

HOST = "127.0.0.1"


class ServerProcess(NamedTuple):
    """A server under way.

    Attributes:
        errors: What the server writes to standard error.
    """

    port: int
    pid: int
    errors: IO[str]

    def log(self) -> list[str]:
        """The lines that it has written to standard error."""
        self.errors.seek(0)
        return self.errors.read().strip().splitlines()


@contextmanager
def serving(module: str, *arguments: str) -> Iterator[ServerProcess]:
    """A block within which a server runs.

    Args:
        module: The server's module, as for ``python -m``.
        arguments: Its flags, but for ``--host`` and ``--port``.

    Raises:
        ValueError: If it ends before it answers.
    """
    port = free_port()
    command = [sys.executable, "-m", module, *arguments, "--host", HOST, "--port", str(port)]
    nowhere = subprocess.DEVNULL
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=errors) as process,
    ):
        running = ServerProcess(port, process.pid, errors)
        with cleanup(process.terminate):
            while not is_healthy(port):
                if process.poll() is not None:
                    lines = running.log() or ["it printed nothing"]
                    raise ValueError(f"{' '.join(command[2:])} did not start: {lines[-1]}")
                time.sleep(0.1)
            yield running


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server((HOST, 0)) as free:
        port: int = free.getsockname()[1]
    return port


def is_healthy(port: int) -> bool:
    """Whether the server at a port says that it answers requests."""
    with suppress(OSError, HTTPException), closing(HTTPConnection(HOST, port, timeout=10)) as http:
        http.request("GET", "/health")
        return http.getresponse().status == 200
    return False
