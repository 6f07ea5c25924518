"""Lists the FlashHeads cached on this machine, removes, measures or builds some anew."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .common.arguments import Parser
from .common.command import command, printable, sentence
from .common.tables import megabytes, new_table, show

if TYPE_CHECKING:  # mlx-lm takes seconds to import, and --help none
    from .loading.sources import Entry


def make_parser() -> Parser:
    parser = Parser(
        prog="mlx_flashhead.cache",
        description="List the FlashHeads and finer heads that are kept on this machine since the "
        "first use of a model, remove some, measure their speed, or build one anew. They are in "
        "$MLX_FLASHHEAD_HOME or ~/.cache/mlx_flashhead.",
    )
    group, name = parser.add_mutually_exclusive_group(), "ID_OR_MODEL"
    remove = "Remove what is kept of these identifiers, beginnings of them, or models."
    group.add_argument("--remove", nargs="+", metavar=name, help=remove)
    group.add_argument("--remove-all", action="store_true", help="Remove all of it.")
    rebuild = "Build the FlashHead of a model anew. The old one stays until the new one is whole."
    group.add_argument("--rebuild", metavar=name, help=rebuild)
    measure = "Measure the speed of a model's FlashHead now (default: of all that are kept)."
    group.add_argument("--measure", nargs="?", const="", metavar=name, help=measure)
    trust = "Allow the code of a model that is measured or built anew."
    parser.add_argument("--trust-remote-code", action="store_true", help=trust)
    return parser


@command
def main() -> None:
    args = make_parser().parse_args()
    from .loading import sources

    cached = sources.entries()
    if args.rebuild is not None:
        _rebuild(cached, args.rebuild, args.trust_remote_code)
    elif args.remove:
        _remove([head for name in args.remove for head in _matches(cached, name)])
    elif args.remove_all and cached:
        _remove(cached)
    else:
        if args.measure is not None:
            _measure(cached, args.measure, args.trust_remote_code)
        print_heads(cached)
    for path in sources.remove_rest() if args.remove_all else ():
        print(printable(f"Left {path}, which is none of them."))


def print_heads(cached: "Sequence[Entry]") -> None:
    """Prints the cache as one table."""
    from .loading.sources import speeds_of
    from .loading.tuned import read, speed_text
    from .models.fetch import home

    if not cached:
        print(f"No FlashHead is kept in {home()}.")
        return
    title = printable(f"{home()}: {megabytes(sum(head.nbytes for head in cached))}")
    table = new_table(title, ("id", "model", "built", "size", "speed here"), left=3)
    for head in cached:
        model, speeds = printable(head.model), "–"
        built = time.strftime("%Y-%m-%d", time.localtime(head.path.stat().st_mtime))
        if head.is_fine_head:
            model += f", head of {head.path.stem.rpartition('-')[2]} bits"
        else:  # for each dtype and version of MLX
            known = read(speeds_of(head.key)).values()
            speeds = ", ".join(dict.fromkeys(map(speed_text, known))) or speeds
        if head.config and head.config.calibration.get("cut_short"):
            built += ", cut short"
        table.add_row(head.key[:8], model, built, megabytes(head.nbytes), speeds)
    show(table)


def _remove(chosen: "Sequence[Entry]") -> None:
    for head in {head.path: head for head in chosen}.values():
        nbytes = head.nbytes
        others = "" if head.remove() else ", but other files in it"
        print(printable(f"Removed {head.model} ({head.path.name}, {megabytes(nbytes)}){others}"))


def _matches(cached: "Sequence[Entry]", name: str, *, needed: bool = True) -> "list[Entry]":
    """The cache entries of a model, or of the beginning of an identifier."""
    matches = [head for head in cached if head.model == name]
    matches = matches or [head for head in cached if name and head.path.name.startswith(name)]
    if len({head.model for head in matches}) > 1:
        raise ValueError(f"{len(matches)} identifiers begin with {name}: give more of one.")
    if needed and not matches:
        raise ValueError(f"No FlashHead of {name!r} is kept: `mlx_flashhead.cache` lists them.")
    return matches


def _folder(cached: "Sequence[Entry]", name: str) -> Path:
    """The folder of the model that is named, by itself or by its cache entry."""
    from .models.fetch import resolve

    matches = [] if Path(name).is_dir() else _matches(cached, name, needed=False)
    return resolve(matches[0].model if matches else name)


def _rebuild(cached: "Sequence[Entry]", name: str, trust_remote_code: bool) -> None:
    from .index.files import has_flash_head
    from .loading.background import build_now
    from .loading.head_options import HeadOptions
    from .models.loading import load_dense

    folder = _folder(cached, name)
    if has_flash_head(folder):
        wrong = f"{folder} has a FlashHead of its own, which comes before one that is kept"
        raise ValueError(f"{wrong}: make it again with mlx_flashhead.convert.")
    model, tokenizer, _ = load_dense(folder, trust_remote_code=trust_remote_code)
    build_now(model, tokenizer, folder, HeadOptions(flags=True), anew=True)


def _measure(cached: "Sequence[Entry]", name: str, trust_remote_code: bool) -> None:
    """Measures the speed of a model's FlashHead; without a name, of all cached ones."""
    from .loading.head_options import REFUSE, HeadOptions
    from .loading.load import load_with_head

    options = HeadOptions(missing=REFUSE, measures=True, flags=True)
    for each in [name] if name else sorted({entry.model for entry in cached if entry.config}):
        try:
            load_with_head(_folder(cached, each), options, trust_remote_code=trust_remote_code)
        except ValueError as error:
            if name:
                raise
            print(printable(f"{each} is not measured: {sentence(error)}"))


if __name__ == "__main__":
    main()
