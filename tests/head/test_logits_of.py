"""Exact logits of given tokens, on both paths, for every format."""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import kernels
from mlx_flashhead.head.flash_head import FlashHead
from tiny_models import fitted, random_clusters, random_rows

VOCAB_SIZE, HIDDEN_SIZE, CLUSTER_SIZE = 203, 64, 8
FORMS = {
    "float32": {},
    "float16": {"dtype": mx.float16},
    "bfloat16": {"dtype": mx.bfloat16},
    "4-bit": {"bits": 4},
    "3-bit": {"bits": 3},
    "6-bit-bfloat16": {"bits": 6, "dtype": mx.bfloat16},
    "8-bit-float16": {"bits": 8, "dtype": mx.float16},
    "mxfp4": {"bits": 4, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "mode": "nvfp4", "group_size": 16},
}
ON_KERNELS = ("float32", "bfloat16", "4-bit", "mxfp4")


def make_head(form, *, bias=False, backend="mlx"):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, VOCAB_SIZE, HIDDEN_SIZE, bias=bias, **FORMS[form])
    token_ids = random_clusters(rng, VOCAB_SIZE, CLUSTER_SIZE)
    centroids = fitted(rows, token_ids)
    return FlashHead(rows, token_ids, centroids, n_probes=1, backend=backend), rows


def check(head, rows, dtype):
    """Every shape, ids twice among them; equal to the dense product up to its summation."""
    tolerance = 4 * mx.finfo(dtype).eps
    for leading in [(), (1, 1), (3, 1), (2, 5)]:
        hidden = mx.random.normal((*leading, HIDDEN_SIZE), key=mx.random.key(1)).astype(dtype)
        dense = rows.matmul(hidden)
        ids = mx.random.randint(0, VOCAB_SIZE, (*leading, 6), key=mx.random.key(2))
        ids[..., 0] = ids[..., 1]
        shared = mx.array([0, VOCAB_SIZE - 1, 77], dtype=mx.uint32)
        for asked, each in ((ids, ids), (shared, mx.broadcast_to(shared, (*leading, 3)))):
            found = head.logits_of(hidden, asked)
            assert found.dtype == dense.dtype
            assert found.shape == each.shape
            expected = mx.take_along_axis(dense, each, axis=-1)
            assert mx.allclose(found, expected, rtol=tolerance, atol=HIDDEN_SIZE * tolerance)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_dense_heads(form, bias):
    head, rows = make_head(form, bias=bias)
    check(head, rows, FORMS[form].get("dtype", mx.float32))


@pytest.mark.parametrize("form", ON_KERNELS)
def test_on_the_kernels_path(form):
    with kernels():
        head, rows = make_head(form, backend="metal")
        assert head.backend == "metal"
        check(head, rows, FORMS[form].get("dtype", mx.float32))
