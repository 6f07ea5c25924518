"""Bars that show how far something is."""

from threading import Event, Thread
from typing import Any

from tqdm import tqdm

TICK_SECONDS = 1.0
# Units differ by stage, so a bar names none.
FORM = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class Bar(tqdm):
    """A bar whose clock goes on while a part of the work takes long.

    Args:
        desc: What is done.
        total: How many units it has.
        disable: Show nothing.
    """

    def __init__(self, desc: str, total: int, *, disable: bool = False, **options: Any):
        self._closed = Event()
        super().__init__(desc=desc, total=total, bar_format=FORM, disable=disable, **options)
        if not disable:
            Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            # A bar that is closed meanwhile is not drawn below its last picture.
            with self.get_lock():
                self.refresh(nolock=True)

    def close(self) -> None:
        """Draws it for the last time."""
        self._closed.set()
        super().close()
