"""Clusters in the format of FlashHead's authors: read, or refused with one sentence."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.conversion.published_clusters import read_clusters

V, D, C = 203, 64, 13  # clusters of 15 and 16


def assignments(rng, n_clusters=C, vocab_size=V):
    return rng.permutation(np.arange(vocab_size) % n_clusters).astype(np.int64)


def write(path, clusters, centroids, **further):
    arrays = {"cluster_assignments": mx.array(clusters), "centroids": mx.array(centroids)}
    mx.save_safetensors(str(path), arrays | further)
    return path


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
@pytest.mark.parametrize("leading", [(), (1,), (1, 1)])
def test_every_token_lies_in_its_cluster(tmp_path, rng, dtype, leading):
    given = assignments(rng)
    centroids = rng.normal(size=(*leading, D, C)).astype(np.float32)
    path = write(tmp_path / "c.safetensors", given.astype(dtype).reshape(*leading, V), centroids)
    found = read_clusters(path, V, D)
    assert (found.shape, found.dtype) == ((C, 16), np.uint32)
    for cluster, ids in enumerate(found):
        real = ids[ids < V]
        np.testing.assert_array_equal(real, np.flatnonzero(given == cluster))
        assert (ids[len(real) :] == V).all()


def test_sixteen_bit_centroids_and_other_arrays(tmp_path, rng):
    centroids = mx.array(rng.normal(size=(D, C))).astype(mx.bfloat16)
    path = write(tmp_path / "c.safetensors", assignments(rng), centroids, more=mx.zeros(3))
    assert read_clusters(path, V, D).shape == (C, 16)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a, c: (a[:-1], c), rf"assigns {V - 1} tokens, but the model has {V}"),
        (lambda a, c: (a.reshape(7, 29), c), r"shape \(7, 29\)"),
        (lambda a, c: (a.astype(np.float32), c), "whole numbers"),
        (lambda a, c: (a, c[:-1]), r"centroids of shape \(63, 13\).* \(64, C\) is needed"),
        (lambda a, c: (a, c.T), r"centroids of shape \(13, 64\)"),
        (lambda a, c: (a, c[:, :-1]), "clusters 0 to 12, but it has the centroids of 12"),
        (lambda a, c: (a - 1, c), "clusters -1 to 11"),
        (lambda a, c: (np.where(a == 1, 0, a), c), "clusters of 0 to 32 tokens"),
        (lambda a, c: (np.where(np.arange(V) < 3, 0, a), c), r"equal size, here 16"),
    ],
)
def test_files_that_do_not_fit(tmp_path, rng, change, said):
    given, centroids = change(assignments(rng), rng.normal(size=(D, C)).astype(np.float32))
    path = write(tmp_path / "c.safetensors", given, centroids)
    with pytest.raises(ValueError, match=said) as caught:
        read_clusters(path, V, D)
    sentence = str(caught.value)
    assert sentence.startswith(f"--clusters {path} ") and sentence.endswith(".")
    assert "\n" not in sentence


def test_files_that_are_none(tmp_path, rng):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not at all")
    other = tmp_path / "other.safetensors"
    mx.save_safetensors(str(other), {"centroids": mx.zeros((D, C))})
    for path, said in (
        (tmp_path / "absent", "is no file"),
        (tmp_path, "is no file"),
        (broken, "cannot be read as safetensors"),
        (other, "lacks cluster_assignments: a file with"),
    ):
        with pytest.raises(ValueError, match=said):
            read_clusters(path, V, D)
