"""Work in helper processes: its limits, its failures, and which helpers stay."""

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from mlx_flashhead.common import guarded
from mlx_flashhead.common.guarded import Guard, GuardError, LeftError, memory_of, unless_left
from recorded_calls import recorded_calls

WORK = """
import os, time

def work(request):
    print("nobody reads this")
    kind, value = request
    if kind == "raise":
        raise SystemExit(value)
    def spin(seconds):
        ends = time.process_time() + seconds
        while time.process_time() < ends:
            pass

    def meet(place, number):
        open(f"{place}/{os.getpid()}", "w").close()
        while len(os.listdir(place)) < number:
            time.sleep(0.01)

    acts = {"meet": lambda value: meet(*value)}
    acts |= {"spin": spin, "sleep": time.sleep, "fill": bytearray, "exit": os._exit}
    acts |= {"recurse": lambda value: work(request), "": lambda value: None}
    acts[kind](value)
    return [value, os.getpid()]
"""


@pytest.fixture
def guard(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    return Guard(tmp_path / "work.py", seconds=0.5, max_bytes=200 << 20)


def test_a_failure_ends_its_own_work_alone(guard):
    for request, error, text in (
        (("spin", 60), GuardError, "takes more than 0.5 seconds"),
        (("fill", 10**9), GuardError, "takes more than 200 MB of memory"),
        (("exit", 3), GuardError, "is too complex for the library"),
        (("raise", "why"), RuntimeError, "why"),
        (("recurse", 0), RuntimeError, "recursion"),
    ):
        with pytest.raises(error, match=text):
            guard.call(request)
        assert guard.call(["", {"a": "é"}])[0] == {"a": "é"}


def test_work_ends_when_nobody_wants_it(guard):
    guard.seconds = 1000
    left = Event()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(unless_left, left, lambda: guard.call(["sleep", 1000]))
        left.set()
        with pytest.raises(LeftError):
            running.result()
    with pytest.raises(LeftError):
        unless_left(left, lambda: guard.call(["", 0]))
    assert guard.call(["", 1])[0] == 1


def test_the_memory_of_a_helper_is_looked_at(guard, monkeypatch):
    """As on macOS, which enforces no limit."""
    assert memory_of(os.getpid()) > 1 << 20
    guard.seconds = 30
    monkeypatch.setattr(guarded, "memory_of", lambda pid: 300 << 20)
    with pytest.raises(GuardError, match="takes more than 200 MB"):
        guard.call(["sleep", 60])


def test_time_is_the_processor_s_and_a_helper_that_stands_still_ends_later(guard, monkeypatch):
    """A busy machine refuses nothing that a quiet one takes."""
    process = guard.call(["", 1])[1]
    # By the clock this takes more than the limit.
    assert guard.call(["sleep", 0.8])[1] == process
    # No call pays for the one before.
    for _ in range(2):
        assert guard.call(["spin", 0.3])[1] == process
    monkeypatch.setattr(guarded, "PATIENCE", 1)
    with pytest.raises(GuardError, match="takes more than"):
        guard.call(["sleep", 60])


def test_as_many_chats_at_once_as_there_are_helpers_start_no_more_processes(guard, monkeypatch):
    started = recorded_calls(monkeypatch, Guard, "_start")
    small = Guard(guard.path, max_helpers=4)
    with ThreadPoolExecutor(12) as pool:
        first = {answer[1] for answer in pool.map(small.call, [["sleep", 0.05]] * 12)}
        assert len(started) == len(first) <= 4
        while len(started) < 4:
            list(pool.map(small.call, [["sleep", 0.3]] * 12))
        again = {answer[1] for answer in pool.map(small.call, [["sleep", 0.3]] * 12)}
    assert len(started) == len(again) == 4 and first <= again


def test_helpers_stay_and_no_two_calls_share_one(guard, tmp_path):
    guard.seconds = 10
    (tmp_path / "met").mkdir()
    first = guard.call(["", 1])[1]
    assert first != os.getpid()
    assert guard.call(["", 2])[1] == first
    # None of the four ends before the others have begun.
    meeting = (str(tmp_path / "met"), 4)
    with ThreadPoolExecutor(4) as pool:
        processes = {answer[1] for answer in pool.map(guard.call, [["meet", meeting]] * 4)}
    assert len(processes) == 4 and first in processes
    # As many calls at once find a helper.
    assert len(guard._idle) == 4
    # A system that is short of memory ends one so.
    guard._idle[-1].kill()
    guard._idle[-1].wait()
    assert guard.call(["", 1])[1] in processes
    # It is closed so when the caller ends.
    guard._idle[0].stdin.close()
    assert guard._idle[0].wait(20) == 0
    guard.close()
    assert not guard._idle
    with pytest.raises(GuardError, match="no helper process starts"):
        Guard(guard.path.with_name("absent.py")).call(["", 1])
