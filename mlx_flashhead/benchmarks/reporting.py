"""Times functions in turns, and reports a benchmark, or what it has when it is stopped: tables, a
JSON file, a picture, the machine."""

import argparse
import ctypes
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from rich.table import Table

from ..common.tables import show
from ..version import __version__

PACKAGES = ("mlx", "mlx-lm", "numpy")
Timers = Mapping[str, Callable[[int], float]]  # by name; the seconds of a round of that number


class Case(NamedTuple):
    """Forms that are timed in turns; ``figures`` makes JSON-ready ones of the seconds by form."""

    name: str
    timers: Timers
    figures: Callable[[dict[str, list[float]]], dict]


def spread(values: Sequence[float], factor: float = 1) -> dict:
    """Median and quartiles of some runs, times a factor, and their number, JSON-ready."""
    lower, median, upper = (factor * float(x) for x in np.percentile(values, (25, 50, 75)))
    return {"median": median, "lower": lower, "upper": upper, "runs": len(values)}


def cells(spread: dict, decimals: int = 2) -> tuple[str, str]:
    """The median and the quartiles of a `spread`."""
    median, *quartiles = (f"{spread[x]:.{decimals}f}" for x in ("median", "lower", "upper"))
    return median, "–".join(quartiles)


def in_turns(timers: Timers, rounds: int) -> Iterator[dict[str, list[float]]]:
    """Measures in turns: a round 0 to warm up, then ``rounds`` that count. Yields after each round
    the seconds of the counted rounds so far, by name. The order changes, since a run leaves caches
    behind."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    draw = random.Random(0)
    for number in range(rounds + 1):
        for name in draw.sample(list(timers), len(timers)):
            taken = timers[name](number)
            if number:
                seconds[name].append(taken)
        yield seconds


def report(
    args: argparse.Namespace, cases: Generator[Case], make_table: Callable[[dict], Table]
) -> None:
    """Times the cases, and reports what it has: a table of each one's figures, the files that
    ``args`` names, and a picture of the first column of figures of each table."""
    measured: dict[str, dict] = {}
    complete = False
    try:
        with closing(cases):
            for case in cases:
                for number, seconds in enumerate(in_turns(case.timers, args.rounds)):
                    if number:  # the first one warms up
                        measured[case.name] = case.figures(seconds)
                        latest = [f"{form} {1000 * s[-1]:.2f} ms" for form, s in seconds.items()]
                        progress = f"[{number} of {args.rounds}] {case.name}: {', '.join(latest)}"
                        print(progress, file=sys.stderr, flush=True)
        complete = True
    finally:
        if measured:
            if not complete:
                print("\nStopped: these are the figures so far.", file=sys.stderr, flush=True)
            about, tables = machine(), [*map(make_table, measured.values())]
            versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
            cores = f"{about['processor']}, {about['cores']} cores, {about['blas']}"
            show(*tables, f"{cores}; {about['system']}; {versions}; {about['date']}")
            if args.report:
                command = " ".join(["mlx_flashhead.benchmark", *sys.argv[1:]])
                figures = {"kind": args.kind, "machine": about, "command": command}
                figures |= {"complete": complete, "results": [*measured.values()]}
                Path(args.report).write_text(json.dumps(figures, indent=2) + "\n")
            if args.plot:
                _draw(tables, args.plot)


def machine() -> dict:
    """The machine, JSON-ready: processor, memory, versions, BLAS."""
    blas = "Accelerate" if sys.platform == "darwin" else "the reference BLAS of the mlx wheel"
    if hasattr(ctypes.CDLL(None), "openblas_get_config"):  # preloaded
        blas = "OpenBLAS"
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.release()}",
        "processor": str(mx.device_info(mx.Device(mx.cpu, 0))["device_name"]),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": "cpu" if mx.default_device().type == mx.cpu else "gpu",
        "versions": {"mlx-flashhead": __version__} | {name: version(name) for name in PACKAGES},
        "blas": blas,
    }
    about["versions"]["python"] = platform.python_version()
    if mx.metal.is_available():
        about["gpu"] = {key: str(value) for key, value in mx.device_info().items()}
    return about


def _draw(tables: list[Table], path: str) -> None:
    from matplotlib.figure import Figure  # which may be absent

    rows = [table.row_count for table in tables]
    figure = Figure(figsize=(8, 1 + sum(0.4 * n + 1 for n in rows)), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False, height_ratios=rows)
    for axis, table in zip(axes[:, 0], tables, strict=True):
        names, values = (list(column.cells) for column in table.columns[:2])
        bars = axis.barh(names, [float(str(value)) for value in values])
        axis.bar_label(bars, fmt=" %.2f")
        axis.set(title=fill(str(table.title), 75), xlabel=table.columns[1].header)
        axis.invert_yaxis()
        axis.margins(x=0.1)
    figure.savefig(path, dpi=110)
