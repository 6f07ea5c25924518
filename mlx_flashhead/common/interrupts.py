"""How a signal ends a command: at once, whatever it computes, and after what must be done.

No handler raises anything: Python loses an exception that comes within ``__del__`` or the callback
of a weak reference, and none comes while MLX computes. A thread waits for the signals, since MLX
lets other threads run. It removes what is half written, and ends the process.
"""

# What `signal` is made of. That takes milliseconds, in which Ctrl-C would give a traceback.
import _signal  # type: ignore[import-not-found]
import os
import sys

PROGRAM = "mlx_flashhead"


def is_a_command() -> bool:
    """Whether Python was started for a program of this package, by its name or by ``-m``."""
    name = ""
    if sys.argv[:1] == ["-m"]:
        # Python is still looking for the module.
        words = sys.orig_argv[1:]
        if "-m" in words[:-1]:
            name = words[words.index("-m") + 1]
    elif sys.argv:
        name = os.path.basename(sys.argv[0])
    return name.partition(".")[0] == PROGRAM


# Until a handler can be made, Ctrl-C ends the process at once.
if is_a_command() and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType

# The exit code of a command that was interrupted, as a shell has it.
INTERRUPTED = 128 + signal.SIGINT
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_USUAL = (signal.SIG_DFL, signal.default_int_handler)

# What must be done before the process ends, the last first.
_to_do: list[Callable[[], object]] = []


@cache
def _watcher() -> tuple[threading.Thread, int]:
    """The thread that ends the process, and the pipe through which it gets signals' numbers."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    thread.start()
    return thread, writer


def _watch(reader: int) -> None:
    while True:
        number = os.read(reader, 1)[0]
        if number in ENDING and signal.getsignal(number) is _wait_for_the_end:
            end_by_signal(number)


def end_at_signals() -> None:
    """From now on Ctrl-C, SIGTERM and SIGHUP end this process.

    Those stay ignored that are, as by nohup, and what has a handler keeps it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    _, writer = _watcher()
    for number in ENDING:
        if signal.getsignal(number) in _USUAL:
            signal.signal(number, _wait_for_the_end)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


def _wait_for_the_end(number: int, frame: FrameType | None) -> None:
    """Keeps the main thread from going on. Event loops take the wake-up descriptor for theirs."""
    thread, writer = _watcher()
    # If the pipe is full, the thread has been told.
    with suppress(BlockingIOError):
        os.write(writer, bytes([number]))
    thread.join()


def end_by_signal(number: int) -> None:
    """Does what must be done, and ends the process with the exit code of a signal.

    Python's buffers may be in use: the descriptors are written to, and the line of a terminal ends.
    """
    try:
        # Where something fails, the rest is done all the same.
        while _to_do:
            with suppress(Exception):
                _to_do.pop()()
        ending = b""
        if number == signal.SIGINT:
            ending = b"Interrupted.\n"
        if os.isatty(1):
            os.write(1, b"\n")
        elif ending:
            ending = b"\n" + ending
        os.write(2, ending)
    finally:
        os._exit(128 + number)


@contextmanager
def cleanup(work: Callable[[], object]) -> Iterator[None]:
    """A block after which some work is done, also if a signal ends the process within it.

    It is done in another thread then, while the main one stands still, or is in a library's call.
    """
    _to_do.append(work)
    try:
        yield
    finally:
        try:
            work()
        finally:
            _to_do.remove(work)


@contextmanager
def other_handlers() -> Iterator[None]:
    """A block that sets handlers of its own: no signal that they take ends the process later."""
    descriptor = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)


@contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """A block in which Ctrl-C raises KeyboardInterrupt, for programs that go on after it."""
    before = signal.getsignal(signal.SIGINT)
    if before is not _wait_for_the_end:
        yield
        return
    with other_handlers():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
