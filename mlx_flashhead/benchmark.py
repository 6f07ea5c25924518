"""Measures the speed of a head, a model or servers."""

from argparse import ArgumentParser, ArgumentTypeError
from importlib import import_module
from typing import Any

from .benchmarks import SAMPLERS, SHAPES
from .common.arguments import Parser, picture, whole_number, whole_numbers, writable
from .common.command import command, from_extra
from .common.flags import add_source_options


def make_parser() -> Parser:
    parser = Parser(prog="mlx_flashhead.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="kind", required=True, metavar="head|model|server")
    head = commands.add_parser("head", help="time a head by itself, on random weights too")
    model = commands.add_parser("model", help="time a model's decoding: dense and with FlashHead")
    server = commands.add_parser("server", help="put three servers under load, in turns")

    what = head.add_mutually_exclusive_group(required=True)
    shapes = f"Random weights of a shape: {', '.join(SHAPES)} or V,D; may be given several times."
    what.add_argument("--shape", type=shape, action="append", metavar="NAME|V,D", help=shapes)
    any_model = "Folder or repository of any model that mlx-lm loads."
    what.add_argument("--model", help=any_model)
    for each in (model, server):
        each.add_argument("--model", required=True, help=any_model)
    for each, rounds in ((head, 20), (model, 8), (server, 1)):
        add_source_options(each)
        add_number(each, "--n-probes", None, "Clusters scored (default: the model's own, or 256).")
        add_number(each, "--rounds", rounds, "Rounds that count")
        report = "JSON file for the figures and the machine, ready to be attached to an issue."
        each.add_argument("--report", "--json", type=writable, metavar="FILE", help=report)
        each.add_argument("--plot", type=picture, metavar="FILE.png", help="Draw the figures.")

    dtypes = ("float32", "float16", "bfloat16")
    head.add_argument("--dtype", choices=dtypes, default="float32", help="Of random weights.")
    bits: Any = {"type": int, "choices": (4, 5, 6, 8, 16), "default": 16}
    head.add_argument("--head-bits", **bits, help="Of random rows; 16 is --dtype (default: 16).")
    add_number(head, "--positions", 1, "Hidden states at once")

    several = "May be given several times (default: all)."
    model.add_argument("--sampler", choices=SAMPLERS, action="append", help=several)
    batches = "Sequences at once; may be given several times (default: 1, 4 and 8)."
    model.add_argument("--batch", type=whole_number(1), action="append", help=batches)
    add_number(model, "--tokens", 48, "Tokens of a run")

    clients: Any = {"type": whole_numbers(1), "default": (1, 4, 8, 16), "metavar": "1,4,…"}
    server.add_argument("--clients", **clients, help="Clients at once (default: 1,4,8,16).")
    add_number(server, "--requests", 16, "Requests to a server for each number of clients")
    add_number(server, "--tokens", 16, "Tokens of each answer")
    return parser


def add_number(parser: ArgumentParser, flag: str, default: int | None, text: str) -> None:
    """A flag for a whole number of 1 or more, whose text names the default if it is None."""
    text = text if default is None else f"{text} (default: {default})."
    parser.add_argument(flag, type=whole_number(1), default=default, help=text)


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """ "qwen3-0.6b" or "151936,1024" → its name and (V, D)."""
    try:
        vocab_size, hidden_size = SHAPES.get(text.lower()) or whole_numbers(1)(text)
    except (ValueError, ArgumentTypeError):
        known = f"give {', '.join(SHAPES)}, or V,D such as 32000,512"
        raise ArgumentTypeError(f"{text!r} is not a shape: {known}") from None
    return text, (vocab_size, hidden_size)


@command
def main() -> None:
    args = make_parser().parse_args()
    from_extra("rich", "report", "mlx_flashhead.benchmark")  # before long work
    from .benchmarks.reporting import report

    benchmark = import_module(f".benchmarks.{args.kind}_benchmark", __package__)
    report(args, benchmark.cases(args), benchmark.make_table)


if __name__ == "__main__":
    main()
