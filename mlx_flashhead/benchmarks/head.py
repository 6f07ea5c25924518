"""The head alone, dense and FlashHead: hidden states to candidates, a token or full logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.timing import ColdCaches, Spread, in_turns, on_batch
from ..head.centroids import Centroids
from ..head.flash_head import FlashHead
from ..head.formats import USUAL_GROUP, affine_group
from ..head.matrix import Matrix
from ..head.portable import blocked_product, in_blocks
from . import roofline

SHAPES = {name: (s.vocab_size, s.hidden_size) for name, s in roofline.SHAPES.items()}
CLUSTER_SIZE = 16
CHAIN = 16  # calls of a chain, see `chained`

DENSE, DENSE_BLOCKS, DENSE_COLUMNS = "dense (mlx-lm)", "dense in blocks", "dense by columns"
DENSE_FORMS = {DENSE, DENSE_BLOCKS, DENSE_COLUMNS}
CANDIDATES, TOKEN, LOGITS = "FlashHead candidates", "FlashHead token", "FlashHead full logits"

Form = Callable[[mx.array], Any]  # a way to use a head: arrays of hidden states (R, D)


def random_head(
    vocab_size: int,
    hidden_size: int,
    *,
    n_probes: int,
    dtype: mx.Dtype = mx.float32,
    bits: int = 16,
    cluster_size: int = CLUSTER_SIZE,
    seed: int = 0,
) -> FlashHead:
    """A head of random rows in random clusters, which takes as long as a real one.

    Args:
        vocab_size: Rows V.
        hidden_size: Width D.
        n_probes: Clusters scored.
        dtype: Of the rows, or of their scales when they are quantized.
        bits: Of the rows, 4 or 8; 16 leaves them in ``dtype``.
        cluster_size: Tokens per cluster.
        seed: Seed of rows and clusters.

    Raises:
        ValueError: If the rows cannot be quantized, or ``n_probes`` is too large.
    """
    n_clusters = -(-vocab_size // cluster_size)
    if not 1 <= n_probes <= n_clusters:
        raise ValueError(f"--n-probes is {n_probes}: this head has {n_clusters} clusters.")
    if bits != 16 and hidden_size % USUAL_GROUP:
        raise ValueError(f"A width of {hidden_size} cannot be quantized: give --head-bits 16.")
    mx.random.seed(seed)
    weight = mx.random.normal((vocab_size, hidden_size), scale=0.05).astype(dtype)
    rows = Matrix(weight)
    if bits != 16:
        rows = rows.quantize(bits=bits, group_size=USUAL_GROUP)
    del weight
    centroids = random_centroids(n_clusters, hidden_size)
    slots = np.full(n_clusters * cluster_size, vocab_size, np.uint32)
    slots[:vocab_size] = np.random.default_rng(seed).permutation(vocab_size)
    head = FlashHead(rows, slots.reshape(n_clusters, -1), centroids, n_probes=n_probes)
    mx.eval(head.arrays())
    head.check_kernels(dtype)
    return head


def random_centroids(n_clusters: int, hidden_size: int) -> Centroids:
    """Random centroids, of 4 bits where the width allows it."""
    matrix = Matrix(mx.random.normal((n_clusters, hidden_size), scale=0.05))
    group_size = affine_group(hidden_size)
    if group_size is not None:
        matrix = matrix.map(lambda weight: weight.astype(mx.float16))
        matrix = matrix.quantize(bits=4, group_size=group_size)
    return Centroids(matrix, mx.zeros(n_clusters), mx.full((n_clusters,), -2.0))


def forms(head: FlashHead) -> dict[str, Form]:
    """The ways to use a head, by name: functions of hidden states (R, D).

    The dense forms use the rows in the FlashHead's order, since the order does not change their
    time. Where the FlashHead holds its rows by columns, they use a copy in rows. On a CPU there are
    two more dense forms, which the BLAS multiplies faster than mlx-lm's: in blocks of rows, and the
    FlashHead's own.
    """
    vocab_size = head.vocab_size
    rows = head.clustered.flat_rows().map(lambda array: array[:vocab_size])
    mx.eval(rows.arrays())
    found: dict[str, Form] = {DENSE: rows.matmul}
    if not rows.quantized and mx.default_device().type == mx.cpu:
        blocks = in_blocks(rows, rows.weight.dtype)
        mx.eval(blocks)
        found[DENSE_BLOCKS] = lambda hidden: blocked_product(hidden, blocks)[..., :vocab_size]
    if head.clustered.by_column:
        columns = head.clustered.rows.weight
        found[DENSE_COLUMNS] = lambda hidden: blocked_product(hidden, columns)
    return found | {CANDIDATES: head.candidates, TOKEN: head.token, LOGITS: head}


def read_mb(head: FlashHead, n_positions: int = 1) -> float:
    """Megabytes of weights that a call reads on this device if no two states share a cluster."""
    stage_1 = head.clustered.centroids.matrix.nbytes
    if mx.default_device().type == mx.cpu:  # the centroids are float32 there
        stage_1 = 4 * head.n_clusters * head.hidden_size
    rows = head.clustered.rows.nbytes
    probed = min(n_positions * head.n_probes, head.n_clusters)
    return (stage_1 + rows * probed / head.n_clusters) / 1e6


def form_of(head: FlashHead, states: mx.array) -> dict:
    """Shapes, precision and backend of a head, JSON-ready."""
    rows = head.clustered.rows
    return {
        "vocab_size": head.vocab_size,
        "hidden_size": head.hidden_size,
        "n_clusters": head.n_clusters,
        "cluster_size": head.cluster_size,
        "n_probes": head.n_probes,
        "dtype": str(states.dtype).removeprefix("mlx.core."),
        "head_bits": rows.format.bits,
        "backend": head.backend,
        "backend_reason": head.backend_reason,
        "head_mb": rows.nbytes / 1e6,
    }


def in_batches(states: mx.array, n_positions: int, n_batches: int) -> list[mx.array]:
    """Evaluated batches (n_positions, D) of the states (N, D), used in turn."""
    numbers = np.arange(n_batches * n_positions).reshape(n_batches, n_positions) % len(states)
    batches = [mx.contiguous(mx.take(states, mx.array(row), axis=0)) for row in numbers]
    mx.eval(batches)
    return batches


def head_benchmark(
    head: FlashHead,
    states: mx.array,
    *,
    n_positions: int = 1,
    rounds: int = 20,
    progress: bool = True,
    description: str = "Timing the head",
) -> dict:
    """Times all forms of a head in turns, with cold caches.

    Args:
        head: The head.
        states: (N, D) hidden states; each round takes others of them.
        n_positions: States at once: the batch.
        rounds: Runs that count.
        progress: Show a bar.
        description: Of the bar.

    Returns:
        Shapes, milliseconds and ratios, JSON-ready.
    """
    batches = in_batches(states, n_positions, rounds + 1)
    named = forms(head)
    seconds = in_turns(
        {name: partial(on_batch, form, batches) for name, form in named.items()},
        rounds,
        before=ColdCaches(),
        progress=progress,
        description=description,
    )
    spreads = {name: Spread.of(taken).scaled(1000) for name, taken in seconds.items()}
    best_dense = min(DENSE_FORMS & spreads.keys(), key=lambda name: spreads[name].median)
    result = form_of(head, states) | {
        "positions": n_positions,
        "read_mb": read_mb(head, n_positions),
        "best_dense": best_dense,
        "ms": {name: spread.to_dict() for name, spread in spreads.items()},
        "times_faster": {
            f"{name} against {dense}": spreads[dense].median / spreads[name].median
            for dense in dict.fromkeys((DENSE, best_dense))
            for name in (CANDIDATES, TOKEN, LOGITS)
        },
    }
    if mx.default_device().type != mx.cpu:
        result["gpu_ms"] = chained(named, batches[:CHAIN], rounds)
    return result


def chained(
    named: dict[str, Form], batches: list[mx.array], rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of a call within one submission to the GPU, without the host's time.

    Each call's hidden state depends on the result of the call before. The cost of this dependence
    is timed too, and subtracted. Caches are warm: weights that fit into the last one come from it.
    """

    def chain(form):
        def run(_):
            link = mx.zeros((), batches[0].dtype)
            for hidden in batches:
                made = form(hidden + 0 * link)
                made = made[-1] if isinstance(made, tuple) else made
                link = made.reshape(-1)[0].astype(hidden.dtype)
            return link

        return run

    nothing = "nothing"
    runs = {nothing: chain(lambda hidden: hidden)}
    runs |= {name: chain(form) for name, form in named.items()}
    seconds = in_turns(runs, rounds, progress=False)
    alone = np.median(seconds.pop(nothing))
    per_call = 1000 / len(batches)
    return {
        name: Spread.of([max(0.0, s - alone) for s in taken]).scaled(per_call).to_dict()
        for name, taken in seconds.items()
    }
