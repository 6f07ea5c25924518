"""Counts the memory traffic of the Metal kernels, per kernel and buffer, beside the dense head's.

    python scripts/kernel_report.py [--head-bits 4|8|16] [--n-probes 256] [--json FILE]

All threadgroups of the kernels run on the tests' emulator, at the head shapes of four models with
random weights. The report counts accesses, without an Apple GPU and without times. The dense head's
figures follow from the definition of MLX's matrix-vector kernels.
"""

import argparse
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlx_flashhead.common.tables import new_table, show
from mlx_flashhead.head.centroids import Centroids
from mlx_flashhead.head.clustered import ClusteredRows
from mlx_flashhead.head.formats import USUAL_GROUP
from mlx_flashhead.head.kernels import MetalSteps
from mlx_flashhead.head.matrix import Matrix

TESTS = Path(__file__).resolve().parent.parent / "tests"

SHAPES = {  # vocab_size, hidden_size
    "Llama-3.2-1B": (128256, 2048),
    "Qwen3-0.6B": (151936, 1024),
    "Gemma-3-270M": (262144, 640),
    "SmolLM2-135M": (49152, 576),
}
CLUSTER_SIZE = 16
LINE = 128


def random_rows(rng, shape: tuple[int, ...], hidden_size: int, bits: int) -> Matrix:
    """Rows of the given leading axes, with random bits where these are cheap to make."""
    if bits == 16:
        return Matrix(mx.random.normal((*shape, hidden_size)).astype(mx.bfloat16))
    words = rng.integers(2**32, size=(*shape, hidden_size * bits // 32), dtype=np.uint32)
    scales = mx.full((*shape, hidden_size // USUAL_GROUP), 0.01, dtype=mx.bfloat16)
    offsets = mx.full(scales.shape, -0.075, dtype=mx.bfloat16)
    return Matrix(mx.array(words), scales, offsets, group_size=USUAL_GROUP, bits=bits)


def random_head(vocab_size: int, hidden_size: int, bits: int) -> ClusteredRows:
    """A head in random clusters of 16."""
    rng = np.random.default_rng(0)
    n_clusters = vocab_size // CLUSTER_SIZE
    centroids = random_rows(rng, (n_clusters,), hidden_size, 4)
    centroids = Centroids(centroids, mx.zeros(n_clusters), mx.full((n_clusters,), -2.0))
    order = rng.permutation(vocab_size).astype(np.uint32)
    return ClusteredRows(
        rows=random_rows(rng, (n_clusters, CLUSTER_SIZE), hidden_size, bits),
        token_ids=mx.array(order.reshape(n_clusters, CLUSTER_SIZE)),
        slot_of=mx.array(np.argsort(order).astype(np.uint32)),
        centroids=centroids,
        route_bias=centroids.bias,
        padded=False,
    )


def count(clustered: ClusteredRows, n_probes: int) -> list[dict]:
    """The counts of each kernel in one decode step, for full logits and for the greedy token."""
    from metal_emulator import Emulator

    hidden = mx.random.normal((1, clustered.hidden_size)).astype(mx.bfloat16)
    with Emulator().installed() as emulator:
        steps = MetalSteps(clustered)
        scores = steps.route(hidden)
        selection = steps.select(scores, n_probes)
        candidates = steps.score(hidden, selection)
        steps.expand(scores, selection, candidates)
        steps.token(steps.select(scores, n_probes, words=False), candidates)
    return [
        {
            "kernel": dispatch.name.removeprefix("flash_head_"),
            "dispatches": 1,
            "threadgroups": int(np.prod(dispatch.grid) // np.prod(dispatch.threadgroup)),
            "threads_per_threadgroup": int(np.prod(dispatch.threadgroup)),
            "barriers": dispatch.barriers,
            "threadgroup_memory_bytes": dispatch.threadgroup_bytes,
            "buffers": {
                name: {
                    "size_bytes": traffic.bytes,
                    "read_bytes": traffic.reads,
                    "distinct_read_bytes": traffic.distinct_bytes_read,
                    "distinct_read_lines": traffic.lines_read,
                    "written_bytes": traffic.writes,
                    "distinct_written_lines": traffic.lines_written,
                }
                for name, traffic in dispatch.buffers.items()
            },
        }
        for dispatch in emulator.dispatches
    ]


def dense(vocab_size: int, hidden_size: int, bits: int) -> dict:
    """The same figures of the dense head, from the definition of MLX's kernel.

    A simdgroup of qmv (or of gemv, for 16 bits) computes 4 rows: it reads each byte of weights
    once, the hidden state once for its 4 rows, and a group's scale and offset once per lane that
    holds a part of the group. A threadgroup of qmv has 2 simdgroups, one of gemv 8.

    Source: mlx/backend/metal/kernels/quantized.h, qmv_fast_impl; kernels/gemv.h, GEMVKernel, with
    the sizes that backend/metal/matmul.cpp gives it.
    """
    sizes = {"weight": vocab_size * hidden_size * bits // 8}
    reads = dict(sizes)
    if bits < 16:
        lanes_per_group = USUAL_GROUP * bits // 64  # a lane holds 8 bytes
        for name in ("scales", "biases"):
            sizes[name] = 2 * vocab_size * hidden_size // USUAL_GROUP
            reads[name] = sizes[name] * lanes_per_group
    sizes["hidden"] = 2 * hidden_size
    reads["hidden"] = sizes["hidden"] * -(-vocab_size // 4)
    buffers = {
        name: {
            "size_bytes": size,
            "read_bytes": reads[name],
            "distinct_read_bytes": size,
            "distinct_read_lines": -(-size // LINE),
            "written_bytes": 0,
            "distinct_written_lines": 0,
        }
        for name, size in sizes.items()
    }
    written = 2 * vocab_size
    buffers["logits"] = {
        "size_bytes": written,
        "read_bytes": 0,
        "distinct_read_bytes": 0,
        "distinct_read_lines": 0,
        "written_bytes": written,
        "distinct_written_lines": -(-written // LINE),
    }
    simdgroups = 2 if bits < 16 else 8
    return {
        "kernel": "dense qmv" if bits < 16 else "dense gemv",
        "dispatches": 1,
        "threadgroups": -(-vocab_size // (4 * simdgroups)),
        "threads_per_threadgroup": 32 * simdgroups,
        "barriers": 0,
        "threadgroup_memory_bytes": 0,
        "buffers": buffers,
    }


def lines_mb(kernels: list[dict]) -> float:
    """Megabytes of distinct lines that these kernels read and write."""
    lines = sum(
        buffer["distinct_read_lines"] + buffer["distinct_written_lines"]
        for kernel in kernels
        for buffer in kernel["buffers"].values()
    )
    return lines * LINE / 1e6


def stored_ratio(kernel: dict, share: float) -> float:
    """Bytes of the distinct lines of weights, scales and offsets read, over the bytes needed.

    Args:
        kernel: One entry of the report.
        share: Share of the stored rows that the kernel needs.
    """
    stored = [kernel["buffers"].get(name) for name in ("weight", "scales", "biases")]
    stored = [buffer for buffer in stored if buffer is not None]
    lines = sum(buffer["distinct_read_lines"] for buffer in stored)
    return lines * LINE / (share * sum(buffer["size_bytes"] for buffer in stored))


def gathers_per_token(expand: dict, vocab_size: int) -> float:
    """Values that expand reads at places found in the data, per token: words and logits."""
    size = {"words": 4, "logits": 2}
    read = {name: expand["buffers"][name]["read_bytes"] for name in size}
    return sum(read[name] / size[name] for name in size) / vocab_size


def table(kernel: dict) -> Table:
    """One kernel's figures."""
    title = (
        f"{kernel['kernel']}: dispatches {kernel['dispatches']}, threads "
        f"{kernel['threadgroups']:,} × {kernel['threads_per_threadgroup']}, barriers "
        f"{kernel['barriers']}, threadgroup memory {kernel['threadgroup_memory_bytes']:,} B"
    )
    headings = ("buffer", "size", "read", "distinct", "lines", "written", "lines")
    drawn = new_table(title, headings)
    for buffer, counts in kernel["buffers"].items():
        drawn.add_row(buffer, *(f"{value:,}" if value else "" for value in counts.values()))
    return drawn


def summary(report: dict) -> str:
    """The traffic of a step beside the dense head's."""
    return (
        f"Distinct lines, read and written: full logits {report['full_logits_mb']:.2f} MB and "
        f"greedy token {report['greedy_token_mb']:.2f} MB, in 4 dispatches each; dense "
        f"{report['dense_mb']:.2f} MB in 1.\nLines read over bytes needed: route "
        f"{report['route_lines_over_bytes']:.3f}, score {report['score_lines_over_bytes']:.3f}.\n"
        f"Gathers of expand: {report['expand_gathers_per_token']:.2f} per token."
    )


def make_report(vocab_size: int, hidden_size: int, bits: int, n_probes: int) -> dict:
    """All figures of one head."""
    kernels = count(random_head(vocab_size, hidden_size, bits), n_probes)
    dense_kernel = dense(vocab_size, hidden_size, bits)
    n_clusters = vocab_size // CLUSTER_SIZE
    named = {kernel["kernel"]: kernel for kernel in kernels}
    common = [named[name] for name in ("route", "score")]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "n_clusters": n_clusters,
        "cluster_size": CLUSTER_SIZE,
        "n_probes": n_probes,
        "head_bits": bits,
        "sampled": False,
        "kernels": [*kernels, dense_kernel],
        "full_logits_mb": lines_mb([*common, named["select_words"], named["expand"]]),
        "greedy_token_mb": lines_mb([*common, named["select"], named["sample"]]),
        "dense_mb": lines_mb([dense_kernel]),
        "route_lines_over_bytes": stored_ratio(named["route"], 1.0),
        "expand_gathers_per_token": gathers_per_token(named["expand"], vocab_size),
        "score_lines_over_bytes": stored_ratio(named["score"], n_probes / n_clusters),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the memory traffic of the Metal kernels.")
    parser.add_argument("--head-bits", type=int, choices=(4, 8, 16), default=4)
    parser.add_argument("--n-probes", type=int, default=256, help="clusters scored (default: 256)")
    parser.add_argument("--model", choices=SHAPES, action="append", help="only this head's shape")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    arguments = parser.parse_args()
    names = arguments.model or list(SHAPES)
    fewest = min(SHAPES[name][0] // CLUSTER_SIZE for name in names)
    if not 1 <= arguments.n_probes <= fewest:
        parser.error(f"--n-probes is {arguments.n_probes}: choose 1 to {fewest}.")
    sys.path.insert(0, str(TESTS))
    reports = {}
    try:
        for name in track(names, "Counting", console=Console(stderr=True), transient=True):
            reports[name] = make_report(*SHAPES[name], arguments.head_bits, arguments.n_probes)
    except RuntimeError as error:  # no compiler, or a machine the emulator does not run on
        parser.error(str(error))
    for name, report in reports.items():
        sizes = f"V={report['vocab_size']:,}, D={report['hidden_size']:,}"
        show(f"{name}: {sizes}, C={report['n_clusters']:,}, p={report['n_probes']}\n")
        show(*map(table, report["kernels"]), f"{summary(report)}\n")
    show(
        "Bytes; a line is 128 bytes. All threadgroups ran on the emulator with random weights. The "
        "dense kernel's figures follow from its definition."
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
