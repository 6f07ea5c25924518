"""Bars that show how far something is."""

import io
import time
from threading import enumerate as threads

import pytest

from mlx_flashhead.common import bars
from mlx_flashhead.common.bars import Bar


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(bars, "TICK_SECONDS", 0.01)


def until(holds):
    """Waits for something that another thread does."""
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_the_clock_goes_on_during_a_long_part():
    shown = io.StringIO()
    with Bar("Reading", 4, file=shown) as bar:
        bar.update()
        n_drawn = shown.getvalue().count("\r")
        until(lambda: shown.getvalue().count("\r") > n_drawn + 3)
        # As if the part took a minute.
        bar.start_t -= 60
        until(lambda: "01:00<" in shown.getvalue())
    assert "Reading:  25%" in shown.getvalue()


def test_a_closed_bar_is_left_alone():
    # Threads of other tests may end meanwhile.
    before = set(threads())
    shown = io.StringIO()
    bar = Bar("Reading", 4, file=shown)
    bar.update(4)
    bar.close()
    until(lambda: before.issuperset(threads()))
    assert shown.getvalue().endswith("\n")
    assert "100%" in shown.getvalue().splitlines()[-1]


def test_a_disabled_bar_shows_nothing():
    before = set(threads())
    shown = io.StringIO()
    with Bar("Reading", 4, disable=True, file=shown) as bar:
        assert before.issuperset(threads())
        bar.update()
    assert not shown.getvalue()
