"""Times functions in turns and reports a benchmark: tables, a JSON file, a picture, the machine.

A benchmark that is stopped reports what it has.
"""

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
# By name: a function of a round's number, which returns its seconds.
Timers = Mapping[str, Callable[[int], float]]


class Case(NamedTuple):
    """Variants that are timed in turns.

    Attributes:
        name: What the figures are of.
        timers: Time the variants.
        figures: Makes JSON-ready figures of the seconds of each variant's rounds.
    """

    name: str
    timers: Timers
    figures: Callable[[dict[str, list[float]]], dict[str, Any]]


def spread(values: Sequence[float], factor: float = 1) -> dict[str, Any]:
    """Median and quartiles of the values of some runs, JSON-ready.

    Args:
        values: One for each run.
        factor: Multiplies them.

    Returns:
        ``median``, ``lower`` and ``upper`` quartile, and the number of ``runs``.
    """
    lower, median, upper = (factor * float(x) for x in np.percentile(values, (25, 50, 75)))
    return {"median": median, "lower": lower, "upper": upper, "runs": len(values)}


def spread_cells(figures: dict[str, Any], decimals: int = 2) -> tuple[str, str]:
    """The median and the quartiles of a `spread`, as cells of a table.

    Args:
        figures: The `spread`.
        decimals: Digits after the point.
    """
    median = f"{figures['median']:.{decimals}f}"
    quartiles = f"{figures['lower']:.{decimals}f}–{figures['upper']:.{decimals}f}"
    return median, quartiles


def in_turns(timers: Timers, rounds: int) -> Iterator[dict[str, list[float]]]:
    """Measures in turns: a round 0 to warm up, then those that count.

    The order changes from round to round, since a run leaves caches behind.

    Args:
        timers: What is timed, by name.
        rounds: The number of rounds that count.

    Yields:
        After each round the seconds of the counted rounds so far, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    generator = random.Random(0)
    for number in range(rounds + 1):
        for name in generator.sample(list(timers), len(timers)):
            taken = timers[name](number)
            if number:
                seconds[name].append(taken)
        yield seconds


def write_report(
    args: argparse.Namespace,
    cases: Generator[Case | dict[str, Any]],
    make_table: Callable[[dict[str, Any]], Table],
    *,
    subject: str,
    command: str,
) -> None:
    """Times the cases and reports them, or those that it has when it is stopped.

    Prints a table of each case's figures, and writes the files that the flags name. The picture
    shows the first column of figures of each table.

    Args:
        args: The number of ``rounds``, and the files ``report`` and ``plot``.
        cases: What is timed, and what the JSON file has besides, as ``confirmed``.
        make_table: Makes a table of the figures of a case.
        subject: What the file says is measured, in a word.
        command: The command as it is typed, without its arguments.
    """
    confirmed: dict[str, Any] = {}
    measured: dict[str, dict[str, Any]] = {}
    complete = False
    try:
        with closing(cases):
            for case in cases:
                if isinstance(case, dict):
                    print(f"Confirmed: {', '.join(case)}", file=sys.stderr, flush=True)
                    confirmed |= case
                else:
                    _time_case(case, args.rounds, measured)
        complete = True
    finally:
        if measured:
            if not complete:
                print("\nStopped: these are the figures so far.", file=sys.stderr, flush=True)
            about = machine()
            tables = [make_table(figures) for figures in measured.values()]
            show(*tables, _machine_line(about))
            if args.report:
                report = {
                    "kind": subject,
                    "machine": about,
                    "command": " ".join([command, *sys.argv[1:]]),
                    "complete": complete,
                    "results": list(measured.values()),
                    "confirmed": confirmed,
                }
                Path(args.report).write_text(json.dumps(report, indent=2) + "\n")
            if args.plot:
                _plot_tables(tables, args.plot)


def _time_case(case: Case, rounds: int, measured: dict[str, dict[str, Any]]) -> None:
    """Times a case and keeps its figures in ``measured`` after each round that counts."""
    for number, seconds in enumerate(in_turns(case.timers, rounds)):
        # The first round warms up.
        if number == 0:
            continue
        measured[case.name] = case.figures(seconds)
        latest = [f"{variant} {1000 * times[-1]:.2f} ms" for variant, times in seconds.items()]
        progress = f"[{number} of {rounds}] {case.name}: {', '.join(latest)}"
        print(progress, file=sys.stderr, flush=True)


def _machine_line(about: dict[str, Any]) -> str:
    """The `machine` as the line under the tables."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    cores = f"{about['processor']}, {about['cores']} cores, {about['blas']}"
    return f"{cores}; {about['system']}; {versions}; {about['date']}"


def machine() -> dict[str, Any]:
    """The machine, JSON-ready: processor, memory, versions, BLAS."""
    versions = {"mlx-flashhead": __version__}
    for package in PACKAGES:
        versions[package] = version(package)
    versions["python"] = platform.python_version()
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.release()}",
        "processor": str(mx.device_info(mx.Device(mx.cpu, 0))["device_name"]),
        "cores": _cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": mx.default_device().type.name,
        "versions": versions,
        "blas": _blas(),
    }
    if mx.metal.is_available():
        about["gpu"] = {key: str(value) for key, value in mx.device_info().items()}
    return about


def _cores() -> int | None:
    """The cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _blas() -> str:
    """The library that multiplies matrices on the CPU."""
    # One that is preloaded comes first.
    if hasattr(ctypes.CDLL(None), "openblas_get_config"):
        return "OpenBLAS"
    if sys.platform == "darwin":
        return "Accelerate"
    return "the reference BLAS of the mlx wheel"


def _plot_tables(tables: list[Table], path: str) -> None:
    """Draws the first column of figures of each table as bars."""
    # It may be absent.
    from matplotlib.figure import Figure

    rows = [table.row_count for table in tables]
    height = 1 + sum(0.4 * n_rows + 1 for n_rows in rows)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False, height_ratios=rows)
    for axis, table in zip(axes[:, 0], tables, strict=True):
        names = list(table.columns[0].cells)
        values = [float(str(value)) for value in table.columns[1].cells]
        bars = axis.barh(names, values)
        axis.bar_label(bars, fmt=" %.2f")
        axis.set(title=fill(str(table.title), 75), xlabel=table.columns[1].header)
        axis.invert_yaxis()
        axis.margins(x=0.1)
    figure.savefig(path, dpi=110)
