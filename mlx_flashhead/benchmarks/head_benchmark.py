"""Times a head by itself: dense, and FlashHead to a proposed token and to full logits."""

import argparse
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.flags import source_options
from ..common.tables import Table, new_table
from ..head.clustered import Centroids
from ..head.flash_head import FlashHead
from ..head.matrix import DEFAULT_GROUP, Matrix, affine_group
from ..loading.load import load
from ..models.install import installed_head
from .reporting import Case, cells, report, spread, timer

CLUSTER_SIZE, DEFAULT_PROBES = 16, 256  # of random heads
N_STATES = 16  # used in turn
CACHES_BYTES = 128 << 20  # more than the last cache of most machines
DENSE, OWN_DENSE = "dense (mlx-lm)", "dense (FlashHead's)"
PROPOSAL, LOGITS = "FlashHead proposal", "FlashHead full logits"

Form = Callable[[mx.array], Any]  # a way to use a head: arrays of hidden states (R, D)


def run(args: argparse.Namespace) -> None:
    """Times the heads of the command line, one after the other."""
    report(args, _cases(args), len(args.shape or [args.model]), make_table)


def _cases(args: argparse.Namespace) -> Generator[Case]:
    memory = mx.zeros(CACHES_BYTES // 4)

    def cold() -> None:
        """Fills the caches as the body of a model does: on the GPU, or in the head's thread."""
        mx.eval(memory + 1)

    for name, sizes in args.shape or [(Path(args.model).name, None)]:
        if sizes is None:
            head = installed_head(
                load(args.model, n_probes=args.n_probes, **source_options(args))[0]
            )
            dtype = rows_dtype(head)
        else:
            dtype, bits = getattr(mx, args.dtype), args.head_bits
            head = random_head(*sizes, n_probes=args.n_probes, dtype=dtype, bits=bits)
        states = mx.random.normal((N_STATES, args.positions, head.hidden_size)).astype(dtype)
        mx.eval(states)

        def use(form: Form, number: int, states: mx.array = states) -> Any:
            return form(states[number % N_STATES])

        timers = {key: timer(partial(use, form), cold) for key, form in forms(head).items()}
        yield Case(name, timers, partial(summary, name, head, dtype, args.positions))


def rows_dtype(head: FlashHead) -> mx.Dtype:
    """The dtype of the rows' numbers, or of the scales of quantized rows."""
    rows = head.clustered.rows
    return (rows.weight if rows.scales is None else rows.scales).dtype


def random_head(
    vocab_size: int,
    hidden_size: int,
    *,
    n_probes: int | None = None,
    dtype: mx.Dtype = mx.float32,
    bits: int = 16,
) -> FlashHead:
    """Random rows in random clusters of 16, with centroids of 4 bits where the width allows it.

    Rows of 4 or 8 ``bits`` are quantized, 16 leaves them in ``dtype``.

    Raises:
        ValueError: If the rows cannot be quantized, or ``n_probes`` is too large.
    """
    n_clusters = -(-vocab_size // CLUSTER_SIZE)
    if bits != 16 and hidden_size % DEFAULT_GROUP:
        raise ValueError(
            f"A width of {hidden_size} cannot be quantized: leave the rows in 16 bits."
        )
    mx.random.seed(0)
    rows = Matrix(mx.random.normal((vocab_size, hidden_size), scale=0.05).astype(dtype))
    if bits != 16:
        rows = rows.quantize(bits=bits, group_size=DEFAULT_GROUP)
    matrix = Matrix(mx.random.normal((n_clusters, hidden_size), scale=0.05))
    group_size = affine_group(hidden_size)
    if group_size is not None:
        matrix = Matrix(matrix.weight.astype(mx.float16)).quantize(bits=4, group_size=group_size)
    centroids = Centroids(matrix, mx.zeros(n_clusters), mx.full((n_clusters,), -2.0))
    slots = np.full(n_clusters * CLUSTER_SIZE, vocab_size, np.uint32)
    slots[:vocab_size] = np.random.default_rng(0).permutation(vocab_size)
    n_probes = min(DEFAULT_PROBES, n_clusters) if n_probes is None else n_probes
    head = FlashHead(rows, slots.reshape(n_clusters, -1), centroids, n_probes=n_probes)
    mx.eval(head.arrays())
    head.check_kernels(dtype)
    return head


def forms(head: FlashHead) -> dict[str, Form]:
    """The ways to use a head, by name: functions of hidden states (R, D).

    mlx-lm's dense form has the rows in the FlashHead's order, which does not change its time. The
    FlashHead's dense product may be faster, since it lays the rows out for the CPU. FlashHead
    scores the clusters of its verified proposals, at any number of positions.
    """
    rows = head.clustered.flat_rows().map(lambda array: array[: head.vocab_size])
    mx.eval(rows.arrays())
    return {
        DENSE: rows.matmul,
        OWN_DENSE: head.dense_logits,
        PROPOSAL: lambda hidden: head.propose(hidden, None).tokens,
        LOGITS: partial(head.unverified_logits, n_probes=head.n_probes),
    }


def summary(name: str, head: FlashHead, dtype: mx.Dtype, n_positions: int, seconds: dict) -> dict:
    """Shapes, milliseconds and ratios of the medians, JSON-ready.

    ``read_mb`` are weights that a call reads on this device if no two states share a cluster.
    """
    ms = {form: spread(times, 1000) for form, times in seconds.items()}
    best_dense = min((DENSE, OWN_DENSE), key=lambda form: ms[form]["median"])
    rows, centroids = head.clustered.rows, head.clustered.centroids.matrix
    on_cpu = mx.default_device().type == mx.cpu  # where the centroids are float32
    routing = 4 * head.n_clusters * head.hidden_size if on_cpu else centroids.nbytes
    probed = min(n_positions * head.n_probes, head.n_clusters) / head.n_clusters
    sizes = ("vocab_size", "hidden_size", "n_clusters", "cluster_size", "n_probes")
    return {
        "name": name,
        **{size: getattr(head, size) for size in sizes},
        "dtype": str(dtype).removeprefix("mlx.core."),
        "head_bits": rows.format.bits,
        "backend": head.backend,
        "backend_reason": head.backend_reason,
        "positions": n_positions,
        "head_mb": rows.nbytes / 1e6,
        "read_mb": (routing + rows.nbytes * probed) / 1e6,
        "best_dense": best_dense,
        "ms": ms,
        "times_faster": {
            f"{form} against {dense}": ms[dense]["median"] / ms[form]["median"]
            for dense in dict.fromkeys((DENSE, best_dense))
            for form in (PROPOSAL, LOGITS)
        },
    }


def make_table(head: dict) -> Table:
    """The table of one head."""
    table = new_table(
        "{name}: V={vocab_size:,} D={hidden_size:,}, {head_bits}-bit rows, {dtype}, {n_probes:,} "
        "of {n_clusters:,} clusters, batch {positions}".format(**head),
        ("", "ms", "quartiles", "vs mlx-lm", "vs best dense"),
        "Reads {read_mb:.1f} MB of weights, dense {head_mb:.1f} MB; cold caches.".format(**head),
    )
    for name, ms in head["ms"].items():
        pairs = [f"{name} against {dense}" for dense in (DENSE, head["best_dense"])]
        ratios = (head["times_faster"].get(pair) for pair in pairs)
        table.add_row(name, *cells(ms), *(f"{ratio:.1f} x" if ratio else "" for ratio in ratios))
    return table
