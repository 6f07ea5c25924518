"""Builds the FlashHead of a model at its first use, and keeps it."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import mlx.nn as nn

from ..conversion.duration import expected_seconds, in_words
from ..conversion.options import IndexOptions
from ..conversion.pipeline import index_nbytes, make_index
from ..models.locate import HeadLocation, check_plain_product
from ..models.tokenizers import text_side
from ..publishing.origin import Origin, card_metadata
from ..publishing.publish import checkpoint_name
from ..publishing.recipe import make_recipe
from . import cache
from .look_up import Found

INDEX_ONLY = "--index-only"


def build(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    *,
    origin: Origin,
    say: Callable[[str], None],
    progress: bool = True,
) -> Found:
    """Builds a FlashHead, or waits for another process that builds it.

    Args:
        model: A dense model of mlx-lm or mlx-vlm.
        tokenizer: Its tokenizer or processor.
        location: Its head.
        origin: Where the model is from.
        say: Called with a sentence at each step.
        progress: Show bars.

    Raises:
        ValueError: If the model cannot have one.
    """
    check_plain_product(location)
    rows = location.rows()
    place = cache.place_of(rows)
    with cache.one_at_a_time(place, say):
        found = cache.find(rows, lambda _: None)
        if found is not None:
            return found
        options = IndexOptions()
        options.check_size(rows.n_rows)
        obstacle = cache.obstacle(place, index_nbytes(rows))
        duration = in_words(expected_seconds(rows, options))
        say(
            f"Building the FlashHead of {origin.known_as}, which takes at most about {duration}. "
            + (f"It is kept in {place}." if obstacle is None else _not_kept(obstacle))
        )
        recipe = make_recipe(
            {INDEX_ONLY: True},
            model=origin.known_as,
            revision=origin.revision,
            seed=options.seed,
            name=checkpoint_name(origin, None),
        ) | {"metadata": card_metadata(origin, "adapter")}
        with redirect_stdout(sys.stderr):  # standard output is the command's own
            text = text_side(model, tokenizer)
            index = make_index(
                model, text, location, options, None, recipe, progress=progress, tables=False
            )
        if obstacle is None:
            try:
                cache.keep(index, place)
            except OSError as error:
                say(_not_kept(error.strerror or str(error)))
    return Found(index, str(place))


def _not_kept(obstacle: str) -> str:
    return (
        f"It is not kept, since {cache.home()} cannot be written ({obstacle}): set "
        f"{cache.HOME_VARIABLE} to another place, or it is built again next time."
    )
