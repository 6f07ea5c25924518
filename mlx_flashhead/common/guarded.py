"""Work on what others wrote, such as templates and grammars, in a helper process with limits: too
deep a recursion in a native library, or a text doubled in a loop, ends the helper alone."""

import json
import math
import resource
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread, stack_size
from typing import Any

STACK_BYTES = 4 << 20  # of the work; half of the smallest default that the caller's threads have
START_SECONDS = 30.0  # of a helper, on a busy machine
LOOK_SECONDS = 0.1  # between two looks at the time and the memory of a helper
MAX_IDLE = 2  # helpers that stay for the next call


class GuardError(ValueError):
    """The work was ended; the message says why, as a sentence without its subject."""


class Guard:
    """Calls ``work(request)`` of a file, which imports nothing of this package, in helpers that
    stay until this process ends. Requests and results are lines of JSON. Each call has a helper of
    its own while it lasts."""

    def __init__(self, path: Path, *, seconds: float = 5.0, max_bytes: int = 512 << 20):
        self.path, self.seconds, self.max_bytes = path, seconds, max_bytes
        self._idle: list[subprocess.Popen] = []  # pop and append are atomic

    def call(self, request: Any) -> Any:
        """The result of ``work(request)``. GuardError if it takes more time or memory than it may
        or ends its process; RuntimeError with its message if it raises anything."""
        try:
            helper: Any = self._idle.pop()
        except IndexError:
            helper = self._start()
        answer: Any = None  # its kind, and the result or a message
        too_large = f"takes more than {self.max_bytes >> 20:,} MB of memory"
        ends = time.monotonic() + self.seconds
        try:
            print(json.dumps(request), file=helper.stdin, flush=True)
            while not wait([helper.stdout], LOOK_SECONDS):
                if time.monotonic() >= ends:
                    raise GuardError(f"takes more than {self.seconds:g} seconds")
                if memory_of(helper.pid) > self.max_bytes:
                    raise GuardError(too_large)
            answer = json.loads(helper.stdout.readline())
        except (OSError, json.JSONDecodeError):  # it has ended
            raise GuardError("is too complex for the library that reads it") from None
        finally:
            if answer and len(self._idle) < MAX_IDLE:
                self._idle.append(helper)
            else:
                helper.kill()
                helper.wait()
        kind, value = answer
        if kind == "memory":
            raise GuardError(too_large)
        if kind == "error":
            raise RuntimeError(value)
        return value

    def _start(self) -> subprocess.Popen:
        limits = map(str, (math.ceil(self.seconds), self.max_bytes))
        command = [sys.executable, "-P", __file__, str(self.path), *limits]
        pipes: Any = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        pipes |= {"stderr": subprocess.DEVNULL, "text": True}
        # in a session of its own, since Ctrl-C is for the caller
        helper: Any = subprocess.Popen(command, **pipes, start_new_session=True)
        if not (wait([helper.stdout], START_SECONDS) and helper.stdout.readline()):
            helper.kill()
            helper.wait()
            raise GuardError("cannot be examined: no helper process starts")
        return helper


def memory_of(pid: int) -> int:
    """Bytes that a process uses; 0 if that is unknown. macOS enforces no such limit."""
    try:
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    except OSError:
        return 0
    return 1024 * int(shown.stdout.strip() or 0)


def _serve(path: str, seconds: int, max_bytes: int) -> None:
    """The helper's loop, until the caller ends."""
    answers, sys.stdout = sys.stdout, StringIO()  # nobody reads what the work prints
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_DATA, max_bytes)  # Linux enforces it
    spec: Any = spec_from_file_location("work", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    print("ready", file=answers, flush=True)
    for request in sys.stdin:
        # a helper that nobody waits for any more ends too
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds + 1)
        try:
            answer = "result", module.work(json.loads(request))
        except MemoryError:
            answer = "memory", None
        except BaseException as error:  # a panic in Rust is no Exception
            answer = "error", str(error) or type(error).__name__
        print(json.dumps(answer), file=answers, flush=True)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    stack_size(STACK_BYTES)
    Thread(target=_serve, args=(sys.argv[1], *map(int, sys.argv[2:]))).start()
