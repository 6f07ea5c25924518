"""A server in a process of its own, and one question of a client."""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

HOST = "127.0.0.1"
_END_SECONDS = 30.0
_ANSWER_SECONDS = 600.0
_open = build_opener(ProxyHandler({})).open  # past the environment's proxy


@contextmanager
def serving(module: str, *arguments: str) -> Iterator[int]:
    """The port of a server, within the block: a module, and its arguments without the address.

    Raises:
        ValueError: If it ends before it answers.
    """
    with socket.create_server((HOST, 0)) as free:
        port: int = free.getsockname()[1]
    own = [module, *arguments]
    command = [sys.executable, "-m", *own, "--host", HOST, "--port", str(port)]
    nowhere = subprocess.DEVNULL
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=errors)
        try:
            while not _healthy(port):
                if process.poll() is not None:
                    errors.seek(0)
                    lines = errors.read().strip().splitlines() or ["it has printed nothing"]
                    raise ValueError(f"{' '.join(own)} did not start: {lines[-1]}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
            process.kill()
            process.wait()


def _healthy(port: int) -> bool:
    with suppress(OSError, HTTPException), _open(f"http://{HOST}:{port}/health", timeout=10):
        return True
    return False


class Reply(NamedTuple):
    """An answer to a question: its text, the server's count of tokens, seconds to the first text.

    A client that hangs up has no count, and the text as far as it came.
    """

    text: str
    n_tokens: int | None
    first_seconds: float | None


def ask(port: int, question: str, *, max_tokens: int, hang_up: bool = False) -> Reply:
    """Asks a server on this machine for a greedy answer, and receives it piece by piece.

    With ``hang_up`` the client leaves after the first text.

    Raises:
        ValueError: If the server answers with an error, or not completely.
        OSError: If it does not answer.
    """
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    address = f"http://{HOST}:{port}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    request = Request(address, json.dumps(body).encode(), headers)
    began = time.monotonic()
    text, first = "", None
    try:
        with _open(request, timeout=_ANSWER_SECONDS) as lines:
            for line in lines:
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
    except HTTPError as error:
        raise ValueError(f"{error.code}: {error.read().decode(errors='replace')}") from None
    except HTTPException as error:
        raise ValueError(f"the answer broke off: {error!r}") from error
    raise ValueError("the stream ended without its usage")
