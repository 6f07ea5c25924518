"""The machine of a figure."""

import json

import mlx.core as mx
import pytest

from mlx_flashhead.benchmarks import machine as module
from mlx_flashhead.benchmarks.machine import machine, read_bandwidth_gb_s


def test_machine_is_json_and_names_what_matters(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    about = json.loads(json.dumps(machine()))
    for key in ("processor", "system", "blas", "date"):
        assert isinstance(about[key], str) and about[key]
    assert about["versions"]["mlx"] == mx.__version__
    assert about["threads"]["OPENBLAS_NUM_THREADS"] == "1"
    assert about["cores"] >= 1 and about["memory_gb"] > 0.1
    if mx.metal.is_available():
        assert about["gpu"] and about["read_bandwidth_gb_s"] > 0


@pytest.mark.parametrize(
    "processor, chip",
    [("Apple M3 Max", "m3-max"), ("Apple M1", "m1"), ("AMD (2x)", "amd-2x")],
)
def test_chip_of_a_processor(monkeypatch, processor, chip):
    monkeypatch.setattr(module, "_processor", lambda: processor)
    assert module.chip() == chip


def test_bandwidth_is_bytes_over_the_best_time(monkeypatch):
    times = (1.0, 0.5, 0.25, 1.0, 1.0, 1.0)
    monkeypatch.setattr(module, "timer", lambda _: times.__getitem__)
    assert read_bandwidth_gb_s() == pytest.approx((512 << 20) / 0.25 / 1e9)
