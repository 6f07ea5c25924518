"""Work on what others wrote, such as templates and grammars, in a helper process with limits.

A native library that recurses too deeply ends its process, and an expression that doubles a text in
a loop fills the memory. Neither can be caught or interrupted from inside. Here it ends the helper.
"""

import json
import math
import resource
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from threading import Thread, stack_size
from typing import Any

STACK_BYTES = 4 << 20  # of the work; half of the smallest default that the caller's threads have
START_SECONDS = 30.0  # of a helper, on a busy machine
LOOK_SECONDS = 0.1  # between two looks at the memory of a helper
MAX_IDLE = 2  # helpers that stay for the next call


class GuardError(ValueError):
    """The work was ended; the message says why, as a sentence without its subject."""


class Guard:
    """Calls ``work(request)`` of a file, in helpers that stay until this process ends.

    The file is run without this package, so a helper starts as fast as the file's own imports.
    Requests and results are JSON. Each call has a helper of its own while it lasts.
    """

    def __init__(self, path: Path, *, seconds: float = 5.0, max_bytes: int = 512 << 20):
        self.path, self.seconds, self.max_bytes = path, seconds, max_bytes
        self._idle: list[_Helper] = []  # pop and append are atomic

    def call(self, request: Any) -> Any:
        """The result of ``work(request)``.

        Raises:
            GuardError: If the work takes more time or memory than it may, or ends its process.
            RuntimeError: If it raises anything, with that message.
        """
        try:
            helper = self._idle.pop()
        except IndexError:
            helper = _Helper(self)
        try:
            answer = helper.call(request, self)
        except BaseException:
            helper.kill()
            raise
        if len(self._idle) < MAX_IDLE:
            self._idle.append(helper)
        else:
            helper.kill()
        if "limit" in answer:
            raise GuardError(answer["limit"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


class _Helper:
    """A process in the loop of `_serve`, and the connection to it."""

    def __init__(self, guard: Guard):
        self.connection, theirs = Pipe()
        numbers = (theirs.fileno(), math.ceil(guard.seconds), guard.max_bytes)
        program = [sys.executable, "-P", __file__, str(guard.path), *map(str, numbers)]
        quiet: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with theirs:  # in a session of its own: Ctrl-C is for the caller
            self.process = subprocess.Popen(
                program, pass_fds=[theirs.fileno()], start_new_session=True, **quiet
            )
        try:
            if not self.connection.poll(START_SECONDS):
                raise EOFError
            self.connection.recv_bytes()
        except (EOFError, OSError):
            self.kill()
            raise GuardError("cannot be examined: no helper process starts") from None

    def call(self, request: Any, guard: Guard) -> dict[str, Any]:
        ends = time.monotonic() + guard.seconds
        try:
            self.connection.send_bytes(json.dumps(request).encode())
            while not self.connection.poll(min(LOOK_SECONDS, max(0, ends - time.monotonic()))):
                if time.monotonic() >= ends:
                    raise GuardError(f"takes more than {guard.seconds:g} seconds")
                if memory_of(self.process.pid) > guard.max_bytes:
                    raise GuardError(_too_large(guard.max_bytes))
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise GuardError("is too complex for the library that reads it") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def memory_of(pid: int) -> int:
    """Bytes that a process uses; 0 if that is unknown. macOS enforces no such limit."""
    try:
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    except OSError:
        return 0
    return 1024 * int(shown.stdout.strip() or 0)


def _too_large(max_bytes: int) -> str:
    return f"takes more than {max_bytes >> 20:,} MB of memory"


def _serve(path: str, connection: Connection, seconds: int, max_bytes: int) -> None:
    """The helper's loop, until the other end of the connection is closed."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_DATA, max_bytes)  # Linux enforces it
    stack_size(STACK_BYTES)
    spec = spec_from_file_location("work", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    answer: dict[str, Any] = {}

    def run(request: Any) -> None:
        answer.clear()
        try:
            answer["result"] = module.work(request)
        except MemoryError:
            answer["limit"] = _too_large(max_bytes)
        except BaseException as error:  # a panic in Rust is no Exception
            answer["error"] = str(error) or type(error).__name__

    connection.send_bytes(b"ready")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, OSError):  # the caller has ended
            return
        # a helper that nobody waits for any more ends too
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds + 1)
        thread = Thread(target=run, args=(request,))
        thread.start()
        thread.join()
        connection.send_bytes(json.dumps(answer).encode())


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    descriptor, *limits = map(int, sys.argv[2:])
    _serve(sys.argv[1], Connection(descriptor), *limits)
