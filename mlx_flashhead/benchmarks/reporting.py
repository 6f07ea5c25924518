"""Times functions in turns, and reports a benchmark: tables, a JSON file, a picture, the machine.

A benchmark that is stopped by Ctrl-C or SIGTERM reports the rounds that it has.
"""

import argparse
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
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from ..common.command import check_writable
from ..common.tables import Table, check_picture, pyplot, show
from ..head.steps import blas_name
from ..version import __version__

PACKAGES = ("mlx", "mlx-lm", "numpy")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
Item = TypeVar("Item")


class Case(NamedTuple):
    """Forms that are timed in turns: by name, functions of the round's number that return seconds.

    ``figures`` makes JSON-ready ones of the seconds by form.
    """

    name: str
    timers: Mapping[str, Callable[[int], float]]
    figures: Callable[[dict[str, list[float]]], dict]


def spread(values: Sequence[float], factor: float = 1) -> dict:
    """Median and quartiles of some runs, and their number, JSON-ready.

    In other units by ``factor``, such as 1000 for milliseconds of seconds.
    """
    lower, median, upper = (factor * float(x) for x in np.percentile(values, (25, 50, 75)))
    return {"median": median, "lower": lower, "upper": upper, "runs": len(values)}


def timer(
    run: Callable[[int], object], before: Callable[[], None] | None = None
) -> Callable[[int], float]:
    """A function of the round's number that measures another one, ``before`` outside the time.

    Arrays in the result of ``run`` are evaluated within the time.
    """

    def seconds(number: int) -> float:
        if before is not None:
            before()
        start = time.perf_counter()
        mx.eval(run(number))
        return time.perf_counter() - start

    return seconds


def in_turns(
    timers: Mapping[Item, Callable[[int], float]], rounds: int
) -> Iterator[dict[Item, list[float]]]:
    """Measures in turns: a round 0 to warm up, then ``rounds`` that count.

    The compared functions run once each in a round, so that a machine that heats up or shares its
    cores slows all of them alike. Each round has another order, since a run leaves its pages and
    caches behind. ``timers`` are functions of the round's number that return seconds. Yields after
    each round the seconds of the counted rounds so far, by name.
    """
    seconds: dict[Item, list[float]] = {name: [] for name in timers}
    draw = random.Random(0)
    for number in range(rounds + 1):
        for name in draw.sample(list(timers), len(timers)):
            taken = timers[name](number)
            if number:
                seconds[name].append(taken)
        yield seconds


def cells(spread: dict, decimals: int = 2) -> tuple[str, str]:
    """The median and the quartiles of a `spread`."""
    median, *quartiles = (f"{spread[x]:.{decimals}f}" for x in ("median", "lower", "upper"))
    return median, "–".join(quartiles)


def report(
    args: argparse.Namespace,
    cases: Generator[Case],
    n_cases: int,
    make_table: Callable[[dict], Table],
) -> None:
    """Runs a benchmark after checking that its outputs can be written, and reports it.

    ``make_table`` makes the table of a case's figures. A picture has the first column of figures of
    each table.

    Raises:
        ValueError: If an output cannot be written, or the benchmark cannot be run.
    """
    if args.report:
        check_writable("--report", args.report)
    if args.plot:
        check_picture("--plot", args.plot)
    measured: list[dict] = []
    stopped: BaseException | None = None
    try:
        with closing(cases):
            _run(cases, n_cases, args.rounds, measured)
    except (KeyboardInterrupt, SystemExit) as error:
        if not measured:
            raise
        _print("\nStopped: these are the figures so far.")
        stopped = error
    about, tables = machine(), list(map(make_table, measured))
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    cores = f"{about['processor']}, {about['cores']} cores, {about['blas']}"
    show(*tables, f"{cores}; {about['system']}; {versions}; {about['date']}")
    if args.report:
        figures = {
            "kind": args.kind,
            "machine": about,
            "command": " ".join(["mlx_flashhead.benchmark", *sys.argv[1:]]),
            "complete": stopped is None,
            "results": measured,
        }
        Path(args.report).write_text(json.dumps(figures, indent=2) + "\n")
        if mx.metal.is_available():
            _print(f"Please attach {args.report} to an issue of the project.")
    if args.plot:
        _draw(tables, args.plot)
    if stopped is not None:
        raise stopped


def _run(cases: Generator[Case], n_cases: int, rounds: int, measured: list[dict]) -> None:
    """Times one case after the other, and puts the figures of each into ``measured``."""
    done, total, began = 0, n_cases * (rounds + 1), 0.0
    for number, case in enumerate(cases):
        if not done:
            began = time.monotonic()
            _print(f"[{total} rounds] {case.name}: {', '.join(case.timers)}")
        for seconds in in_turns(case.timers, rounds):
            done += 1
            if not all(seconds.values()):
                _print(f"[{done} of {total}] {case.name}: warm")
                continue
            measured[number:] = [case.figures(seconds)]
            latest = (f"{form} {1000 * times[-1]:.2f}" for form, times in seconds.items())
            left = (time.monotonic() - began) / done * (total - done)
            duration = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
            _print(f"[{done} of {total}, {duration} left] {case.name}: {', '.join(latest)} ms")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def machine() -> dict:
    """The machine, JSON-ready: processor, memory, versions, BLAS, threads."""
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.release()}",
        "processor": str(mx.device_info(mx.Device(mx.cpu, 0))["device_name"]),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": "cpu" if mx.default_device().type == mx.cpu else "gpu",
        "versions": {
            "mlx-flashhead": __version__,
            **{name: version(name) for name in PACKAGES},
            "python": platform.python_version(),
        },
        "blas": blas_name(),
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }
    if mx.metal.is_available():
        about["gpu"] = {key: str(value) for key, value in mx.device_info().items()}
        memory = mx.ones((512 << 20) // 4)  # read by a reduction
        seconds = min(map(timer(lambda _: mx.max(memory)), range(6)))
        about["read_bandwidth_gb_s"] = memory.nbytes / seconds / 1e9
    return about


def _draw(tables: list[Table], path: str) -> None:
    plt = pyplot()
    rows = [table.row_count for table in tables]
    size = (8, 1 + sum(0.4 * n + 1 for n in rows))
    figure, axes = plt.subplots(
        len(rows), figsize=size, layout="constrained", squeeze=False, height_ratios=rows
    )
    for axis, table in zip(axes[:, 0], tables, strict=True):
        n_words = sum(column.justify == "left" for column in table.columns)
        *words, values = (list(column.cells) for column in table.columns[: n_words + 1])
        names = [", ".join(filter(None, row)) for row in zip(*words, strict=True)]
        colors = ["tab:gray" if "dense" in name else "tab:blue" for name in names]
        bars = axis.barh(names, [float(str(value)) for value in values], color=colors)
        axis.bar_label(bars, fmt=" %.2f")
        axis.set(title=fill(str(table.title), 75), xlabel=table.columns[n_words].header)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.1)
    figure.savefig(path, dpi=110)
    plt.close(figure)
