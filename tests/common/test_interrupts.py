"""Ctrl-C while a command starts, and within a block that it ends at once."""

import signal
import subprocess
import sys

import pexpect
import pytest

from mlx_flashhead.common import interrupts

# A process that is interrupted when it has printed a line.
BLOCK = """
import signal, sys, time
from mlx_flashhead.common.interrupts import ended_by_signals
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())  # as every command has one
with ended_by_signals():
    print("here", flush=True)
    {work}
"""
WORK = {
    "in Python": "time.sleep(600)",
    # a computation that lets other threads run, but no handler of Python
    "within MLX": "import mlx.core as mx; a = mx.ones((3000, 3000));"
    " [a := a @ a for _ in range(2000)]; mx.eval(a)",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_a_block_ends_at_once(work, number):
    program = [sys.executable, "-c", BLOCK.format(work=work)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, **pipes) as process:
        process.stdout.readline()
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    assert errors == ("\nInterrupted.\n" if number == signal.SIGINT else "")


def test_a_block_leaves_the_handlers_as_they_were():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interrupts.ended_by_signals():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


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
def test_only_the_packages_commands_heed_it(monkeypatch, argv, words, is_a_command):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", words)
    try:
        interrupts.heed_ctrl_c_while_starting()
        assert (signal.getsignal(signal.SIGINT) is not before) == is_a_command
        interrupts.heed_ctrl_c_as_usual()
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_line_of_a_terminal_ends():
    """Half of an answer stands in it."""
    work = "print('Half of', end='', flush=True); time.sleep(600)"
    child = pexpect.spawn(sys.executable, ["-c", BLOCK.format(work=work)], timeout=120)
    child.expect_exact("Half of")
    child.kill(signal.SIGINT)
    child.expect(pexpect.EOF)
    assert child.before == b"\r\nInterrupted.\r\n"
    child.close()
    assert child.exitstatus == 130
