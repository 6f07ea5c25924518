"""Builds the FlashHead of a model at its first use, and keeps it."""

import math
import sys
from collections.abc import Generator
from contextlib import redirect_stdout
from typing import Any

import mlx.nn as nn

from ..conversion.build import cut_short, index_nbytes, model_index
from ..conversion.duration import expected_seconds, in_words
from ..conversion.options import IndexOptions, recipe_flags
from ..conversion.steps import Step, take_all
from ..models.locate import HeadLocation
from ..models.tokenizers import text_side
from ..publishing.origin import Origin, card_metadata
from ..publishing.publish import checkpoint_name
from ..publishing.recipe import make_recipe
from . import cache
from .look_up import HeadOptions, StoredHead

INDEX_ONLY = "--index-only"


def build(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    *,
    origin: Origin,
    options: HeadOptions,
) -> StoredHead:
    """Builds a FlashHead, or waits for another process that builds it.

    Args:
        model: A dense model of mlx-lm or mlx-vlm, whose head is a plain product.
        tokenizer: Its tokenizer or processor.
        location: Its head.
        origin: Where the model is from.
        options: The user's choices.

    Raises:
        ValueError: If the model cannot have one.
    """
    steps = build_steps(model, tokenizer, location, origin=origin, options=options)
    with redirect_stdout(sys.stderr):  # standard output is the command's own
        stored = take_all(steps, progress=options.progress)
    assert stored is not None  # it has waited
    return stored


def build_steps(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    *,
    origin: Origin,
    options: HeadOptions,
    waits: bool = True,
    step_seconds: float = math.inf,
) -> Generator[Step, None, StoredHead | None]:
    """The same in short steps. A build that is dropped between them leaves nothing behind.

    Args:
        waits: Wait for another process that builds it; else nothing is built then.
        step_seconds: Time that a step of the model may take.

    Returns:
        The FlashHead, None if another process builds it.
    """
    rows, say = location.rows(), options.say
    place = cache.place_of(rows)
    with cache.one_at_a_time(place, say, waits=waits) as free:
        if not free:
            return None
        kept = cache.find(rows, lambda _: None)
        if kept is not None:
            return kept
        of_index = IndexOptions(quick=True)
        of_index.check_size(rows.n_rows)
        obstacle = cache.obstacle(place, index_nbytes(rows))
        duration = in_words(expected_seconds(rows, of_index))
        say(
            f"Building the FlashHead of {origin.known_as}, which takes at most about {duration}. "
            + (f"It is kept in {place}." if obstacle is None else _not_kept(obstacle))
        )
        del rows
        recipe = make_recipe(
            {INDEX_ONLY: True} | recipe_flags(of_index),
            model=origin.known_as,
            revision=origin.revision,
            seed=of_index.seed,
            name=checkpoint_name(origin, None),
        ) | {"metadata": card_metadata(origin, "adapter")}
        index = yield from model_index.steps(
            model,
            text_side(model, tokenizer),
            location,
            of_index,
            recipe=recipe,
            step_seconds=step_seconds,
        )
        for sentence in cut_short(index.config):
            say(sentence)
        if obstacle is None:
            try:
                cache.keep(index, place)
            except OSError as error:
                say(_not_kept(error.strerror or str(error)))
    return StoredHead(index, str(place))


def _not_kept(obstacle: str) -> str:
    return (
        f"It is not kept, since {cache.home()} cannot be written ({obstacle}): set "
        f"{cache.HOME_VARIABLE} to another place, or it is built again next time."
    )
