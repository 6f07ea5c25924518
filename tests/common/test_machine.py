"""What this machine is and does at the time."""

import pytest

from mlx_flashhead.common import machine


@pytest.mark.parametrize("share, busy", [(1.0, False), (0.9, False), (0.6, True)])
def test_it_is_busy_where_a_thread_gets_less_than_a_processor(monkeypatch, share, busy):
    """Whatever this process has done before."""
    clock = [0.0]

    def passes():
        clock[0] += 0.001
        return clock[0]

    monkeypatch.setattr(machine.time, "perf_counter", passes)
    monkeypatch.setattr(machine.time, "thread_time", lambda: share * clock[0])
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (64.0, 64.0, 64.0))
    assert machine.is_busy() == busy
