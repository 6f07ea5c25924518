"""Measures how close an unverified FlashHead comes to the dense head of its model."""

import json
from pathlib import Path

from .common.arguments import Parser, whole_number, whole_numbers
from .common.command import check_writable, command, from_extra
from .common.flags import add_source_options
from .common.tables import check_picture

TEXT = (
    "Measure on a text: agreement with the dense head, KL, perplexity and bytes, by the number of "
    "clusters scored without verification."
)


def make_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(prog="mlx_flashhead.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="text")
    add = commands.add_parser("text", help="measure on a text", description=TEXT).add_argument
    add_source_options(commands.choices["text"])
    add("--model", required=True, help="Folder or repository of any model that mlx-lm loads.")
    add("--text", required=True, metavar="FILE", help="UTF-8 text to measure on.")
    add(
        "--probes",
        type=whole_numbers(1),
        metavar="48,96,…",
        help="Numbers of clusters scored (default: powers of two and the model's own).",
    )
    add("--positions", type=whole_number(1), help="Positions to measure (default: all).")
    add("--plot", metavar="OUT.png", help="Draw the curves into a picture.")
    add("--json", metavar="OUT", help="Write the figures to a JSON file.")
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.evaluate``."""
    args = make_parser().parse_args()
    from_extra("rich", "report", "mlx_flashhead.evaluate")  # before long work
    if args.json:
        check_writable("--json", args.json)
    if args.plot:
        check_picture("--plot", args.plot)
    from .benchmarks import agreement

    figures = agreement.run(args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
