"""How runs are interleaved and summed up; no time is compared with anything."""

import json

import mlx.core as mx
import pytest

from mlx_flashhead.benchmarks import machine as machine_module
from mlx_flashhead.benchmarks.machine import machine, read_bandwidth_gb_s
from mlx_flashhead.common import timing
from mlx_flashhead.common.timing import Spread, head_seconds, in_turns, turns


def test_spread_is_median_and_quartiles():
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.lower, spread.median, spread.upper, spread.runs) == (2, 3, 4, 5)
    assert spread.scaled(1000).to_dict() == {"median": 3e3, "lower": 2e3, "upper": 4e3, "runs": 5}


def test_runs_take_turns_after_a_warm_up(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = []

    def run(name, ticks):
        def call(number):
            calls.append((name, number))
            for _ in range(ticks):
                next(clock)

        return call

    seconds = in_turns(
        {"A": run("A", 2), "B": run("B", 7)},
        3,
        before=lambda: (calls.append("before"), next(clock)),
        progress=False,
    )
    assert seconds == {"A": [3] * 3, "B": [8] * 3}  # one tick is the measurement's own
    assert calls[::2] == ["before"] * 8
    rounds = [calls[i + 1 : i + 4 : 2] for i in range(0, 16, 4)]
    assert [sorted(found) for found in rounds] == [[("A", i), ("B", i)] for i in range(4)]


def test_rounds_differ_in_their_order():
    """Each comes first, and each follows every other one."""
    found = list(turns("ABC", 20))
    rounds = ["".join(item for number, item in found if number == i) for i in range(21)]
    assert {"".join(sorted(order)) for order in rounds} == {"ABC"}
    assert set(rounds) == {"ABC", "ACB", "BAC", "BCA", "CAB", "CBA"}
    assert found == list(turns("ABC", 20))


def test_what_runs_return_is_evaluated(monkeypatch):
    evaluated = []
    original = mx.eval
    monkeypatch.setattr(timing.mx, "eval", lambda *a: (evaluated.extend(a), original(*a)))
    made = {"array": lambda _: mx.ones(3) + 1, "pair": lambda _: (mx.ones(2), mx.ones(1))}
    in_turns(made, 1, progress=False)
    assert sorted(len(e) for e in evaluated) == [2, 2, 3, 3]


def test_machine_is_json_and_names_what_matters(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    found = json.loads(json.dumps(machine()))
    for key in ("processor", "system", "blas", "date"):
        assert isinstance(found[key], str) and found[key]
    assert found["versions"]["mlx"] == mx.__version__
    assert found["threads"]["OPENBLAS_NUM_THREADS"] == "1"
    assert found["cores"] >= 1 and found["memory_gb"] > 0.1
    if mx.metal.is_available():
        assert found["gpu"] and found["read_bandwidth_gb_s"] > 0


@pytest.mark.parametrize(
    "processor, chip", [("Apple M3 Max", "m3-max"), ("Apple M1", "m1"), ("AMD EPYC", "amd-epyc")]
)
def test_chip_of_a_processor(processor, chip):
    assert machine_module._chip(processor) == chip


def test_bandwidth_is_bytes_over_the_best_time(monkeypatch):
    monkeypatch.setattr(machine_module, "in_turns", lambda *a, **k: {"read": [0.5, 0.25, 1.0]})
    assert read_bandwidth_gb_s() == pytest.approx((512 << 20) / 0.25 / 1e9)


def test_heads_take_turns():
    calls = []
    heads = (lambda h: calls.append((0, h)) or h, lambda h: calls.append((1, h)) or h)
    states = mx.arange(24.0).reshape(3, 8)
    seconds = head_seconds(heads, states)
    assert [len(s) for s in seconds] == [15, 15]
    numbers = [number for number, _ in calls]  # one round warms up
    assert [sorted(numbers[i : i + 2]) for i in range(0, 32, 2)] == [[0, 1]] * 16
    assert all(h.shape == (1, 1, 8) for _, h in calls)
    assert {h[0, 0, 0].item() for _, h in calls} == {0, 8, 16}
