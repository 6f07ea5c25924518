"""Measures the speed of a head, a model or servers, or estimates it for an Apple chip."""

from .benchmarks.kinds import estimate, head, mac, model, server
from .common.arguments import Parser
from .common.command import command, from_extra


def make_parser() -> Parser:
    """The command's arguments: a subcommand for each kind."""
    parser = Parser(prog="mlx_flashhead.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    for kind in (estimate, head, mac, model, server):
        name, text = kind.__name__.rpartition(".")[2], kind.__doc__ or ""
        of_kind = commands.add_parser(name, help=text.partition("\n")[0], description=text)
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
