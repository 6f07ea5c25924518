"""Counts the memory traffic of the Metal kernels, per kernel and buffer.

    python scripts/kernel_report.py [--head-bits 4|8|16] [--n-probes 256] [--json FILE]

All threadgroups of the kernels run on the tests' emulator, at the head shapes of four models with
random weights. The report counts accesses, without an Apple GPU and without times, beside the bytes
of the dense head: its rows, the hidden state and the logits.
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

from mlx_flashhead.benchmarks.head_benchmark import CLUSTER_SIZE, random_head
from mlx_flashhead.common.tables import new_table, show
from mlx_flashhead.head.kernels import MetalSteps

TESTS = Path(__file__).resolve().parent.parent / "tests"

SHAPES = {  # vocab_size, hidden_size
    "Llama-3.2-1B": (128256, 2048),
    "Qwen3-0.6B": (151936, 1024),
    "Gemma-3-270M": (262144, 640),
    "SmolLM2-135M": (49152, 576),
}
LINE = 128


def make_report(vocab_size: int, hidden_size: int, bits: int, n_probes: int) -> dict:
    """The counts of each kernel in one decode step, for full logits and for the greedy token."""
    from metal_emulator import Emulator

    how = {"n_probes": n_probes, "dtype": mx.bfloat16, "bits": bits}
    clustered = random_head(vocab_size, hidden_size, **how).clustered
    n_clusters = vocab_size // CLUSTER_SIZE
    hidden = mx.random.normal((1, hidden_size)).astype(mx.bfloat16)
    with Emulator().installed() as emulator:
        steps = MetalSteps(clustered)
        scores = steps.route(hidden)
        selection = steps.select(scores, n_probes)
        candidates = steps.score(hidden, selection)
        steps.expand(scores, selection, candidates)
        steps.token(steps.select(scores, n_probes, words=False), candidates)
    kernels = {
        dispatch.name.removeprefix("flash_head_"): {
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
    }
    expanded = kernels["expand"]["buffers"]
    gathers = expanded["words"]["read_bytes"] / 4 + expanded["logits"]["read_bytes"] / 2
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "n_clusters": n_clusters,
        "cluster_size": CLUSTER_SIZE,
        "n_probes": n_probes,
        "head_bits": bits,
        "kernels": kernels,
        "full_logits_mb": lines_mb(kernels, "route", "score", "select_words", "expand"),
        "greedy_token_mb": lines_mb(kernels, "route", "score", "select", "sample"),
        "dense_mb": (clustered.rows.nbytes + 2 * hidden_size + 2 * vocab_size) / 1e6,
        "route_lines_over_bytes": stored_ratio(kernels["route"], 1.0),
        "score_lines_over_bytes": stored_ratio(kernels["score"], n_probes / n_clusters),
        "expand_gathers_per_token": gathers / vocab_size,
    }


def lines_mb(kernels: dict[str, dict], *names: str) -> float:
    """Megabytes of distinct lines that these kernels read and write."""
    lines = sum(
        buffer["distinct_read_lines"] + buffer["distinct_written_lines"]
        for name in names
        for buffer in kernels[name]["buffers"].values()
    )
    return lines * LINE / 1e6


def stored_ratio(kernel: dict, share: float) -> float:
    """Bytes of the distinct lines of rows read, over those of the ``share`` that is needed."""
    stored = [kernel["buffers"].get(name) for name in ("weight", "scales", "biases")]
    stored = [buffer for buffer in stored if buffer is not None]
    lines = sum(buffer["distinct_read_lines"] for buffer in stored)
    return lines * LINE / (share * sum(buffer["size_bytes"] for buffer in stored))


def table(name: str, kernel: dict) -> Table:
    """One kernel's figures."""
    title = (
        f"{name}: threads {kernel['threadgroups']:,} × {kernel['threads_per_threadgroup']}, "
        f"barriers {kernel['barriers']}, threadgroup memory "
        f"{kernel['threadgroup_memory_bytes']:,} B"
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
        tables = (table(*kernel) for kernel in report["kernels"].items())
        show(*tables, f"{summary(report)}\n")
    show("Bytes; a line is 128 bytes. All threadgroups ran on the emulator with random weights.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
