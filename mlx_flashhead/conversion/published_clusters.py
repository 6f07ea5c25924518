"""Reads clusters in the format in which FlashHead's authors publish them.

A file of safetensors with ``cluster_assignments`` (V,), each token's cluster, and ``centroids``
(D, C), possibly with leading ones. Only the clusters are used: the centroids are fitted anew.

The name of such a file is ``clustering_cache.safetensors``.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np

ASSIGNMENTS, CENTROIDS = "cluster_assignments", "centroids"


def read_clusters(path: str | Path, vocab_size: int, hidden_size: int) -> np.ndarray:
    """The clusters of a file.

    Args:
        path: The file.
        vocab_size: Rows V of the head that they are for.
        hidden_size: Their width D.

    Returns:
        (C, cluster_size) uint32 with cluster_size = ceil(V / C): each of 0 … V-1 exactly once,
        ascending within a cluster; V marks the padded slots at a cluster's end.

    Raises:
        ValueError: If the file cannot be read, is of another format, is for another head, or its
            clusters are not of equal size.
    """
    assignments, centroids = _read(Path(path).expanduser())
    if assignments.shape != (vocab_size,):
        raise ValueError(
            f"--clusters {path} assigns {assignments.size} tokens, but the model has {vocab_size}: "
            "give the file that was made for this model."
        )
    if centroids.ndim != 2 or centroids.shape[0] != hidden_size:
        raise ValueError(
            f"--clusters {path} has centroids of shape {centroids.shape}, but the model's rows "
            f"have {hidden_size} columns, so ({hidden_size}, C) is needed: give the file that was "
            "made for this model."
        )
    n_clusters = centroids.shape[1]
    in_range = assignments.min() >= 0 and assignments.max() < n_clusters
    if not in_range or not 1 <= n_clusters <= vocab_size:
        raise ValueError(
            f"--clusters {path} assigns tokens to clusters {assignments.min()} to "
            f"{assignments.max()}, but it has the centroids of {n_clusters}: it is damaged, so "
            "fetch it again or leave --clusters out."
        )
    sizes = np.bincount(assignments, minlength=n_clusters)
    cluster_size = -(-vocab_size // n_clusters)
    if sizes.max() > cluster_size or sizes.min() < 1:
        raise ValueError(
            f"--clusters {path} has clusters of {sizes.min()} to {sizes.max()} tokens, but they "
            f"must be of equal size, here {cluster_size}: leave --clusters out to make such ones."
        )
    order = np.argsort(assignments, kind="stable")
    ordered = assignments[order]
    place = np.arange(vocab_size) - (np.cumsum(sizes) - sizes)[ordered]
    token_ids = np.full((n_clusters, cluster_size), vocab_size, dtype=np.uint32)
    token_ids[ordered, place] = order
    return token_ids


def _read(path: Path) -> tuple[np.ndarray, mx.array]:
    """The assignments (V,) int64 and the centroids, without leading ones."""
    if not path.is_file():
        raise ValueError(f"--clusters {path} is no file: check the path.")
    try:
        arrays = mx.load(str(path), format="safetensors")
        mx.eval(arrays)
    except (RuntimeError, ValueError):
        raise ValueError(
            f"--clusters {path} cannot be read as safetensors: it is damaged or of another format."
        ) from None
    missing = [name for name in (ASSIGNMENTS, CENTROIDS) if name not in arrays]
    if missing:
        raise ValueError(
            f"--clusters {path} lacks {' and '.join(missing)}: a file with {ASSIGNMENTS} (V,) and "
            f"{CENTROIDS} (D, C) is needed, such as clustering_cache.safetensors."
        )
    assignments = _without_leading_ones(arrays[ASSIGNMENTS], 1)
    centroids = _without_leading_ones(arrays[CENTROIDS], 2)
    if not mx.issubdtype(assignments.dtype, mx.integer) or assignments.ndim != 1:
        raise ValueError(
            f"--clusters {path} has {ASSIGNMENTS} of {assignments.dtype} and shape "
            f"{assignments.shape}, but whole numbers of shape (V,) are needed."
        )
    return np.array(assignments).astype(np.int64), centroids


def _without_leading_ones(array: mx.array, ndim: int) -> mx.array:
    while array.ndim > ndim and array.shape[0] == 1:
        array = array[0]
    return array
