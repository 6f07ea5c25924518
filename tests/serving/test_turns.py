"""Turns of addresses: who waits for whom."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from mlx_flashhead.serving.turns import Turns


def finish(coroutine):
    """Runs it in a thread of its own: a browser's tests may leave a loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, coroutine).result()


def order_of(works, total, each):
    """The order in which works begin, of (address, name), if all of them come at once."""
    begun = []

    async def work(turns, address, name):
        async with turns.place(address):
            begun.append(name)
            await asyncio.sleep(0)

    async def run():
        turns = Turns("test", total=total, each=each)
        await asyncio.gather(*(work(turns, *each) for each in works))
        assert not turns._held and not turns._waiting

    finish(run())
    return begun


def test_an_address_with_many_works_waits_for_its_own():
    many = [("a", f"a{i}") for i in range(5)]
    assert order_of([*many, ("b", "b0")], total=3, each=2)[:3] == ["a0", "a1", "b0"]
    # one place: the addresses alternate, whichever of them came first
    both = [*many[:3], ("b", "b0"), ("b", "b1")]
    assert order_of(both, total=1, each=1) == ["a0", "b0", "a1", "b1", "a2"]
    assert order_of(many, total=8, each=2) == [name for _, name in many]


def test_one_that_is_cancelled_holds_no_place():
    async def run():
        turns = Turns("test", total=1, each=1)
        async with turns.place("a"):
            waiting = asyncio.create_task(turns._take("a"))
            leaving = asyncio.create_task(turns._take("b"))
            await asyncio.sleep(0)
            leaving.cancel()
            with suppress(asyncio.CancelledError):
                await leaving
        await waiting
        chosen = asyncio.create_task(turns._take("c"))
        await asyncio.sleep(0)
        turns._give_back("a")  # it has its turn, and is cancelled before it learns of it
        chosen.cancel()
        with suppress(asyncio.CancelledError):
            await chosen
        assert not turns._held and not turns._waiting

    finish(run())
