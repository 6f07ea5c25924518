"""Turns of addresses: who waits for whom."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor

from mlx_flashhead.serving.turns import Turns


def finish(coroutine):
    """Runs it in a thread of its own: a browser's tests may leave a loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, coroutine).result()


def order_of(works, total, each):
    """The order in which works begin, of (address, name), if all of them come at once.

    Nobody holds a turn at the end.
    """
    begun = []

    async def work(turns, address, name):
        async with turns.turn(address):
            begun.append(name)
            await asyncio.sleep(0)

    async def run():
        turns = Turns("test", total=total, each=each)
        await asyncio.gather(*(work(turns, *each) for each in works))
        assert not turns._of_address

    finish(run())
    return begun


def test_an_address_with_many_works_waits_for_its_own():
    many = [("a", f"a{i}") for i in range(5)]
    assert order_of([*many, ("b", "b0")], total=3, each=2)[:3] == ["a0", "a1", "b0"]
    # With one place the addresses alternate, whichever of them came first.
    both = [*many[:3], ("b", "b0"), ("b", "b1")]
    assert order_of(both, total=1, each=1) == ["a0", "b0", "a1", "b1", "a2"]
    assert order_of(many, total=8, each=2) == [name for _, name in many]


def test_one_that_is_cancelled_holds_no_turn():
    async def run():
        turns = Turns("test", total=1, each=1)
        begun = []

        async def work(address):
            async with turns.turn(address):
                begun.append(address)

        async with turns.turn("a"):
            waiting = asyncio.create_task(work("a"))
            leaving = asyncio.create_task(work("b"))
            chosen = asyncio.create_task(work("c"))
            await asyncio.sleep(0)
            leaving.cancel()
        # It has its turn, and is cancelled before it learns of it.
        chosen.cancel()
        await asyncio.wait([waiting, leaving, chosen])
        await work("b")
        assert begun == ["a", "b"]
        del waiting, leaving, chosen
        await asyncio.sleep(0)
        # Tracebacks of the cancelled hold their turns.
        gc.collect()
        assert not turns._of_address

    finish(run())
