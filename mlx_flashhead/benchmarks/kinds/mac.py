"""Times a model on a Mac, for the project's table: one sequence, greedy and sampled.

It decodes dense, with the bare FlashHead and with its checks, and writes the file that the table is
made of, checked by docs/benchmarks/macs/schema.json.
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx

from ..machine import chip
from ..report import add_model_arguments, add_number, add_report_arguments
from . import model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this kind."""
    add_model_arguments(parser)
    add_number(parser, "--tokens", 96, "Tokens of a run")
    add_report_arguments(parser, rounds=8)
    parser.set_defaults(sampler=None, batch=[1])


def run(args: argparse.Namespace) -> None:
    """Times the model of the command line, and writes the file."""
    if args.json is None:
        args.json = f"{chip()}-{Path(args.model).resolve().name}.json"
    model.run(args)
    if mx.metal.is_available():
        print(f"Please send {args.json} to the project, for docs/benchmarks/macs.")
    else:
        print(
            f"This machine is no Mac with a GPU: {args.json} is not for the project's table.",
            file=sys.stderr,
        )
