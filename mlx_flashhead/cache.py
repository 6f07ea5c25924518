"""Lists the FlashHeads that were built on this machine, removes some, and builds one anew."""

import math
import time
from pathlib import Path

from .common.arguments import Parser
from .common.command import command, printable
from .common.tables import megabytes, new_table, show
from .index.files import has_flash_head
from .loading.background import BackgroundBuild
from .loading.head_cache import Entry, entries, remove, speeds_of
from .loading.sources import HeadOptions
from .loading.tuned import read
from .lossless.tuning import Tuning
from .models.dense import load_dense
from .models.fetch import HOME_VARIABLE, home, resolve


def make_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_flashhead.cache",
        description="List the FlashHeads that were built on this machine at the first use of a "
        "model, remove some, or build one anew. They are kept in "
        f"${HOME_VARIABLE} or ~/.cache/mlx_flashhead.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--remove",
        nargs="+",
        metavar="ID_OR_MODEL",
        help="Remove the FlashHeads of these identifiers, beginnings of them, or models.",
    )
    what.add_argument("--remove-all", action="store_true", help="Remove all of them.")
    what.add_argument(
        "--rebuild",
        metavar="ID_OR_MODEL",
        help="Build the FlashHead of a model (a folder or a repository) anew, such as one that was "
        "cut short on a busy machine. The old one stays until the new one is whole.",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Allow the code of a model that is built anew.",
    )
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.cache``."""
    args = make_parser().parse_args()
    kept = entries()
    if args.rebuild is not None:
        _rebuild(kept, args.rebuild, args.trust_remote_code)
        return
    if not args.remove and not args.remove_all:
        print_entries(kept)
        return
    chosen = _chosen(kept, args.remove) if args.remove else kept
    if not chosen:
        print_entries(chosen)
    for entry in chosen:
        nbytes = entry.nbytes
        remove(entry)
        print(printable(f"Removed {_model(entry)} ({entry.folder.name}, {megabytes(nbytes)})"))


def print_entries(kept: list[Entry]) -> None:
    """Prints the kept FlashHeads as one table."""
    if not kept:
        print(f"No FlashHead is kept in {home()}.")
        return
    table = new_table(
        printable(f"{home()}: {megabytes(sum(entry.nbytes for entry in kept))}"),
        ("id", "model", "built", "size", "probes", "speed here"),
        left=3,
    )
    table.columns[1].no_wrap, table.columns[1].overflow = False, "fold"  # some names are long
    for entry in kept:
        config = entry.config
        table.add_row(
            printable(entry.folder.name[:8]),
            printable(_model(entry)),
            time.strftime("%Y-%m-%d", time.localtime(entry.built_at))
            + (", cut short" if config and config.calibration.get("cut_short") else ""),
            megabytes(entry.nbytes),
            f"{config.n_probes:,} of {config.n_clusters:,}" if config else "–",
            _speeds(entry),
        )
    show(table)


def _speeds(entry: Entry) -> str:
    """What was measured on this machine, for each dtype and version of MLX."""
    speeds = read(speeds_of(entry.folder.name.split("-")[0]))
    return ", ".join(dict.fromkeys(map(_speed, speeds.values()))) or "–"


def _speed(tuning: Tuning) -> str:
    return f"{tuning.gain:.2f} x{', dense' if tuning.dense else ''}"


def _rebuild(kept: list[Entry], name: str, trust_remote_code: bool) -> None:
    """Builds the FlashHead of a model anew, in the place of a kept one."""
    matches = [] if Path(name).is_dir() else _matches(kept, name)
    folder = resolve(_model(matches[0]) if matches else name)
    if has_flash_head(folder):
        raise ValueError(
            f"{folder} has a FlashHead of its own, which comes before one that is kept: make it "
            "again with mlx_flashhead.convert."
        )
    model, tokenizer, _ = load_dense(folder, trust_remote_code=trust_remote_code)
    options = HeadOptions(flags=True)
    build = BackgroundBuild(model, tokenizer, folder, options, math.inf, anew=True)
    build.finish()


def _chosen(kept: list[Entry], names: list[str]) -> list[Entry]:
    chosen: list[Entry] = []
    for name in names:
        matches = _matches(kept, name)
        if not matches:
            raise ValueError(f"No FlashHead of {name!r} is kept: `mlx_flashhead.cache` lists them.")
        chosen += [entry for entry in matches if entry not in chosen]
    return chosen


def _matches(kept: list[Entry], name: str) -> list[Entry]:
    """The entries of a model, or of the beginning of an identifier."""
    matches = [entry for entry in kept if _model(entry) == name]
    matches = matches or [e for e in kept if name and e.folder.name.startswith(name)]
    if len({_model(entry) for entry in matches}) > 1:
        raise ValueError(
            f"The identifiers of {len(matches)} models begin with {name}: give more of one."
        )
    return matches


def _model(entry: Entry) -> str:
    return str(entry.config.recipe.get("model", "unknown")) if entry.config else "damaged"


if __name__ == "__main__":
    main()
