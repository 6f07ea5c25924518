"""Measures the speed of a head, a model or servers, or estimates it for an Apple chip."""

from .benchmarks.kinds import kinds
from .common.arguments import Parser
from .common.command import command
from .common.extras import from_extra


def make_parser() -> Parser:
    """The command's arguments: a subcommand for each kind."""
    parser = Parser(prog="mlx_flashhead.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    for name, kind in kinds().items():
        summary = (kind.__doc__ or "").partition("\n")[0]
        of_kind = commands.add_parser(name, help=summary, description=kind.__doc__)
        kind.add_arguments(of_kind)
        of_kind.set_defaults(run=kind.run)
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.benchmark``."""
    args = make_parser().parse_args()
    from_extra("rich", "report", "mlx_flashhead.benchmark")  # before long work
    args.run(args)


if __name__ == "__main__":
    main()
