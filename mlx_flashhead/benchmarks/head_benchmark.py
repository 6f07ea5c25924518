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
from .reporting import Case, cells, spread

CLUSTER_SIZE, DEFAULT_PROBES = 16, 256  # of random heads
N_STATES = 16  # used in turn
CACHES_BYTES = 128 << 20  # more than the last cache of most machines
DENSE, OWN_DENSE = "dense (mlx-lm)", "dense (FlashHead's)"
PROPOSAL, LOGITS = "FlashHead proposal", "FlashHead full logits"

Form = Callable[[mx.array], Any]  # a way to use a head: arrays of hidden states (R, D)


def cases(args: argparse.Namespace) -> Generator[Case]:
    memory = mx.zeros(CACHES_BYTES // 4)

    def seconds(form: Form, states: mx.array, number: int) -> float:
        mx.eval(memory + 1)  # fills the caches as the body of a model does, on the same device
        start = time.perf_counter()
        mx.eval(form(states[number % N_STATES]))
        return time.perf_counter() - start

    for name, sizes in args.shape or [(Path(args.model).name, None)]:
        if sizes is None:
            source = {"flash_head": args.flash_head, "build": not args.no_build}
            model, _ = load(args.model, n_probes=args.n_probes, **source)
            head, dtype = installed_head(model), hidden_dtype(model)
        else:
            dtype, bits = getattr(mx, args.dtype), args.head_bits
            head = random_head(*sizes, n_probes=args.n_probes, dtype=dtype, bits=bits)
        states = mx.random.normal((N_STATES, args.positions, head.hidden_size)).astype(dtype)
        mx.eval(states)
        timers = {key: partial(seconds, form, states) for key, form in forms(head).items()}
        yield Case(name, timers, partial(summary, name, head, dtype, args.positions))


def random_head(
    vocab_size: int,
    hidden_size: int,
    *,
    n_probes: int | None = None,
    dtype: mx.Dtype = mx.float32,
    bits: int = 16,
) -> FlashHead:
    """Random rows of ``dtype``, or of fewer than 16 bits, in random clusters of 16, with centroids
    of 4 bits where the width allows it. ValueError if a number does not fit the sizes."""
    group_size, n_clusters = affine_group(hidden_size), -(-vocab_size // CLUSTER_SIZE)
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


def forms(head: FlashHead) -> dict[str, Form]:
    """The ways to use a head, by name. mlx-lm's dense form has the rows in the FlashHead's order,
    the FlashHead's dense product lays them out for the CPU."""
    rows = head.clustered.flat_rows().map(lambda array: array[: head.vocab_size])
    mx.eval(rows.arrays())
    return {
        DENSE: rows.matmul,
        OWN_DENSE: head.dense_logits,
        PROPOSAL: lambda hidden: head.propose(hidden, None).tokens,
        LOGITS: partial(head.unverified_logits, n_probes=head.n_probes),
    }


def summary(name: str, head: FlashHead, dtype: mx.Dtype, n_positions: int, seconds: dict) -> dict:
    """Shapes, milliseconds and ratios of the medians, JSON-ready. ``read_mb``: weights that a call
    reads here if no two states share a cluster."""
    ms = {form: spread(times, 1000) for form, times in seconds.items()}
    best_dense = min((DENSE, OWN_DENSE), key=lambda form: ms[form]["median"])
    rows, centroids = head.clustered.rows, head.clustered.centroids.matrix
    on_cpu = mx.default_device().type == mx.cpu  # where the centroids are float32
    routing = 4 * head.n_clusters * head.hidden_size if on_cpu else centroids.nbytes
    probed = min(n_positions * head.n_probes, head.n_clusters) / head.n_clusters
    sizes = ("vocab_size", "hidden_size", "n_clusters", "cluster_size", "n_probes")
    return {each: getattr(head, each) for each in (*sizes, "backend", "backend_reason")} | {
        "name": name,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "head_bits": rows.format.bits,
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
