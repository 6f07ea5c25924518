"""The host's time of a token, dense and with a FlashHead."""

import mlx.core as mx

import host_time
from flash_loops import flash_of
from host_time import host_times
from mlx_flashhead.decoding.policy import policy_of
from tiny_models import tiny_model


def test_both_loops_are_measured_for_each_kind_of_text(monkeypatch):
    monkeypatch.setattr(host_time, "N_TOKENS", 8)
    monkeypatch.setattr(host_time, "FIRST", 2)
    clock = iter(range(1, 1000))
    monkeypatch.setattr("time.thread_time", lambda: float(next(clock)))
    flash = flash_of(tiny_model(num_hidden_layers=1, dtype=mx.float32))
    policy_of(flash.head).dense = False
    found = host_times(flash.model, [1, 2, 3], runs=1)
    assert found.keys() == {"greedy", "top-p", "penalty"}
    # The 8 tokens take a second.
    for times in found.values():
        assert times == {"dense": 125000.0, "FlashHead": 125000.0, "relative": 1.0}
