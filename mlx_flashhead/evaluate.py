"""Measures how close an unverified FlashHead comes to the dense head of its model."""

import json
from pathlib import Path

from .common.arguments import Parser
from .common.command import check_writable, command, from_extra
from .common.head_flags import add_source_options
from .evaluation import agreement


def make_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(prog="mlx_flashhead.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    text = commands.add_parser("text", help="measure on a text", description=agreement.DESCRIPTION)
    text.add_argument(
        "--model", required=True, help="Folder or repository of any model that mlx-lm loads."
    )
    add_source_options(text)
    agreement.add_arguments(text)
    text.add_argument("--json", metavar="OUT", help="Write the figures to a JSON file.")
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.evaluate``."""
    args = make_parser().parse_args()
    from_extra("rich", "report", "mlx_flashhead.evaluate")  # before long work
    if args.json:
        check_writable("--json", args.json)
    figures = agreement.run(args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
