"""Converts a model: the flags of ``mlx_lm.convert`` and those of FlashHead."""

from .common.arguments import Parser, adopt
from .common.command import command
from .conversion.options import add_options
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
    convert(**vars(make_parser().parse_args()))


if __name__ == "__main__":
    main()
