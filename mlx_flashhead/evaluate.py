"""Measures how close an unverified FlashHead comes to the dense head of its model."""

import json
from pathlib import Path

from .common.arguments import Parser, picture, whole_number, whole_numbers, writable
from .common.command import command, from_extra
from .common.flags import add_source_options

EXAMPLE = "mlx_flashhead.evaluate text --model mlx_model --text book.txt"


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.evaluate``."""
    parser = Parser(prog="mlx_flashhead.evaluate", description=__doc__, example=EXAMPLE)
    commands = parser.add_subparsers(dest="what", required=True, metavar="text")
    text = commands.add_parser(
        "text",
        help="measure on a text",
        description="Measure on a text: agreement with the dense head, KL, perplexity and bytes.",
        example=EXAMPLE,
    )
    add = text.add_argument
    add_source_options(text)
    add("--model", required=True, help="Folder or repository of any model that mlx-lm loads.")
    add("--text", required=True, metavar="FILE", help="UTF-8 text to measure on.")
    add(
        "--probes",
        type=whole_numbers(1),
        metavar="48,96,…",
        help="Numbers of clusters scored (default: several, and the model's own).",
    )
    add("--positions", type=whole_number(1), help="Positions to measure (default: all).")
    add("--plot", type=picture, metavar="OUT.png", help="Draw the curves into a picture.")
    add("--json", type=writable, metavar="OUT", help="Write the figures to a JSON file.")
    return parser


@command
def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    # What is missing is said before long work.
    from_extra("rich", "report", "mlx_flashhead.evaluate")
    from .benchmarks import agreement

    figures = agreement.run(args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
