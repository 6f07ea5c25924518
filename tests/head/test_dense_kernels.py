"""The table of MLX's kernels by version, and products of reordered rows that keep to it."""

import pickle

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import make_centroids, make_rows
from mlx_flashhead.head import dense_kernels
from mlx_flashhead.head.dense_kernels import dense_kernel
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.head.plan import READER
from recorded_calls import recorded_calls
from tiny_models import random_clusters

BEFORE = (0, 32, 3)
SINCE = (0, 32, 4)
SWIFT = READER


def rows_of(width: int, bits: int, mode: str = "affine") -> Matrix:
    """Arrays of the right shapes alone."""
    weight = mx.zeros((1, width * bits // 32), mx.uint32)
    scales = mx.zeros((1, width // 32))
    biases = scales if mode == "affine" else None
    return Matrix(weight, scales, biases, group_size=32, bits=bits, mode=mode)


@pytest.mark.parametrize(
    "width, bits, n_rows, version, name, packs, added",
    [
        (2048, 4, 1000, BEFORE, "qmv_fast", 2, 4),
        (2048, 4, 1001, BEFORE, "qmv", 1, 4),
        (2048, 4, 1001, SINCE, "qmv_fast", 2, 1),
        # This width has no whole blocks of 512.
        (576, 4, 1000, SINCE, "qmv", 1, 1),
        (768, 8, 1000, SINCE, "qmv_fast", 2, 1),
        (768, 8, 1000, BEFORE, "qmv_fast", 2, 1),
        (768, 6, 1001, BEFORE, "qmv", 1, 4),
        (1024, 5, 1000, BEFORE, "qmv_fast", 2, 8),
        (1024, 3, 1000, SINCE, "qmv_fast", 2, 1),
        (512, 2, 1000, BEFORE, "qmv_fast", 1, 4),
        (128, 4, 1000, SINCE, "qmv_quad", 0, 1),
        (128, 5, 1000, SINCE, "qmv", 1, 1),
        (2048, 4, 1000, SWIFT, "qmv_fast", 2, 4),
        (2048, 4, 1001, SWIFT, "qmv", 1, 4),
        # This one has whole blocks of 256, but none of 512.
        (768, 8, 1000, SWIFT, "qmv", 1, 1),
        (1024, 8, 1000, SWIFT, "qmv_fast", 2, 1),
    ],
)
def test_the_table(width, bits, n_rows, version, name, packs, added):
    kernel = dense_kernel(rows_of(width, bits), n_rows, version)
    assert (kernel.name, kernel.packs, kernel.added) == (name, packs, added)
    assert kernel.scored == (name != "qmv_quad")
    others = dense_kernel(rows_of(width, bits, "mxfp4"), n_rows, version)
    # They add up no hidden values.
    assert (others.name, others.added) == (name, 1)


@pytest.mark.parametrize("width, name", [(1024, "qmv"), (2048, "qmv_fast"), (3072, "qmv")])
def test_rows_of_1_bit_are_multiplied_fast_from_2048_columns_on(width, name):
    """Twice a block: MLX's gate does not know that a lane takes one pack of them."""
    assert dense_kernel(rows_of(width, 1), 1000, SINCE).name == name


def test_floats_have_one_kernel_but_for_narrow_ones():
    for width, scored in ((64, False), (576, True)):
        assert dense_kernel(Matrix(mx.zeros((1, width))), 1000, SINCE).scored == scored


def small_head(monkeypatch, n_rows: int, cluster_size: int) -> tuple[FlashHead, Matrix]:
    """A head as on a GPU, but for its operations."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(dense_kernels, "mlx_version", lambda: BEFORE)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    rows = make_rows(rng, n_rows, 512, bits=4, group_size=64, dtype=mx.float32)
    token_ids = random_clusters(rng, n_rows, cluster_size)
    centroids = make_centroids(rng, len(token_ids), 512, group_size=64)
    return FlashHead(rows, token_ids, centroids, n_probes=2, backend="mlx"), rows


@pytest.mark.parametrize(
    "n_rows, cluster_size, gathers", [(157, 16, True), (160, 9, True), (160, 16, False)]
)
def test_rows_are_gathered_where_their_number_has_another_kernel(
    monkeypatch, n_rows, cluster_size, gathers
):
    """Up to MLX 0.32.3: with the padded slots there are 160 and 162 rows."""
    head, rows = small_head(monkeypatch, n_rows, cluster_size)
    assert head.gathers_rows == gathers
    calls = recorded_calls(monkeypatch, Matrix, "matmul")
    hidden = mx.random.normal((2, 512), key=mx.random.key(0))
    found = [head.dense_logits(hidden[:1]), head.dense_logits(hidden)[:1]]
    n_slots = head.clustered.token_ids.size
    n_multiplied = [matrix.n_rows for matrix, _ in calls]
    if gathers:
        assert n_multiplied == [n_rows, n_slots]
    else:
        assert n_multiplied == [n_slots, n_slots]
    for logits in found:
        np.testing.assert_allclose(logits, rows.matmul(hidden[:1]), rtol=1e-5, atol=1e-5)


def test_rows_are_gathered_where_mlx_adds_in_an_order_of_its_own(monkeypatch, caplog):
    head, rows = small_head(monkeypatch, 160, 16)
    hidden = mx.random.normal((1, 512), key=mx.random.key(0))
    product = Matrix.matmul

    def by_size(self, states):
        """More rows than the model's, or others first, give other last bits."""
        if mx.array_equal(self.weight, rows.weight):
            return product(self, states)
        return product(self, states) * (1 + 2.0**-22)

    monkeypatch.setattr(Matrix, "matmul", by_size)
    assert not mx.array_equal(head.dense_logits(hidden), rows.matmul(hidden))
    head.compare_dense_rows(rows, mx.float32)
    assert head.gathers_rows and "in order first" in caplog.text
    assert mx.array_equal(head.dense_logits(hidden), rows.matmul(hidden))


def test_equal_rows_are_not_gathered_and_copies_of_a_head_know(monkeypatch):
    head, rows = small_head(monkeypatch, 160, 16)
    head.compare_dense_rows(rows, mx.float32)
    assert not head.gathers_rows
    for gathers in (False, True):
        head.gathers_rows = gathers
        assert pickle.loads(pickle.dumps(head)).gathers_rows == gathers


def test_the_models_rows_are_compared_on_a_gpu(monkeypatch):
    head, rows = small_head(monkeypatch, 160, 16)
    compared = []
    monkeypatch.setattr("mlx_flashhead.head.flash_head.gpu_is_default", lambda: True)
    monkeypatch.setattr(head, "compare_dense_rows", lambda *given: compared.append(given))
    head.check_kernels(mx.float16, rows)
    assert compared == [(rows, mx.float16)]
