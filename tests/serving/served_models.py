"""Models as the server has them, in this process: a random one, and what requests need of one."""

from pathlib import Path

import mlx_flashhead
from mlx_flashhead.serving.requests import read_request
from mlx_flashhead.serving.served_models import ServedModel
from mlx_flashhead.serving.server_options import make_parser


def flags(*arguments):
    """The server's flags."""
    return make_parser().parse_args(["--model", "model", *map(str, arguments)])


def served_model(folder: Path, *, names=("tiny",), context=512, **options) -> ServedModel:
    """A converted folder's model."""
    model, tokenizer = mlx_flashhead.load(str(folder))
    return ServedModel(
        names, model, tokenizer, options.pop("draft_model", None), context, **options
    )


def checked(served: ServedModel, body: dict, *, chat: bool = True, arguments=()):
    """A request, read."""
    return read_request(body, chat=chat, models=[served], defaults=flags(*arguments))
