"""A thread that lets others have the processor first."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from mlx_flashhead.common import yielding
from mlx_flashhead.common.yielding import one_thread_less


class Threads:
    """A BLAS with a number of threads, as threadpoolctl tells of it and sets it."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def info(self):
        return [{"num_threads": number} for number in self.numbers]

    def limit(self, limits):
        return Limit(self, limits)


class Limit:
    def __init__(self, threads, limit):
        self.threads = threads
        self.before = threads.numbers
        threads.numbers = [limit] * len(threads.numbers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.numbers = self.before


@pytest.mark.parametrize(
    "before, within", [([8], [7]), ([2, 4], [3, 3]), ([1], [1]), ([], [])], ids=str
)
def test_one_thread_less(monkeypatch, before, within):
    """But for at least one; Accelerate is no BLAS that can be told."""
    threads = Threads(*before)
    monkeypatch.setattr(yielding, "_blas_threads", lambda: threads)
    with one_thread_less():
        assert threads.numbers == within
    assert threads.numbers == before


def test_numpys_own():
    threads = yielding._blas_threads()
    if not threads.info():
        pytest.skip("numpy multiplies with Accelerate here")
    with threads.limit(limits=3):
        with one_thread_less():
            assert max(each["num_threads"] for each in threads.info()) == 2
        assert max(each["num_threads"] for each in threads.info()) == 3


def test_two_blocks_give_the_threads_back(monkeypatch):
    threads = Threads(4)
    monkeypatch.setattr(yielding, "_blas_threads", lambda: threads)
    begun = Event()
    may_end = Event()

    def first():
        with one_thread_less():
            begun.set()
            may_end.wait()

    def second():
        begun.wait()
        with one_thread_less():
            return threads.numbers

    with ThreadPoolExecutor(2) as pool:
        ends = pool.submit(first)
        numbers = pool.submit(second)
        begun.wait()
        assert not numbers.done()
        may_end.set()
        ends.result()
        assert numbers.result() == [3]
    assert threads.numbers == [4]
