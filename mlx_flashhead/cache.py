"""Lists the FlashHeads that were built on this machine, and removes some."""

import time

from .common.arguments import Parser
from .common.command import command
from .common.quantities import percent
from .common.tables import new_table, show
from .loading.cache import HOME_VARIABLE, Entry, entries, home, remove


def make_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_flashhead.cache",
        description="List the FlashHeads that were built on this machine at the first use of a "
        f"model. They are kept in ${HOME_VARIABLE} or ~/.cache/mlx_flashhead.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--remove",
        nargs="+",
        metavar="ID_OR_MODEL",
        help="Remove the FlashHeads of these identifiers, beginnings of them, or models.",
    )
    what.add_argument("--remove-all", action="store_true", help="Remove all of them.")
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.cache``."""
    args = make_parser().parse_args()
    kept = entries()
    if not args.remove and not args.remove_all:
        print_entries(kept)
        return
    chosen = _chosen(kept, args.remove) if args.remove else kept
    if not chosen:
        print_entries(chosen)
    for entry in chosen:
        nbytes = entry.nbytes
        remove(entry)
        print(f"Removed {_model(entry)} ({entry.folder.name}, {_size(nbytes)})")


def print_entries(kept: list[Entry]) -> None:
    """Prints the kept FlashHeads as one table."""
    if not kept:
        print(f"No FlashHead is kept in {home()}.")
        return
    table = new_table(
        f"{home()}: {_size(sum(entry.nbytes for entry in kept))}",
        ("model", "id", "built", "size", "probes", "agreement"),
        left=3,
    )
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"  # some names are long
    for entry in kept:
        config = entry.config
        agreement = config.report.get("agreement") if config else None
        table.add_row(
            _model(entry),
            entry.folder.name[:8],
            time.strftime("%Y-%m-%d", time.localtime(entry.built_at)),
            _size(entry.nbytes),
            f"{config.n_probes:,} of {config.n_clusters:,}" if config else "–",
            "–" if agreement is None else percent(agreement),
        )
    show(table)


def _chosen(kept: list[Entry], names: list[str]) -> list[Entry]:
    chosen = []
    for name in names:
        found = [entry for entry in kept if _model(entry) == name]
        found = found or [e for e in kept if name and e.folder.name.startswith(name)]
        if not found:
            raise ValueError(f"No FlashHead of {name!r} is kept: `mlx_flashhead.cache` lists them.")
        if len({_model(entry) for entry in found}) > 1:
            raise ValueError(
                f"The identifiers of {len(found)} models begin with {name}: give more of one."
            )
        chosen += [entry for entry in found if entry not in chosen]
    return chosen


def _model(entry: Entry) -> str:
    return entry.config.recipe.get("model", "unknown") if entry.config else "damaged"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
