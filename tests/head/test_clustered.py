"""Rows in cluster order, in rows and in columns, and their products in blocks, for CPUs."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.head import operations
from mlx_flashhead.head.clustered import ALWAYS_PROBED, ClusteredRows
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.head.operations import blocked_product, in_blocks
from tiny_models import fitted, random_clusters, random_rows

# vocabulary, cluster size: divisible, padded, one cluster, one token per cluster, almost all padded
SIZES = [(64, 8), (61, 8), (13, 13), (13, 16), (9, 1), (17, 16)]


def build(vocab_size, cluster_size, forced=(), **kwargs):
    rng = np.random.default_rng(vocab_size)
    rows = random_rows(rng, vocab_size, 32, **kwargs)
    token_ids = random_clusters(rng, vocab_size, cluster_size)
    return rows, token_ids, ClusteredRows.build(rows, token_ids, fitted(rows, token_ids), forced)


def equal(found: Matrix, rows: Matrix, order=...) -> bool:
    """Whether ``found`` are the rows, in an order."""
    pairs = zip(found.arrays().values(), rows.arrays().values(), strict=True)
    return all(np.array_equal(np.array(one), np.array(other)[order]) for one, other in pairs)


@pytest.mark.parametrize("vocab_size, cluster_size", SIZES)
@pytest.mark.parametrize("bits", [None, 4])
def test_each_slot_holds_its_token(vocab_size, cluster_size, bits):
    rows, token_ids, clustered = build(vocab_size, cluster_size, bits=bits, bias=True)
    shape = -(-vocab_size // cluster_size), cluster_size
    assert (clustered.n_clusters, clustered.cluster_size) == shape
    assert (clustered.vocab_size, clustered.rows.hidden_size) == (vocab_size, 32)
    assert clustered.padded == (vocab_size % cluster_size > 0)
    assert np.array_equal(np.array(clustered.token_ids), token_ids)
    real = token_ids < vocab_size
    for name, array in clustered.rows.arrays().items():
        original = np.array(rows.arrays()[name])
        array = np.array(array)
        assert array.shape == (*shape, *original.shape[1:])
        assert np.array_equal(array[real], original[token_ids[real]])
    slots = np.array(clustered.slot_of)
    assert np.array_equal(token_ids.ravel()[slots], np.arange(vocab_size))


@pytest.mark.parametrize("vocab_size, cluster_size", SIZES)
def test_columns_hold_the_same_rows(vocab_size, cluster_size):
    rows, token_ids, by_row = build(vocab_size, cluster_size, bias=True)
    by_column = ClusteredRows.build(rows, token_ids, by_row.centroids, by_column=True)
    weight = by_column.rows.weight
    mx.eval(weight)
    assert weight.shape == (by_row.n_clusters, cluster_size, 32)
    assert memoryview(weight.swapaxes(-1, -2)).c_contiguous
    ids = [[3, 0], [8, 3]]
    for clustered in (by_column, by_row):
        assert mx.array_equal(clustered.rows.weight, by_row.rows.weight)
        assert equal(clustered.token_rows(mx.array(ids)), rows, ids)
        assert equal(clustered.token_rows(), rows)


def test_forced_clusters():
    _, token_ids, clustered = build(61, 8, forced=(5, 60, 1000, -1))
    bias = np.array(clustered.route_bias)
    fitted_bias = np.array(clustered.centroids.bias)
    forced = np.isin(token_ids, [5, 60]).any(axis=1)
    assert np.array_equal(bias == np.float32(ALWAYS_PROBED), forced)
    assert np.array_equal(bias[~forced], fitted_bias[~forced])
    # The centroids' own bias is left alone.
    assert (fitted_bias < 1e3).all()


# A token is missing, padded instead, beyond the vocabulary, negative, or there twice.
@pytest.mark.parametrize("token, other", [(7, 8), (7, 61), (61, 62), (60, -1), (61, 60)])
def test_token_ids_must_be_a_permutation(token, other):
    rows, token_ids, clustered = build(61, 8)
    spoilt = np.where(token_ids == token, other, token_ids.astype(np.int64))
    with pytest.raises(ValueError, match=r"each of the 61 tokens exactly once.*convert"):
        ClusteredRows.build(rows, spoilt, clustered.centroids)


def test_centroids_must_fit():
    rows, token_ids, clustered = build(61, 8)
    centroids = clustered.centroids
    matrix = clustered.centroids.matrix

    def of(**arrays):
        return replace(centroids, matrix=replace(matrix, **arrays))

    for unfit in (
        replace(centroids, bias=centroids.bias[:-1]),
        replace(centroids, tail_offset=centroids.tail_offset[:-1]),
        of(weight=mx.zeros((8, 8), dtype=mx.uint32)),
        of(weight=matrix.weight.astype(mx.float32)),
        of(scales=mx.zeros((8, 2))),
        of(weight=matrix.weight[:7]),
        of(scales=None, biases=None),
    ):
        with pytest.raises(ValueError, match=r"centroids.*convert the model again"):
            ClusteredRows.build(rows, token_ids, unfit)


@pytest.mark.parametrize("n_states", [1, 32])
@pytest.mark.parametrize("n_rows, hidden_size", [(1, 8), (13, 8), (97, 24), (256, 16)])
@pytest.mark.parametrize("block_products", [1, 50, 500, 100_000])
def test_blocked_product_is_the_product(monkeypatch, n_states, n_rows, hidden_size, block_products):
    monkeypatch.setattr(operations, "BLOCK_PRODUCTS", block_products)
    hidden = mx.random.normal((n_states, hidden_size))
    weight = mx.random.normal((n_rows, hidden_size))
    blocks = in_blocks(Matrix(weight))
    found = np.array(blocked_product(hidden, blocks))
    assert blocks.shape[-1] * hidden_size <= block_products + 16 * hidden_size
    np.testing.assert_allclose(found[:, :n_rows], hidden @ weight.T, rtol=1e-4, atol=1e-5)
    last = np.broadcast_to(found[:, n_rows - 1 : n_rows], found[:, n_rows:].shape)
    # The last row is repeated.
    np.testing.assert_allclose(found[:, n_rows:], last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [{}, {"dtype": mx.bfloat16}, {"bits": 4}])
def test_columns_are_for_what_a_blas_multiplies(form):
    rows, token_ids, clustered = build(61, 8, **form)
    head = FlashHead(rows, token_ids, clustered.centroids, n_probes=2, backend="mlx")
    assert head.clustered.by_column == (form == {} and mx.default_device().type == mx.cpu)
