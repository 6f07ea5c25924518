"""The peak of memory: at most one more head than the model has."""

import gc
import json

import mlx.core as mx
import pytest

from mlx_flashhead.benchmarks import memory
from mlx_flashhead.benchmarks.memory import DENSE, FLASH_HEAD, FORMS, head_memory


def test_installing_takes_at_most_one_head_more(monkeypatch):
    """And the index: for 10,000 x 256 rows it is large beside a head of 4 bits."""
    monkeypatch.setattr(memory, "_alone", lambda function, *arguments: function(*arguments))
    gc.collect()
    before = mx.get_active_memory() / 1e6
    vocab_size, hidden_size = 10_000, 256
    found = head_memory(vocab_size, hidden_size, n_probes=32)
    json.dumps(found)
    assert [one["form"] for one in found] == list(FORMS)
    index_mb = (625 * hidden_size * (9 / 16 + 4) + 9 * 4 * vocab_size) / 1e6
    for one, bytes_per_weight in zip(found, (4, 2, 9 / 16), strict=True):
        assert one["head_mb"] == pytest.approx(vocab_size * hidden_size * bytes_per_weight / 1e6)
        dense, flash = one["memory"][DENSE], one["memory"][FLASH_HEAD]
        assert dense["held_mb"] - before == pytest.approx(one["head_mb"], abs=0.1)
        assert flash["peak_mb"] - dense["held_mb"] <= 1.05 * one["head_mb"] + index_mb
        assert flash["process_peak_mb"] > flash["peak_mb"] > flash["held_mb"]
        more = (flash["peak_mb"] - dense["held_mb"]) / one["head_mb"]
        assert one["more_heads"] == pytest.approx(more)


def test_head_memory_refuses():
    with pytest.raises(ValueError, match="width of 72 cannot be quantized"):
        head_memory(320, 72, n_probes=2)
