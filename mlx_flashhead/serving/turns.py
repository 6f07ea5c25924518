"""Turns of clients: so many works at once, of which no address has more than a few."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar
from weakref import WeakValueDictionary

Result = TypeVar("Result")


class Turns:
    """Works of clients, for which addresses take turns.

    A work waits for the others of its address, and only then for those of all addresses. So an
    address with many works waits for its own, and whoever else comes is the next.

    Args:
        name: Of the threads in which :meth:`run` works.
        total: Works at once.
        each: Works of one address at once.
    """

    def __init__(self, name: str, *, total: int, each: int):
        self._of_all = asyncio.Semaphore(total)
        self._each = each
        # An address is here as long as it has a work.
        self._of_address: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._threads = ThreadPoolExecutor(total, name)

    @asynccontextmanager
    async def turn(self, address: str) -> AsyncIterator[None]:
        """A block that is one of the works of an address."""
        of_address = self._of_address.setdefault(address, asyncio.Semaphore(self._each))
        async with of_address, self._of_all:
            yield

    async def run(self, address: str, work: Callable[[], Result]) -> Result:
        """The result of ``work()`` in a thread, once the address has its turn."""
        loop = asyncio.get_running_loop()
        async with self.turn(address):
            return await loop.run_in_executor(self._threads, _unless_it_stops, work)


def _unless_it_stops(work: Callable[[], Result]) -> Result:
    """The result of ``work()``. A future cannot hold its StopIteration, and would never end.

    Raises:
        RuntimeError: If the work raises StopIteration.
    """
    try:
        return work()
    except StopIteration as error:
        raise RuntimeError("A work has run out of something") from error
