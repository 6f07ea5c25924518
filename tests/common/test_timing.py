"""How rounds are interleaved and summed up; no time is compared with anything."""

import mlx.core as mx

from mlx_flashhead.common import timing
from mlx_flashhead.common.timing import in_turns, spread, timer


def test_spread_is_median_and_quartiles():
    expected = {"median": 3, "lower": 2, "upper": 4, "runs": 5}
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == expected
    scaled = spread([1.0, 3.0], 1000)
    assert scaled == {"median": 2e3, "lower": 1.5e3, "upper": 2.5e3, "runs": 2}


def test_rounds_take_turns_after_a_warm_up():
    """Each comes first, and each follows every other one; the first round does not count."""
    calls = []

    def one(name):
        return lambda number: calls.append((name, number)) or 10 * number

    *_, before_last, last = (
        {name: list(taken) for name, taken in seconds.items()}
        for seconds in in_turns({name: one(name) for name in "ABC"}, 20)
    )
    assert last == {name: [10 * number for number in range(1, 21)] for name in "ABC"}
    assert {len(taken) for taken in before_last.values()} == {19}
    rounds = ["".join(name for name, number in calls if number == i) for i in range(21)]
    assert [number for _, number in calls] == sorted(number for _, number in calls)
    assert set(rounds) == {"ABC", "ACB", "BAC", "BCA", "CAB", "CBA"}


def test_a_timer_takes_the_run_and_its_evaluation(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    evaluated = []
    original = mx.eval
    monkeypatch.setattr(timing.mx, "eval", lambda *a: (evaluated.extend(a), original(*a)))
    measured = timer(lambda number: (mx.ones(number), next(clock)), lambda: next(clock))
    assert measured(3) == 2  # without the tick before
    assert evaluated[0][0].shape == (3,)
