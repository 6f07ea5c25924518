"""Lists the FlashHeads cached on this machine, removes, measures or builds some."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .common.arguments import Parser
from .common.command import command, printable, sentence
from .common.tables import megabytes, new_table, show

# mlx-lm takes seconds to import, and --help none.
if TYPE_CHECKING:
    from .loading.cached import Entry

NAME = "ID_OR_MODEL"
NO_SPEED = "–"


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.cache``."""
    parser = Parser(
        prog="mlx_flashhead.cache",
        description="List the FlashHeads, finer heads and MTP layers that are kept on this machine "
        "since the first use of a model, remove some, measure their speed, or build one. They are "
        "in $MLX_FLASHHEAD_HOME or ~/.cache/mlx_flashhead.",
    )
    group = parser.add_mutually_exclusive_group()
    remove = "Remove what is kept for these models, or under identifiers that begin like this."
    group.add_argument("--remove", nargs="+", metavar=NAME, help=remove)
    group.add_argument("--remove-all", action="store_true", help="Remove everything.")
    build = "Build the FlashHead of a model now, if there is none."
    group.add_argument("--build", metavar="MODEL", help=build)
    rebuild = "Build the FlashHead of a model anew. The old one stays until the new one is whole."
    group.add_argument("--rebuild", metavar=NAME, help=rebuild)
    measure = "Measure the speed of a model's FlashHead now (without a value: of every FlashHead)."
    group.add_argument("--measure", nargs="?", const="", metavar=NAME, help=measure)
    trust = "Run the model's own Python code, to measure or to build."
    parser.add_argument("--trust-remote-code", action="store_true", help=trust)
    return parser


@command
def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    from .loading.cached import entries
    from .models.fetch import resolve

    cached = entries()
    if args.build is not None:
        _build(resolve(args.build), args.trust_remote_code, anew=False)
    elif args.rebuild is not None:
        _build(_folder(cached, args.rebuild), args.trust_remote_code, anew=True)
    elif args.remove:
        _remove([head for name in args.remove for head in _matches(cached, name)])
    elif args.remove_all:
        _remove_all(cached)
    else:
        if args.measure is not None:
            _measure(cached, args.measure, args.trust_remote_code)
        print_heads(cached)


def print_heads(cached: "Sequence[Entry]") -> None:
    """Prints the cache as one table."""
    from .models.fetch import home

    if not cached:
        print(f"No FlashHead is kept in {home()}.")
        return
    title = printable(f"{home()}: {megabytes(sum(head.nbytes for head in cached))}")
    table = new_table(title, ("id", "model", "built", "size", "speed here"), left=3)
    for head in cached:
        table.add_row(*_row(head))
    show(table)


def _row(head: "Entry") -> tuple[str, ...]:
    """The cells of a cache entry."""
    from .loading.cached import speeds_of
    from .loading.gain_sentences import speed_text
    from .loading.tuned import read

    model = printable(head.model)
    if head.is_fine_head:
        model += f", head of {head.path.stem.rpartition('-')[2]} bits"
    elif head.is_drafter:
        model += ", MTP layer"
    built = time.strftime("%Y-%m-%d", time.localtime(head.path.stat().st_mtime))
    speeds = ""
    if head.config is not None:
        if head.config.calibration.get("cut_short"):
            built += ", cut short"
        # There is one for each dtype and version of MLX.
        known = read(speeds_of(head.config)).values()
        speeds = ", ".join(dict.fromkeys(map(speed_text, known)))
    return head.path.name[:8], model, built, megabytes(head.nbytes), speeds or NO_SPEED


def _remove(chosen: "Sequence[Entry]") -> None:
    for head in {head.path: head for head in chosen}.values():
        nbytes = head.nbytes
        line = f"Removed {head.model} ({head.path.name}, {megabytes(nbytes)})"
        if not head.remove():
            line += ", but other files in it stay"
        print(printable(line))


def _remove_all(cached: "Sequence[Entry]") -> None:
    from .loading.cached import remove_rest

    if cached:
        _remove(cached)
    else:
        print_heads(cached)
    for path in remove_rest():
        print(printable(f"Left {path}, which belongs to no FlashHead."))


def _matches(cached: "Sequence[Entry]", name: str, *, needed: bool = True) -> "list[Entry]":
    """The cache entries of a model, or of the beginning of an identifier."""
    matches = [head for head in cached if head.model == name]
    if not matches and name:
        matches = [head for head in cached if head.path.name.startswith(name)]
    if len({head.model for head in matches}) > 1:
        raise ValueError(
            f"{len(matches)} identifiers begin with {name}: give more characters of one."
        )
    if needed and not matches:
        raise ValueError(f"No FlashHead of {name!r} is kept: `mlx_flashhead.cache` lists them.")
    return matches


def _folder(cached: "Sequence[Entry]", name: str) -> Path:
    """The folder of the model that is named, by itself or by its cache entry."""
    from .models.fetch import resolve

    if not Path(name).is_dir():
        matches = _matches(cached, name, needed=False)
        if matches:
            name = matches[0].model
    return resolve(name)


def _build(folder: Path, trust_remote_code: bool, *, anew: bool) -> None:
    """Builds and measures a model's FlashHead, anew or unless there is one."""
    from .index.files import has_flash_head
    from .loading.builds import build_now
    from .loading.cached import check_writable
    from .loading.head_options import HeadOptions
    from .loading.sources import find
    from .models.loading import load_dense
    from .models.locate import find_head
    from .models.origin import local_origin

    if has_flash_head(folder):
        remedy = "nothing is to be built"
        if anew:
            remedy = "make it again with mlx_flashhead.convert"
        raise ValueError(
            f"{folder} has a FlashHead of its own, which comes before one that is kept: {remedy}."
        )
    check_writable()
    options = HeadOptions(flags=True)
    model, tokenizer, _ = load_dense(folder, trust_remote_code=trust_remote_code)
    if not anew:
        stored = find(find_head(model).rows(), options.say)
        if stored is not None:
            name = local_origin(folder).known_as
            print(printable(f"The FlashHead of {name} is kept in {stored.source} already."))
            return
    built = build_now(model, tokenizer, folder, options, anew=anew)
    if not Path(built.source).is_dir():
        # Why it is not kept has been said.
        sys.exit(2)


def _measure(cached: "Sequence[Entry]", name: str, trust_remote_code: bool) -> None:
    """Measures the speed of a model's FlashHead; without a name, of all cached ones."""
    from .loading.head_options import REFUSE, HeadOptions
    from .loading.load import load_with_head

    options = HeadOptions(missing=REFUSE, measures=True, flags=True)
    models = [name]
    if not name:
        models = sorted({entry.model for entry in cached if entry.config})
    for model in models:
        try:
            load_with_head(_folder(cached, model), options, trust_remote_code=trust_remote_code)
        except ValueError as error:
            if name:
                raise
            print(printable(f"{model} is not measured: {sentence(error)}"))


if __name__ == "__main__":
    main()
