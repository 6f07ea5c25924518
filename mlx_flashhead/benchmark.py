"""Measures the speed of a head or a model."""

from argparse import ArgumentParser, ArgumentTypeError
from importlib import import_module
from typing import Any

from .benchmarks import SAMPLERS, SHAPES
from .common.arguments import Parser, picture, whole_number, whole_numbers, writable
from .common.command import command, from_extra
from .common.flags import add_source_options
from .common.interrupts import ctrl_c_raises

ANY_MODEL = "Folder or repository of any model that mlx-lm loads."
EXAMPLE = "mlx_flashhead.benchmark model --model mlx-community/gemma-3-1b-it-4bit"


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.benchmark``."""
    parser = Parser(prog="mlx_flashhead.benchmark", description=__doc__, example=EXAMPLE)
    commands = parser.add_subparsers(dest="subject", required=True, metavar="head|model")
    _add_head_flags(
        commands.add_parser("head", help="time a head by itself, on random weights too")
    )
    _add_model_flags(
        commands.add_parser(
            "model", help="time a model's decoding: dense and with FlashHead", example=EXAMPLE
        )
    )
    return parser


def _add_head_flags(parser: ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--shape",
        type=shape,
        action="append",
        metavar="NAME|V,D",
        help=f"Random weights of a shape: {', '.join(SHAPES)} or V,D; may be given several times.",
    )
    what.add_argument("--model", help=ANY_MODEL)
    add_common_flags(parser, rounds=20)
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="Type of random weights (default: %(default)s).",
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=(4, 5, 6, 8, 16),
        default=16,
        help="Bits of random rows; 16 keeps --dtype (default: %(default)s).",
    )
    add_number(parser, "--positions", 1, "Hidden states at once")


def _add_model_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=ANY_MODEL)
    add_common_flags(parser, rounds=8)
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        action="append",
        help="May be given several times (default: all).",
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1),
        action="append",
        help="Sequences at once; may be given several times (default: 1, 4 and 8).",
    )
    add_number(parser, "--tokens", 48, "Tokens of a run")


def add_common_flags(parser: ArgumentParser, *, rounds: int) -> None:
    """Adds the flags of all benchmarks: a model's FlashHead, the rounds, the files to write.

    Args:
        parser: Of a benchmark.
        rounds: The usual number of rounds that count.
    """
    add_source_options(parser)
    probes = "Clusters scored (default: the model's own number, or 256 for random weights)."
    add_number(parser, "--n-probes", None, probes)
    add_number(parser, "--rounds", rounds, "Rounds that count")
    parser.add_argument(
        "--report",
        "--json",
        type=writable,
        metavar="FILE",
        help="JSON file for the figures and the machine, ready to be attached to an issue.",
    )
    parser.add_argument("--plot", type=picture, metavar="FILE.png", help="Draw the figures.")


def add_number(parser: Any, flag: str, default: int | None, text: str) -> None:
    """Adds a flag for a whole number of 1 or more to a parser or a group of it.

    ``text`` names the default if it is None.
    """
    if default is not None:
        text = f"{text} (default: {default})."
    parser.add_argument(flag, type=whole_number(1), default=default, help=text)


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """A type: a shape by its name, such as "qwen3-0.6b", or as "151936,1024".

    Returns:
        The text, and (V, D).
    """
    try:
        vocab_size, hidden_size = SHAPES.get(text.lower()) or whole_numbers(1)(text)
    except (ValueError, ArgumentTypeError):
        known = f"give {', '.join(SHAPES)}, or V,D such as 32000,512"
        raise ArgumentTypeError(f"{text!r} is not a shape: {known}") from None
    return text, (vocab_size, hidden_size)


@command
def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    # What is missing is said before long work.
    from_extra("rich", "report", "mlx_flashhead.benchmark")
    from .benchmarks.reporting import write_report

    benchmark = import_module(f".benchmarks.{args.subject}_benchmark", __package__)
    # At Ctrl-C the figures so far are reported.
    with ctrl_c_raises():
        write_report(
            args,
            benchmark.cases(args),
            benchmark.make_table,
            subject=args.subject,
            command="mlx_flashhead.benchmark",
        )


if __name__ == "__main__":
    main()
