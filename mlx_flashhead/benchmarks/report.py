"""The report of a benchmark: its rounds on the screen, then its table, its file and its picture.

A benchmark that is stopped, by Ctrl-C or SIGTERM, reports the rounds that it has.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ..common.arguments import whole_number
from ..common.command import check_writable
from ..common.pictures import check_picture, pyplot
from ..common.tables import Table, show
from ..loading.look_up import add_look_up_options
from .machine import machine
from .rounds import Round

Bars = tuple[str, str, dict[str, float]]
ANY_MODEL = "Folder or repository of any model that mlx-lm loads."
REPORT = """\
Please send this to the project as an issue, with the template "Benchmark":

```json
{figures}
```"""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the kinds that need a model."""
    parser.add_argument("--model", required=True, help=ANY_MODEL)
    add_look_up_options(parser)
    add_number(parser, "--n-probes", None, "Clusters scored (default: the model's own).")


def add_number(parser: argparse.ArgumentParser, flag: str, default: int | None, text: str) -> None:
    """Adds a flag for a whole number of 1 or more, whose text names the default if it is None."""
    text = text if default is None else f"{text} (default: {default})."
    parser.add_argument(flag, type=whole_number(1), default=default, help=text)


def add_report_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the flags of all kinds that measure."""
    add_number(parser, "--rounds", rounds, "Rounds that count")
    parser.add_argument("--json", metavar="OUT", help="Write the figures to a JSON file.")
    parser.add_argument("--plot", metavar="OUT.png", help="Draw the figures into a picture.")
    parser.add_argument(
        "--report", action="store_true", help="Print the figures as JSON, to be sent as an issue."
    )


def cells(spread: dict, decimals: int = 2) -> tuple[str, str]:
    """The median and the quartiles of a `Spread`."""
    median, *quartiles = (f"{spread[x]:.{decimals}f}" for x in ("median", "lower", "upper"))
    return median, "–".join(quartiles)


def report(
    args: argparse.Namespace,
    rounds: Iterable[Round],
    make_table: Callable[[dict], Table],
    bars: Callable[[dict], Bars],
    *,
    program: str = "mlx_flashhead.benchmark",
) -> None:
    """Runs a benchmark once its outputs have been found writable, and reports it.

    ``make_table`` makes the table of one result, and ``bars`` its picture: the title, the label of
    the axis, and the values by name.

    Raises:
        ValueError: If an output cannot be written, or the benchmark cannot be run.
    """
    if args.json:
        check_writable("--json", args.json)
    if args.plot:
        check_picture("--plot", args.plot)
    results: list[dict] = []
    stopped: BaseException | None = None
    start = 0.0
    try:
        for state in rounds:
            results, now = state.results, time.monotonic()
            start = start if state.done else now
            print(state.line(now - start), file=sys.stderr, flush=True)
    except (KeyboardInterrupt, SystemExit) as error:
        if not results:
            raise
        print("\nStopped: these are the figures so far.", file=sys.stderr, flush=True)
        stopped = error
    about = machine()
    figures = {
        "kind": args.kind,
        "machine": about,
        "command": " ".join([program, *sys.argv[1:]]),
        "complete": stopped is None,
        "results": results,
    }
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    show(
        *map(make_table, results),
        f"{about['processor']}, {about['cores']} cores, {about['blas']}; {about['system']}; "
        f"{versions}; {about['date']}",
    )
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    if args.plot:
        _draw(list(map(bars, results)), args.plot)
    if args.report:
        print(REPORT.format(figures=json.dumps(figures, indent=1)))
    if stopped is not None:
        raise stopped


def _draw(pictures: list[Bars], path: str) -> None:
    plt = pyplot()
    rows = [len(bars) for *_, bars in pictures]
    figure, axes = plt.subplots(
        len(rows), figsize=(8, 1 + sum(0.4 * n + 1 for n in rows)), layout="constrained",
        squeeze=False, height_ratios=rows,
    )  # fmt: skip
    for axis, (title, label, bars) in zip(axes[:, 0], pictures, strict=True):
        colors = ["tab:gray" if "dense" in name else "tab:blue" for name in bars]
        axis.bar_label(axis.barh(list(bars), list(bars.values()), color=colors), fmt=" %.2f")
        axis.set(title=title, xlabel=label)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.1)
    figure.savefig(path, dpi=110)
    plt.close(figure)
