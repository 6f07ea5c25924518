"""How a signal ends a process: at once, wherever it is, and after what must be done."""

import signal
import subprocess
import sys

import pexpect
import pytest

from mlx_flashhead.common import interrupts

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A process that gets a signal when it is `here`.
PROGRAM = """
import asyncio, os, signal, time
import mlx.core as mx
from mlx_flashhead.common import interrupts

def here():
    print("here", flush=True)
    return True

interrupts.end_at_signals()
{work}
"""
WORK = {
    "in Python": "here(); time.sleep(600)",
    # a computation that lets other threads run, but no handler of Python
    "within MLX": "a = mx.ones((3000, 3000)); [a := a @ a for _ in range(2000)]; here();"
    " mx.eval(a)",
    # where Python prints an exception, and goes on
    "within __del__": "type('A', (), {'__del__': lambda self: here() and time.sleep(600)})()",
    "in an event loop": "loop = asyncio.new_event_loop(); loop.call_soon(here);"
    " loop.add_signal_handler(signal.SIGWINCH, print); loop.run_until_complete(asyncio.sleep(600))",
}


def end(work, number):
    """(exit code, standard output, standard error) of the program, after a signal."""
    program = [sys.executable, "-c", PROGRAM.format(work=work)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, **pipes) as process:
        before = ""
        while not before.endswith("here\n"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            before += line
        process.send_signal(number)
        after, errors = process.communicate(timeout=120)
    return process.returncode, before.removesuffix("here\n") + after, errors


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_a_process_ends_at_once(work, number):
    errors = "\nInterrupted.\n" if number == signal.SIGINT else ""
    assert end(work, number) == (128 + number, "", errors)


CLEANUP = """
def write(text):
    return interrupts.cleanup(lambda: os.write(1, text))

with write(b"left before\\n"):
    pass
with write(b"first\\n"), interrupts.cleanup(lambda: 1 / 0), write(b"second\\n"):
    here()
    time.sleep(600)
"""


@pytest.mark.parametrize("number", ENDING)
def test_what_must_be_done_is_done_the_last_first(number):
    """What fails keeps nothing else from being done, and what a block has left is done once."""
    code, output, _ = end(CLEANUP, number)
    assert (code, output) == (128 + number, "left before\nsecond\nfirst\n")


NEW_FOLDER = """
from pathlib import Path
from mlx_flashhead.common.new_folder import new_folder

with new_folder(Path({place!r})) as folder:
    (folder / "half").write_text("half")
    here()
    time.sleep(600)
"""


@pytest.mark.parametrize("number", ENDING)
def test_nothing_half_written_stays(tmp_path, number):
    target = tmp_path / "target"
    target.mkdir()
    (target / "earlier").write_text("whole")
    assert end(NEW_FOLDER.format(place=str(target)), number)[0] == 128 + number
    assert [*tmp_path.rglob("*")] == [target, target / "earlier"]


CTRL_C_RAISES = """
with interrupts.ctrl_c_raises():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)
    except KeyboardInterrupt:
        os.write(2, b"raised")
    {there}
{after}
"""


def test_a_block_in_which_ctrl_c_raises():
    """And other signals end the process."""
    wait = "here(); time.sleep(600)"
    for number in (signal.SIGTERM, signal.SIGHUP):
        within = CTRL_C_RAISES.format(there=wait, after="")
        assert end(within, number) == (128 + number, "", "raised")
    after = CTRL_C_RAISES.format(there="pass", after=wait)
    assert end(after, signal.SIGINT) == (130, "", "raised\nInterrupted.\n")


def test_what_is_ignored_stays_so_and_a_handler_stays(monkeypatch):
    before = {number: signal.getsignal(number) for number in ENDING}
    descriptor = signal.set_wakeup_fd(-1)

    def handler(number, frame):
        pass

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupts.end_at_signals()
        found = [signal.getsignal(number) for number in ENDING]
        assert found[0] is not signal.default_int_handler
        assert found[1:] == [handler, signal.SIG_IGN]
        with interrupts.ctrl_c_raises():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is found[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)


@pytest.mark.parametrize(
    "argv, words, is_a_command",
    [
        (["/usr/bin/mlx_flashhead.chat"], ["python", "mlx_flashhead.chat"], True),
        (["mlx_flashhead"], ["python", "mlx_flashhead"], True),
        (["-m"], ["python", "-W", "error", "-m", "mlx_flashhead.cache"], True),
        (["-m"], ["python", "-m", "another.program"], False),
        (["-c"], ["python", "-c", "import mlx_flashhead"], False),
        ([""], ["python"], False),
    ],
)
def test_only_the_packages_commands_heed_signals(monkeypatch, argv, words, is_a_command):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", words)
    assert interrupts.is_a_command() == is_a_command


def test_the_line_of_a_terminal_ends():
    """Half of an answer stands in it."""
    work = "print('Half of', end='', flush=True); time.sleep(600)"
    child = pexpect.spawn(sys.executable, ["-c", PROGRAM.format(work=work, before="")], timeout=120)
    child.expect_exact("Half of")
    child.kill(signal.SIGINT)
    child.expect(pexpect.EOF)
    assert child.before == b"\r\nInterrupted.\r\n"
    child.close()
    assert child.exitstatus == 130
