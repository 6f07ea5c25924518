"""Measures how a head's cost grows with V, D, p and the batch, for `plots.py`.

    python scripts/growth.py [--json docs/benchmarks/growth.json] [--rounds 10]

It measures random float32 heads as `python -m mlx_flashhead.benchmark head` does: with cold caches
and in turns. Use an idle machine, one thread and OpenBLAS for figures to publish.
"""

import argparse
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(CHECKOUT)  # works uninstalled too

from mlx_flashhead.benchmarks.head import head_benchmark, random_head
from mlx_flashhead.benchmarks.machine import machine
from mlx_flashhead.common.command import check_writable, command

USUAL = {"vocab_size": 131072, "hidden_size": 1024, "n_probes": 256, "n_positions": 1}
AXES = {
    "vocab_size": (32768, 65536, 131072, 262144),
    "hidden_size": (512, 1024, 2048),
    "n_probes": (64, 128, 256, 512, 1024, 2048),
    "n_positions": (1, 2, 4, 8, 16, 32),
}


def measure_growth(usual: dict, axes: dict, rounds: int, progress: bool = True) -> list[dict]:
    """Times heads along each axis, everything else at its usual value.

    Args:
        usual: A value for each of ``AXES``.
        axes: By name, the values to measure.
        rounds: Runs that count.
        progress: Show a bar.

    Returns:
        For each point the result of ``head_benchmark`` and the name of the axis.
    """
    points = [(axis, usual | {axis: value}) for axis, values in axes.items() for value in values]
    results, built, head = [], None, None
    for axis, point in tqdm(points, desc="Measuring growth", disable=not progress):
        shape = (point["vocab_size"], point["hidden_size"])
        if shape != built:
            del head  # two at once may not fit into memory
            head, built = random_head(*shape, n_probes=1), shape
        head.n_probes = point["n_probes"]
        states = np.random.default_rng(0).normal(size=(64, shape[1])).astype(np.float32)
        measured = head_benchmark(
            head, mx.array(states), n_positions=point["n_positions"], rounds=rounds, progress=False
        )
        results.append({"axis": axis} | measured)
    return results


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--json", default="docs/benchmarks/growth.json", help="default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    check_writable("--json", args.json)
    about = machine()
    results = measure_growth(USUAL, AXES, args.rounds)
    found = {"kind": "growth", "machine": about, "usual": USUAL, "results": results}
    Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
