"""Builds the FlashHead of a model at its first use, and keeps it."""

import math
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import mlx.nn as nn
import numpy as np

from ..conversion import Steps, take_all
from ..conversion.build import expected_seconds, index_nbytes, model_index
from ..conversion.options import IndexOptions, make_recipe
from ..models.locate import HeadLocation
from ..models.origin import Origin
from ..models.tokenizers import text_side
from . import head_cache as cache
from .sources import HeadOptions, StoredHead

DRAFT_CLUSTER_SIZE = 32  # within a tenth of the head's bytes more tokens than with 16
ANEW_SECONDS = 600.0  # for the text of a build that is asked for: on a busy machine, too


def build_steps(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    *,
    origin: Origin,
    options: HeadOptions,
    waits: bool = True,
    anew: bool = False,
    step_seconds: float = math.inf,
    drafted: Steps[np.ndarray] | None = None,
) -> Steps[StoredHead | None]:
    """Builds a FlashHead in steps. A build that is dropped between them leaves nothing behind.

    Where another process builds it, it ``waits`` for that one, or returns None. ``anew`` replaces
    one that there is, and takes more time. ``drafted`` gives a drafter's states, instead of text.

    Raises:
        ValueError: At a step, if the model cannot have one.
    """
    rows, say = location.rows(), options.say
    place = cache.place_of(rows)
    with cache.one_at_a_time(place, say, waits=waits) as free:
        if not free:
            return None
        kept = None if anew else cache.find(rows, lambda _: None)
        if kept is not None:
            return kept
        of_index = IndexOptions(quick=True)
        if drafted is not None:
            of_index = replace(of_index, cluster_size=DRAFT_CLUSTER_SIZE)
        if anew:
            of_index = replace(of_index, calibration_seconds=ANEW_SECONDS)
        of_index.check_size(rows.n_rows)
        obstacle = cache.obstacle(place, index_nbytes(rows))
        minutes = max(1, math.ceil(round(expected_seconds(rows, of_index)) / 60))
        duration = "a minute" if minutes == 1 else f"{minutes} minutes"
        say(
            f"Building the FlashHead of {origin.known_as}, which takes at most about {duration}. "
            + (f"It is kept in {place}." if obstacle is None else _not_kept(obstacle))
        )
        del rows
        recipe = make_recipe(of_index, origin, origin.result_name())
        if drafted is not None:
            del recipe["command"]  # no command converts a drafter of mlx-vlm
        index = yield from model_index(
            model,
            text_side(model, tokenizer),
            location,
            of_index,
            drafted=drafted,
            recipe=recipe,
            step_seconds=step_seconds,
        )
        if index.config.calibration.get("cut_short"):
            say(
                "This machine was busy, so the build was cut short, after "
                f"{index.config.calibration['positions']:,} positions: "
                "mlx_flashhead.cache --rebuild MODEL makes a faster one."
            )
        if obstacle is None:
            try:
                cache.keep(index, place)
            except OSError as error:
                say(_not_kept(error.strerror or str(error)))
            except ValueError as error:  # of the folder itself
                say(f"It is not kept: {error}")
    return StoredHead(index, str(place))


def finish(steps: Steps[StoredHead | None], options: HeadOptions) -> StoredHead | None:
    """Takes all steps that are left, with bars."""
    with redirect_stdout(sys.stderr):  # standard output is the command's own
        return take_all(steps, progress=options.progress)


def _not_kept(obstacle: str) -> str:
    return (
        f"It is not kept, since {cache.home()} cannot be written ({obstacle}): set "
        f"{cache.HOME_VARIABLE} to another place, or it is built again next time."
    )
