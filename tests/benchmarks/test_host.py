"""The host's time: what is timed are the kernels of a token, and FlashHead around them."""

import json

import mlx.core as mx
import pytest

from mlx_flashhead.benchmarks import host
from mlx_flashhead.benchmarks.head import random_head
from mlx_flashhead.benchmarks.host import ADDED, DENSE, GRAPH, LOGITS, TOKEN, host_benchmark


@pytest.fixture
def head():
    return random_head(320, 64, n_probes=9, bits=4, dtype=mx.bfloat16)


def test_what_is_added_is_the_rest(head, monkeypatch):
    monkeypatch.setattr(host, "CALLS", 3)
    found = host_benchmark(head, mx.zeros((2, 64), mx.bfloat16), rounds=4)
    json.dumps(found)
    assert (found["vocab_size"], found["n_clusters"], found["n_probes"]) == (320, 20, 9)
    spreads = found["us"]
    expected = [DENSE]
    for name in (LOGITS, TOKEN):
        expected += [name, GRAPH.format(name), ADDED.format(name)]
        assert spreads[name]["median"] > spreads[ADDED.format(name)]["median"]
    assert set(spreads) == set(expected)
    assert all(spread["runs"] == 4 for spread in spreads.values())
    assert head.backend == "mlx"  # as it was


@pytest.mark.parametrize("form, last", [("__call__", "expand"), ("token", "token")])
def test_the_kernels_of_a_token_are_recorded(head, form, last):
    recording, calls = host._recording(head)
    hidden = mx.zeros((1, 1, 64), mx.bfloat16)
    shapes = []

    def run(hidden):
        result = getattr(type(recording), form)(recording, hidden)
        shapes.extend(array.shape for array in host._replay(tuple(calls), hidden))
        return result

    mx.export_function(lambda _: None, run, hidden)
    assert len(calls) == 4 and recording.backend == "metal"
    outputs = [shape for _, given in calls for shape in given["output_shapes"]]
    last_shape = {"expand": (1, 320), "token": (1,)}[last]
    assert shapes[1:-1] == outputs and outputs[-1] == last_shape
