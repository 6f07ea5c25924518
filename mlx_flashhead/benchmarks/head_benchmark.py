"""Times a head by itself: dense, and FlashHead to a proposed token and to full logits."""

import argparse
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.table import Table

from ..common.tables import new_table
from ..head.clustered import Centroids
from ..head.flash_head import FlashHead
from ..head.matrix import DEFAULT_GROUP, Matrix, affine_group
from ..loading.load import load
from ..models.install import hidden_dtype, installed_head
from .reporting import Case, spread, spread_cells

# The clusters of random heads, and how many of them are scored.
CLUSTER_SIZE = 16
DEFAULT_PROBES = 256

# Hidden states that are used in turn.
N_STATES = 16
# More than the last cache of most machines.
CACHES_BYTES = 128 << 20

DENSE = "dense (mlx-lm)"
OWN_DENSE = "dense (FlashHead's)"
PROPOSAL = "FlashHead proposal"
LOGITS = "FlashHead full logits"

# A way to use a head: it makes arrays of hidden states (R, D).
HeadCall = Callable[[mx.array], Any]


def cases(args: argparse.Namespace) -> Generator[Case]:
    """Yields a case for each shape, or for the model.

    Args:
        args: The flags of ``mlx_flashhead.benchmark head``.
    """
    memory = mx.zeros(CACHES_BYTES // 4)

    def seconds(variant: HeadCall, states: mx.array, number: int) -> float:
        # This fills the caches as the body of a model does, on the same device.
        mx.eval(memory + 1)
        start = time.perf_counter()
        mx.eval(variant(states[number % N_STATES]))
        return time.perf_counter() - start

    for name, sizes in args.shape or [(Path(args.model).name, None)]:
        if sizes is None:
            model, _ = load(
                args.model,
                n_probes=args.n_probes,
                flash_head=args.flash_head,
                build=not args.no_build,
            )
            head = installed_head(model)
            dtype = hidden_dtype(model)
        else:
            dtype = getattr(mx, args.dtype)
            head = random_head(*sizes, n_probes=args.n_probes, dtype=dtype, bits=args.head_bits)
        states = mx.random.normal((N_STATES, args.positions, head.hidden_size)).astype(dtype)
        mx.eval(states)
        timers = {key: partial(seconds, variant, states) for key, variant in variants(head).items()}
        yield Case(name, timers, partial(summary, name, head, dtype, args.positions))


def random_head(
    vocab_size: int,
    hidden_size: int,
    *,
    n_probes: int | None = None,
    dtype: mx.Dtype = mx.float32,
    bits: int = 16,
) -> FlashHead:
    """Makes a FlashHead of random rows in random clusters of 16.

    Its centroids have 4 bits where the width allows it.

    Args:
        vocab_size: Number of rows.
        hidden_size: Width of a row.
        n_probes: Clusters scored per token (default: 256, or all).
        dtype: Of the rows if ``bits`` is 16, and of their scales.
        bits: Of the rows.

    Raises:
        ValueError: If a number does not fit the sizes.
    """
    group_size = affine_group(hidden_size)
    n_clusters = -(-vocab_size // CLUSTER_SIZE)
    mx.random.seed(0)
    rows = Matrix(mx.random.normal((vocab_size, hidden_size), scale=0.05).astype(dtype))
    if bits != 16 and hidden_size % DEFAULT_GROUP:
        raise ValueError(f"A width of {hidden_size} cannot be quantized: leave the 16 bits.")
    if bits != 16:
        rows = rows.quantize(bits=bits, group_size=DEFAULT_GROUP)
    matrix = Matrix(mx.random.normal((n_clusters, hidden_size), scale=0.05))
    if group_size is not None:
        matrix = Matrix(matrix.weight.astype(mx.float16)).quantize(bits=4, group_size=group_size)
    centroids = Centroids(matrix, mx.zeros(n_clusters), mx.full((n_clusters,), -2.0))
    slots = np.full(n_clusters * CLUSTER_SIZE, vocab_size, np.uint32)
    slots[:vocab_size] = np.random.default_rng(0).permutation(vocab_size)
    n_probes = n_probes or min(DEFAULT_PROBES, n_clusters)
    head = FlashHead(rows, slots.reshape(n_clusters, -1), centroids, n_probes=n_probes)
    mx.eval(head.arrays())
    head.check_kernels(dtype)
    return head


def variants(head: FlashHead) -> dict[str, HeadCall]:
    """The ways to use a head that are timed, by name.

    mlx-lm's dense product has the rows in the FlashHead's order; the FlashHead's own dense product
    lays them out for the CPU.

    Args:
        head: The head to use.
    """
    rows = head.clustered.flat_rows().map(lambda array: array[: head.vocab_size])
    mx.eval(rows.arrays())
    return {
        DENSE: rows.matmul,
        OWN_DENSE: head.dense_logits,
        PROPOSAL: lambda hidden: head.propose(hidden, None).tokens,
        LOGITS: partial(head.unverified_logits, n_probes=head.n_probes),
    }


def summary(
    name: str,
    head: FlashHead,
    dtype: mx.Dtype,
    n_positions: int,
    seconds: dict[str, list[float]],
) -> dict[str, Any]:
    """The figures of one head.

    Args:
        name: Of the shape or the model.
        head: The head that was timed.
        dtype: Of the hidden states.
        n_positions: Hidden states at once.
        seconds: The times of the rounds, by variant.

    Returns:
        Shapes, milliseconds and ratios of the medians, JSON-ready. ``read_mb`` are the megabytes of
        weights that a call reads here if no two states share a cluster.
    """
    ms = {variant: spread(times, 1000) for variant, times in seconds.items()}
    best_dense = min((DENSE, OWN_DENSE), key=lambda variant: ms[variant]["median"])
    times_faster = {}
    for dense in dict.fromkeys((DENSE, best_dense)):
        for variant in (PROPOSAL, LOGITS):
            ratio = ms[dense]["median"] / ms[variant]["median"]
            times_faster[f"{variant} against {dense}"] = ratio
    rows = head.clustered.rows
    routing = head.clustered.centroids.matrix.nbytes
    if mx.default_device().type == mx.cpu:
        # There the centroids are float32.
        routing = 4 * head.n_clusters * head.hidden_size
    probed = min(n_positions * head.n_probes, head.n_clusters) / head.n_clusters
    return {
        "vocab_size": head.vocab_size,
        "hidden_size": head.hidden_size,
        "n_clusters": head.n_clusters,
        "cluster_size": head.cluster_size,
        "n_probes": head.n_probes,
        "backend": head.backend,
        "backend_reason": head.backend_reason,
        "name": name,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "head_bits": rows.format.bits,
        "positions": n_positions,
        "head_mb": rows.nbytes / 1e6,
        "read_mb": (routing + rows.nbytes * probed) / 1e6,
        "best_dense": best_dense,
        "ms": ms,
        "times_faster": times_faster,
    }


def make_table(figures: dict[str, Any]) -> Table:
    """A table with a line for each variant.

    Args:
        figures: What `summary` returns.
    """
    title = (
        "{name}: V={vocab_size:,} D={hidden_size:,}, {head_bits}-bit rows, {dtype}, {n_probes:,} "
        "of {n_clusters:,} clusters, batch {positions}"
    )
    caption = "Reads {read_mb:.1f} MB of weights, dense {head_mb:.1f} MB; cold caches."
    headings = ("", "ms", "quartiles", "vs mlx-lm", "vs best dense")
    table = new_table(title.format(**figures), headings, caption.format(**figures))
    for variant, ms in figures["ms"].items():
        ratios = []
        for dense in (DENSE, figures["best_dense"]):
            ratio = figures["times_faster"].get(f"{variant} against {dense}")
            cell = ""
            if ratio is not None:
                cell = f"{ratio:.1f} x"
            ratios.append(cell)
        table.add_row(variant, *spread_cells(ms), *ratios)
    return table
