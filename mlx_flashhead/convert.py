"""Converts a model: the flags of ``mlx_lm.convert`` and those of FlashHead."""

import re
from dataclasses import fields

from .common.arguments import Parser, adopt
from .common.command import command
from .conversion.options import ConvertOptions, flag
from .conversion.pipeline import convert
from .models.compat.mlx_lm import configure_parser


def _descriptions(docstring: str) -> dict[str, str]:
    """The text of each argument in a docstring of Google's form."""
    arguments = re.split(r"\n {8}(\w+): ", docstring.partition("Args:")[2].partition("\n\n")[0])
    pairs = zip(arguments[1::2], arguments[2::2], strict=True)
    return {name: " ".join(text.split()) for name, text in pairs}


DESCRIPTIONS = _descriptions(convert.__doc__ or "")


def make_parser() -> Parser:
    """mlx-lm's parser with the options that it does not have, as `convert` describes them."""
    parser = adopt(
        configure_parser(),
        "mlx_flashhead.convert",
        "Make a folder of a model and its FlashHead, or of a FlashHead alone.",
        {"hf_path": "Model to convert: a Hugging Face or mlx-lm folder, or a Hub repository."},
    )
    group = parser.add_argument_group("FlashHead")
    of_mlx_lm = {action.dest: action for action in parser._actions}
    for one in fields(ConvertOptions):
        about = one.metadata
        type = {"type": about["type"]} if about["type"] is not None else {}
        if one.name in of_mlx_lm:
            of_mlx_lm[one.name].type = about["type"] or of_mlx_lm[one.name].type
            continue
        default = "" if one.default is None or one.default is False else " (default: %(default)s)"
        help = DESCRIPTIONS[one.name].replace("%", "%%").rstrip(".") + f"{default}."
        group.add_argument(flag(one), default=one.default, help=help, **type, **about["parser"])
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.convert``."""
    convert(**vars(make_parser().parse_args()))


if __name__ == "__main__":
    main()
