"""Turns of clients: so many works at once, of which no address has more than a few."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

Result = TypeVar("Result")


class Turns:
    """Places for works of clients, which addresses get in turn.

    An address with many works waits for its own: whoever else comes has the next free place, and
    the places that one address may hold are fewer than there are.

    Args:
        name: Of the threads in which :meth:`run` works.
        total: Works at once.
        each: Works of one address at once.
    """

    def __init__(self, name: str, *, total: int, each: int):
        self._total = total
        self._each = each
        self._held: Counter[str] = Counter()  # places, by address
        # Those that wait, by address. The address that is due next comes first.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._threads = ThreadPoolExecutor(total, name)

    @asynccontextmanager
    async def place(self, address: str) -> AsyncIterator[None]:
        """A block that holds a place of the address, once it has its turn."""
        await self._take(address)
        try:
            yield
        finally:
            self._give_back(address)

    async def run(self, address: str, work: Callable[[], Result]) -> Result:
        """The result of ``work()`` in a thread, once the address has its turn."""
        async with self.place(address):
            return await self.work(work)

    async def work(self, work: Callable[[], Result]) -> Result:
        """The result of ``work()`` in a thread, for those who hold a place."""

        def without_stop_iteration() -> Result:
            try:
                return work()
            except StopIteration as error:  # which a future cannot hold: it would never end
                raise RuntimeError("A StopIteration has left the code of a model") from error

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, without_stop_iteration)

    async def _take(self, address: str) -> None:
        if self._has_place(address):
            self._held[address] += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(address, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn came at the same moment
                self._give_back(address)
            raise

    def _has_place(self, address: str) -> bool:
        return self._held.total() < self._total and self._held[address] < self._each

    def _give_back(self, address: str) -> None:
        self._held -= Counter([address])  # drops counts of 0
        if queue := self._waiting.pop(address, None):
            self._waiting[address] = queue  # behind the other addresses
        for waiting in list(self._waiting):
            if self._has_place(waiting):
                self._call_next(waiting)

    def _call_next(self, address: str) -> None:
        queue = self._waiting.pop(address)
        while queue:
            turn = queue.popleft()
            if not turn.cancelled():
                self._held[address] += 1
                turn.set_result(None)
                break
        if queue:
            self._waiting[address] = queue  # behind the other addresses
