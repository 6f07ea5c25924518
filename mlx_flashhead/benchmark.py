"""Measures the speed of a head, a model or servers."""

from .benchmarks import head_benchmark, model_benchmark, server_benchmark
from .common.arguments import Parser
from .common.command import command, from_extra

BENCHMARKS = {"head": head_benchmark, "model": model_benchmark, "server": server_benchmark}


def make_parser() -> Parser:
    """The command's arguments: a subcommand for each benchmark."""
    parser = Parser(prog="mlx_flashhead.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    for name, benchmark in BENCHMARKS.items():
        text = benchmark.__doc__ or ""
        subparser = commands.add_parser(name, help=text.partition("\n")[0], description=text)
        benchmark.add_arguments(subparser)
        subparser.set_defaults(run=benchmark.run)
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.benchmark``."""
    args = make_parser().parse_args()
    from_extra("rich", "report", "mlx_flashhead.benchmark")  # before long work
    args.run(args)


if __name__ == "__main__":
    main()
