"""Ctrl-C while a command starts and while it writes a text: it ends at once, without a traceback.

Python raises KeyboardInterrupt between two of its own instructions. Within an import it may
surface in a callback or as another error, and within MLX it waits for the end of a long prompt.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # the exit code, as a shell has it
PROGRAM = "mlx_flashhead"


def heed_ctrl_c_while_starting() -> None:
    """From now on Ctrl-C ends this process at once, if it is one of the package's commands.

    A command's imports take seconds. `command.command` gives Ctrl-C its usual meaning back.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    in_main_thread = threading.current_thread() is threading.main_thread()
    if usual and in_main_thread and _is_a_command():
        signal.signal(signal.SIGINT, _end_while_starting)


def heed_ctrl_c_as_usual() -> None:
    """Takes `heed_ctrl_c_while_starting` back."""
    if signal.getsignal(signal.SIGINT) is _end_while_starting:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_a_command() -> bool:
    """Whether Python was started for a program of this package, by its name or by ``-m``."""
    if sys.argv[:1] == ["-m"]:  # Python is still looking for the module
        words = sys.orig_argv[1:]
        name = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    else:
        name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name.partition(".")[0] == PROGRAM


def _end_while_starting(number: int, frame: FrameType | None) -> None:
    end_by_signal(number)


def end_by_signal(number: int) -> None:
    """Ends the line of a terminal, and the process with the exit code of a signal.

    Nothing is cleaned up, and Python's buffers may be in use: the descriptors are written to.
    """
    ending = b"Interrupted.\n" if number == signal.SIGINT else b""
    try:
        if os.isatty(1):
            os.write(1, b"\n")
        elif ending:
            ending = b"\n" + ending
        os.write(2, ending)
    finally:
        os._exit(128 + number)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A block, which writes no files, that Ctrl-C and SIGTERM end at once.

    A thread waits for them, which runs while MLX computes: MLX lets other threads run then.
    """
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if callable(signal.getsignal(number))  # nohup and shells ignore some on purpose
    ]
    if not numbers or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {number: signal.signal(number, _wait_for_the_thread) for number in numbers}
    other_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_at, args=(reader, numbers), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(other_writer)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)  # which ends the thread
        thread.join()
        os.close(reader)


def _wait_for_the_thread(number: int, frame: FrameType | None) -> None:
    """A handler in Python, without which no signal reaches the pipe."""


def _end_at(reader: int, numbers: list[int]) -> None:
    """Ends the process when one of the signals comes through a pipe."""
    while received := os.read(reader, 1):
        if received[0] in numbers:
            end_by_signal(received[0])
