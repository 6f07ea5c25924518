"""A server in a process of its own, and one question of a client."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException

CHAT_PATH = "/v1/chat/completions"
HOST = "127.0.0.1"
_START_SECONDS = 3600.0  # a FlashHead may be built first
_END_SECONDS = 30.0
_ANSWER_SECONDS = 600.0


class ServerProcess:
    """A server on a free ``port`` of the loopback interface, within the block.

    Args:
        module: Of the server, such as ``mlx_lm.server``.
        *arguments: Its arguments, without the address.
    """

    def __init__(self, module: str, *arguments: str):
        self._command = [sys.executable, "-m", module, *arguments]

    def __enter__(self) -> "ServerProcess":
        with socket.create_server((HOST, 0)) as free:
            self.port: int = free.getsockname()[1]
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        # the modules that this process would import
        path = os.pathsep.join(part for part in sys.path if part)
        self._process = subprocess.Popen(
            [*self._command, "--host", HOST, "--port", str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.end()
        self._log.close()

    def end(self) -> int:
        """Ends it by SIGTERM, or at once if that takes too long. Returns its exit code."""
        self._process.terminate()
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def log(self) -> str:
        """What it has written to standard error."""
        self._log.seek(0)
        return self._log.read()

    def healthy(self) -> bool:
        """Whether it answers on ``/health``."""
        connection = HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def resident_mb(self) -> float:
        """Resident memory."""
        said = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self._process.pid)], capture_output=True, text=True
        )
        return int(said.stdout) / 1024

    def _wait(self) -> None:
        """Waits until it answers.

        Raises:
            ValueError: If it ends, or does not answer in time.
        """
        until = time.monotonic() + _START_SECONDS
        while not self.healthy():
            if self._process.poll() is not None or time.monotonic() > until:
                lines = self.log().strip().splitlines() or ["it has printed nothing"]
                raise ValueError(f"{' '.join(self._command[2:])} did not start: {lines[-1]}")
            time.sleep(0.1)


@dataclass(frozen=True)
class Reply:
    """An answer to a question: its text, the server's count of tokens, seconds to the first text.

    A client that hangs up has no count, and the text as far as it came.
    """

    text: str
    n_tokens: int | None = None
    first_seconds: float | None = None


def ask(port: int, question: str, *, max_tokens: int, hang_up: bool = False) -> Reply:
    """Asks a server on this machine for a greedy answer, and receives it piece by piece.

    With ``hang_up`` the client leaves after the first text.

    Raises:
        ValueError: If the server answers with an error, or not completely.
        OSError: If it does not answer.
    """
    connection = HTTPConnection(HOST, port, timeout=_ANSWER_SECONDS)
    began = time.monotonic()
    text, first = "", None
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", CHAT_PATH, question_body(question, max_tokens), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            if line.startswith(b"data: [DONE]"):
                raise ValueError("the stream has no usage")
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            if text and first is None:
                first = time.monotonic() - began
                if hang_up:
                    return Reply(text, None, first)
            if chunk.get("usage"):
                return Reply(text, chunk["usage"]["completion_tokens"], first)
        raise ValueError("the stream broke off")
    except HTTPException as error:
        raise ValueError(f"the answer broke off: {error!r}") from error
    finally:
        connection.close()


def question_body(question: str, max_tokens: int) -> bytes:
    """The body of a request for a greedy answer as a stream."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()
