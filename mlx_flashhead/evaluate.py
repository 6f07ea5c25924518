"""Measures how close a FlashHead comes to the dense head of its model."""

import json
from pathlib import Path

from .common.arguments import Parser
from .common.command import check_writable, command, from_extra
from .common.head_flags import add_source_options
from .evaluation import answers, tasks, text

MODEL = "Folder or Hugging Face repository of any model that mlx-lm loads."


def make_parser() -> Parser:
    """The command's arguments: a subcommand for each way to measure."""
    parser = Parser(prog="mlx_flashhead.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    for name, way in {"text": text, "answers": answers, "tasks": tasks}.items():
        of_way = commands.add_parser(name, help=way.HELP, description=way.DESCRIPTION)
        of_way.set_defaults(run=way.run)
        of_way.add_argument("--model", required=True, help=MODEL)
        add_source_options(of_way)
        of_way.add_argument("--json", metavar="OUT", help="Write the figures to a JSON file.")
        way.add_arguments(of_way)
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.evaluate``."""
    args = make_parser().parse_args()
    from_extra("rich", "report", "mlx_flashhead.evaluate")  # before long work
    if args.json:
        check_writable("--json", args.json)
    figures = args.run(args)
    if args.json and figures is not None:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
