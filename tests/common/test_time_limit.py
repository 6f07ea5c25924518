"""The limit on how long a block may run."""

import threading
import time

import pytest

from mlx_flashhead.common.time_limit import time_limit


class TooSlowError(Exception):
    pass


def test_an_endless_loop_ends():
    with pytest.raises(TooSlowError), time_limit(0.05, TooSlowError()):
        while True:
            try:
                sum(range(100))
            except Exception:  # as a template's code may have it
                continue


def test_a_block_in_time_is_left_alone():
    with pytest.raises(KeyError), time_limit(0.05, TooSlowError()):
        raise KeyError("own")
    time.sleep(0.1)  # nothing arrives afterwards


def test_nothing_arrives_outside_of_blocks_that_end_in_time_or_nearly():
    outcomes = {"slow": 0, "done": 0}

    def run():
        for i in range(200):
            try:
                with time_limit(0.0005, TooSlowError()):
                    sum(range(50 * i))
                outcomes["done"] += 1
            except TooSlowError:
                outcomes["slow"] += 1

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert outcomes["slow"] + outcomes["done"] == 200
