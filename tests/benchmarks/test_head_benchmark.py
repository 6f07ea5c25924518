"""The benchmark of a head: what is timed computes what it should, and the ratios are right."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.benchmarks.head_benchmark import (
    DENSE,
    LOGITS,
    OWN_DENSE,
    PROPOSAL,
    random_head,
    summary,
    variants,
)


@pytest.mark.parametrize(
    "bits, dtype, vocab_size, hidden_size",
    [(16, mx.float32, 320, 64), (16, mx.bfloat16, 203, 128), (4, mx.float16, 203, 128)],
)
def test_forms_agree_with_the_rows(bits, dtype, vocab_size, hidden_size):
    head = random_head(vocab_size, hidden_size, n_probes=5, dtype=dtype, bits=bits)
    assert (head.vocab_size, head.hidden_size, head.n_probes) == (vocab_size, hidden_size, 5)
    assert head.clustered.rows.quantized == (bits != 16)
    named = variants(head)
    hidden = mx.random.normal((40, hidden_size)).astype(dtype)
    slots = head.clustered.flat_rows().dequantized().astype(mx.float32)[:vocab_size]
    rows = head.clustered.token_rows().dequantized().astype(mx.float32)
    loose = {"rtol": 1e-4, "atol": 1e-4}
    if dtype != mx.float32:
        loose = {"rtol": 5e-2, "atol": 5e-2}
    for name, expected in ((DENSE, slots), (OWN_DENSE, rows)):
        logits = np.array(named[name](hidden).astype(mx.float32))
        np.testing.assert_allclose(logits, hidden.astype(mx.float32) @ expected.T, **loose)
    full = np.array(named[LOGITS](hidden).astype(mx.float32))
    # The positions may be many.
    expected = head.unverified_logits(hidden, 5).astype(mx.float32)
    np.testing.assert_allclose(full, expected, **loose)
    # A call of the head is dense.
    assert not mx.allclose(expected, head(hidden).astype(mx.float32), atol=1e-3)
    assert (np.array(named[PROPOSAL](hidden)) == full.argmax(-1)).all()


def test_ratios_are_those_of_the_printed_medians_and_bytes_those_that_are_read():
    """Float32 centroids on a CPU, and the rows of the clusters that are scored."""
    head = random_head(320, 64, n_probes=5)
    seconds = {
        DENSE: [0.010, 0.100, 0.011],
        OWN_DENSE: [0.009, 0.008, 0.007],
        PROPOSAL: [0.001, 0.002, 0.090],
        LOGITS: [0.004, 0.005, 0.001],
    }
    figures = summary("any", head, mx.float32, 3, seconds)
    assert (figures["positions"], figures["n_clusters"], figures["head_bits"]) == (3, 20, 32)
    assert figures["best_dense"] == OWN_DENSE
    assert figures["times_faster"][f"{LOGITS} against {DENSE}"] == pytest.approx(11 / 4)
    assert figures["times_faster"][f"{LOGITS} against {OWN_DENSE}"] == pytest.approx(2)
    if mx.default_device().type == mx.cpu:
        routing = 20 * 64 * 4
    else:
        routing = 20 * 64 * 9 / 16
    assert figures["read_mb"] == pytest.approx((routing + 5 * 3 * 16 * 64 * 4) / 1e6)
