"""Converts a model: the flags of ``mlx_lm.convert`` and those of FlashHead."""

import re
from dataclasses import fields

from .common.arguments import Parser, adopt
from .common.command import command
from .conversion.options import ConvertOptions, add_options
from .conversion.pipeline import convert
from .models.compat.convert import configure_parser


def make_parser() -> Parser:
    """mlx-lm's parser, extended."""
    parser = adopt(
        configure_parser(),
        "mlx_flashhead.convert",
        "Make a folder of a model and its FlashHead, or of a FlashHead alone.",
        {"hf_path": "Model to convert: a Hugging Face or mlx-lm folder, or a Hub repository."},
    )
    add_options(parser)
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.convert``."""
    try:
        convert(**vars(make_parser().parse_args()))
    except ValueError as error:
        raise ValueError(with_flags(str(error))) from error


def with_flags(message: str) -> str:
    """A message about parameters as one about flags: ``mlx_path`` is --mlx-path."""
    names = "|".join(one.name for one in fields(ConvertOptions))
    return re.sub(
        rf"`({names})`|^({names})(?= is )",
        lambda found: "--" + (found[1] or found[2]).replace("_", "-"),
        message,
    )


if __name__ == "__main__":
    main()
