"""Measures the speed of a head, a model or servers."""

import argparse
import re
from importlib import import_module

from .benchmarks import SAMPLERS, SHAPES
from .common.arguments import Parser, whole_number, whole_numbers
from .common.command import command, from_extra
from .common.flags import add_source_options

ANY_MODEL = "Folder or repository of any model that mlx-lm loads."
CLIENTS = (1, 4, 8, 16)


def make_parser() -> Parser:
    """The command's arguments: a subcommand for each benchmark."""
    parser = Parser(prog="mlx_flashhead.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="kind", required=True, metavar="head|model|server")

    head = commands.add_parser("head", help="time a head by itself, on random weights too")
    what = head.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--shape",
        type=shape,
        action="append",
        metavar="NAME|V,D",
        help=f"Random weights of the shape {', '.join(SHAPES)} or V,D; may be given several times.",
    )
    what.add_argument("--model", help=ANY_MODEL)
    add_source_options(head)
    add_number(head, "--n-probes", None, "Clusters scored (default: 256, or the model's own).")
    dtypes = ("float32", "float16", "bfloat16")
    head.add_argument("--dtype", choices=dtypes, default="float32", help="Of random weights.")
    head.add_argument(
        "--head-bits",
        type=int,
        choices=(4, 5, 6, 8, 16),
        default=16,
        help="Bits of random rows; 16 leaves them in --dtype (default: %(default)s).",
    )
    add_number(head, "--positions", 1, "Hidden states at once")

    model = commands.add_parser("model", help="time a model's decoding: dense and with FlashHead")
    server = commands.add_parser("server", help="put three servers under load, in turns")
    for each in (model, server):
        each.add_argument("--model", required=True, help=ANY_MODEL)
        add_source_options(each)
        add_number(each, "--n-probes", None, "Clusters scored (default: the model's own).")
    add, several = model.add_argument, "May be given several times (default: all)."
    add("--sampler", choices=SAMPLERS, action="append", help=several)
    batches = "Sequences at once; may be given several times (default: 1, 4 and 8)."
    add("--batch", type=whole_number(1), action="append", help=batches)
    add_number(model, "--tokens", 48, "Tokens of a run")
    server.add_argument(
        "--clients",
        type=whole_numbers(1),
        default=CLIENTS,
        metavar="1,4,…",
        help=f"Numbers of clients at once (default: {','.join(map(str, CLIENTS))}).",
    )
    add_number(server, "--requests", 16, "Requests to a server for each number of clients")
    add_number(server, "--tokens", 16, "Tokens of each answer")

    for each, rounds in ((head, 20), (model, 8), (server, 1)):
        add_number(each, "--rounds", rounds, "Rounds that count")
        add = each.add_argument
        figures = (
            "Write the figures and the machine to a JSON file, ready to be attached to an issue."
        )
        add("--report", "--json", metavar="FILE", help=figures)
        add("--plot", metavar="FILE.png", help="Draw the figures into a picture.")
    return parser


def add_number(parser: argparse.ArgumentParser, flag: str, default: int | None, text: str) -> None:
    """A flag for a whole number of 1 or more, whose text names the default if it is None."""
    text = text if default is None else f"{text} (default: {default})."
    parser.add_argument(flag, type=whole_number(1), default=default, help=text)


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """ "qwen3-0.6b" or "151936,1024" → its name and (V, D)."""
    if (name := text.lower()) in SHAPES:
        return name, SHAPES[name]
    if re.fullmatch(r"\s*0*[1-9]\d*\s*,\s*0*[1-9]\d*\s*", text):
        return text, tuple(map(int, text.split(",")))
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a shape: give {', '.join(SHAPES)}, or V,D such as 32000,512"
    )


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.benchmark``."""
    args = make_parser().parse_args()
    from_extra("rich", "report", "mlx_flashhead.benchmark")  # before long work
    import_module(f".benchmarks.{args.kind}_benchmark", __package__).run(args)


if __name__ == "__main__":
    main()
