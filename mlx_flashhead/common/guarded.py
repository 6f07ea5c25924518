"""Work on what others wrote, such as templates and grammars, in helper processes with limits.

A recursion that is too deep in a native library, or a text that is doubled in a loop, ends the
helper alone.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar, copy_context
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from multiprocessing.connection import wait
from pathlib import Path
from threading import BoundedSemaphore, Event, Thread, stack_size
from typing import Any, TypeVar

# The work's stack has half of the smallest default that the caller's threads have.
STACK_BYTES = 4 << 20
# A helper takes so long to start on a busy machine, at most.
START_SECONDS = 30.0
# Seconds by the clock for each second of processor time that a call may take: a busy machine is no
# reason to refuse, and a helper that stands still is.
PATIENCE = 12
# Between two looks at the memory of a helper pass so many seconds.
LOOK_SECONDS = 0.1
MAX_HELPERS = 8
# What decodes tokens goes before a helper of this niceness.
NICENESS = 5


_left: ContextVar[Event | None] = ContextVar("left", default=None)

Result = TypeVar("Result")


class GuardError(ValueError):
    """The work was ended; the message says why, as a sentence without its subject."""


class LeftError(Exception):
    """The work was ended, since nobody wants its result any more."""


def unless_left(left: Event, work: Callable[[], Result]) -> Result:
    """The result of ``work()``, whose calls of guards end once ``left`` is set.

    Raises:
        LeftError: If a call of a guard has ended so, or nothing has begun by then.
    """
    context = copy_context()
    context.run(_left.set, left)
    context.run(_check_wanted)
    return context.run(work)


class Guard:
    """Calls the function ``work`` of a file in helper processes.

    Helpers are started when they are needed, and stay until this process ends: a call that finds
    one idle starts no process. Requests and results are lines of JSON. Each call has a helper of
    its own while it lasts, and waits while all of them are busy.

    Args:
        path: A file with ``work(request)``, which imports nothing of this package.
        seconds: Processor time of a call.
        max_bytes: Memory of a helper.
        max_helpers: Helpers at once.
    """

    def __init__(
        self,
        path: Path,
        *,
        seconds: float = 5.0,
        max_bytes: int = 512 << 20,
        max_helpers: int = MAX_HELPERS,
    ):
        self.path = path
        self.seconds = seconds
        self.max_bytes = max_bytes
        self._too_large = f"takes more than {max_bytes >> 20:,} MB of memory"
        self._free = BoundedSemaphore(max_helpers)
        # Its pop and append are atomic.
        self._idle: list[subprocess.Popen] = []
        atexit.register(self.close)

    def close(self) -> None:
        """Ends the idle helpers."""
        while self._idle:
            _end(self._idle.pop())

    def call(self, request: Any) -> Any:
        """The result of ``work(request)``.

        Raises:
            GuardError: If it takes more time or memory than it may, or ends its process.
            RuntimeError: If it raises anything, with the message of that.
            LeftError: If nobody wants it any more: see :func:`unless_left`.
        """
        with self._free:
            _check_wanted()
            helper = self._next()
            try:
                outcome, value = self._ask(helper, request)
            except BaseException:
                _end(helper)
                raise
            self._idle.append(helper)
        if outcome == "memory":
            raise GuardError(self._too_large)
        if outcome == "error":
            raise RuntimeError(value)
        return value

    def _next(self) -> subprocess.Popen:
        """A helper that is idle, else a new one."""
        while True:
            try:
                helper = self._idle.pop()
            except IndexError:
                return self._start()
            if helper.poll() is None:
                return helper
            # Somebody else has ended it.
            _end(helper)

    def _ask(self, helper: subprocess.Popen, request: Any) -> list[Any]:
        """A helper's outcome, and the result or a message; GuardError if it gives none."""
        stdin: Any = helper.stdin
        stdout: Any = helper.stdout
        too_slow = f"takes more than {self.seconds:g} seconds"
        ends = time.monotonic() + PATIENCE * self.seconds
        try:
            print(json.dumps(request), file=stdin, flush=True)
            while not wait([stdout], LOOK_SECONDS):
                _check_wanted()
                if time.monotonic() >= ends:
                    raise GuardError(too_slow)
                if memory_of(helper.pid) > self.max_bytes:
                    raise GuardError(self._too_large)
            return json.loads(stdout.readline())
        except (OSError, json.JSONDecodeError):
            # The helper has ended.
            if helper.wait() == -signal.SIGPROF:
                raise GuardError(too_slow) from None
            raise GuardError("is too complex for the library that reads it") from None

    def _start(self) -> subprocess.Popen:
        limits = (str(self.seconds), str(self.max_bytes))
        # Ctrl-C is for the caller, so a helper has a session of its own.
        helper = subprocess.Popen(
            [sys.executable, "-P", __file__, str(self.path), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        stdout: Any = helper.stdout
        if not (wait([stdout], START_SECONDS) and stdout.readline()):
            _end(helper)
            raise GuardError("cannot be examined: no helper process starts")
        return helper


def _check_wanted() -> None:
    left = _left.get()
    if left is not None and left.is_set():
        raise LeftError


def _end(helper: subprocess.Popen) -> None:
    helper.kill()
    helper.wait()
    for pipe in (helper.stdin, helper.stdout):
        # What it has not read cannot be sent any more.
        with suppress(OSError):
            pipe.close()  # type: ignore[union-attr]


def memory_of(pid: int) -> int:
    """Bytes that a process uses; 0 if that is unknown. macOS enforces no such limit."""
    # Linux has this file.
    with suppress(OSError, IndexError):
        n_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return n_pages * resource.getpagesize()
    try:
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    except OSError:
        return 0
    return 1024 * int(shown.stdout.strip() or 0)


def _serve(path: str, seconds: float, max_bytes: int) -> None:
    """The helper's loop, until the caller ends."""
    answers = sys.stdout
    # Nobody reads what the work prints.
    sys.stdout = StringIO()
    os.nice(NICENESS)
    _limit(resource.RLIMIT_CORE, 0)
    # Linux enforces this limit.
    _limit(resource.RLIMIT_DATA, max_bytes)
    spec: Any = spec_from_file_location("work", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    print("ready", file=answers, flush=True)
    for request in sys.stdin:
        # SIGPROF ends this process after so much processor time, whatever runs in it. So a helper
        # that nobody waits for any more ends too.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer: tuple[str, Any]
        try:
            answer = ("result", module.work(json.loads(request)))
        except MemoryError:
            answer = ("memory", None)
        except BaseException as error:
            # A panic in Rust is no Exception.
            answer = ("error", str(error) or type(error).__name__)
        line = json.dumps(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(line, file=answers, flush=True)


def _limit(limited: int, value: int) -> None:
    """Limits one of the resources that are numbers in ``resource``."""
    _, hard = resource.getrlimit(limited)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(limited, (value, hard))


if __name__ == "__main__":
    work_path, cpu_seconds, most_bytes = sys.argv[1:]
    stack_size(STACK_BYTES)
    Thread(target=_serve, args=(work_path, float(cpu_seconds), int(most_bytes))).start()
